package powercut

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
)

// fate is what becomes of writes that no flush followed.
type fate int

const (
	dropped fate = iota
	kept
	some // any page of any of them
)

func (f fate) String() string { return [...]string{"dropped", "kept", "in part"}[f] }

// cut is one power cut.
type cut struct {
	at   int // operations that had reached the disk
	fate fate
	seed uint64 // of what is kept in part
}

func (c cut) String() string {
	return fmt.Sprintf("cut at operation %d, unflushed writes %s (seed %d)", c.at, c.fate, c.seed)
}

// replay builds the images that cuts leave, one after the other. Safe for concurrent use.
type replay struct {
	log []op

	mu      sync.Mutex // guards what follows
	cuts    []cut      // still to come, in order
	durable *os.File   // what is on the disk in any case
	flushed int        // operations of the log that are in it
}

// next writes what the next cut leaves to a file. ok is false after the last one.
func (r *replay) next(to *os.File) (c cut, ok bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.cuts) == 0 {
		return c, false, nil
	}
	c, r.cuts = r.cuts[0], r.cuts[1:]
	return c, true, r.image(c, to)
}

// image is called under mu.
func (r *replay) image(c cut, to *os.File) error {
	last := r.flushed
	for i := r.flushed; i < c.at; i++ {
		if r.log[i].data == nil {
			last = i + 1
		}
	}
	for _, o := range r.log[r.flushed:last] {
		if _, err := r.durable.WriteAt(o.data, o.off); err != nil {
			return fmt.Errorf("replay: %w", err)
		}
	}
	r.flushed = last
	if err := copySparse(to, r.durable); err != nil {
		return fmt.Errorf("copy the disk: %w", err)
	}
	random := rand.New(rand.NewPCG(c.seed, 0))
	for _, o := range r.log[last:c.at] {
		if err := writePages(to, o.data, o.off, c.keeper(random)); err != nil {
			return fmt.Errorf("write what no flush followed: %w", err)
		}
	}
	return nil
}

// keeper chooses among the pages of one write: nearly half of the writes stay as they are, as many get lost, and the
// others are torn.
func (c cut) keeper(r *rand.Rand) func([]byte) bool {
	share := 0
	switch c.fate {
	case kept:
		share = 8
	case some:
		share = []int{0, 0, 0, 4, 8, 8, 8, 8}[r.IntN(8)]
	}
	return func([]byte) bool { return r.IntN(8) < share }
}

// chooseCuts returns n cuts in order, or, if n is 0, one after every flush and as many at random places between. With
// n, half of them come after flushes, any of them.
func chooseCuts(log []op, n int, r *rand.Rand) []cut {
	var flushes, between []int
	for i, o := range log {
		if o.data == nil {
			flushes = append(flushes, i+1)
		} else {
			between = append(between, i+1)
		}
	}
	if n == 0 {
		n = 2 * len(flushes)
	}
	r.Shuffle(len(flushes), func(i, j int) { flushes[i], flushes[j] = flushes[j], flushes[i] })
	at := map[int][]cut{}
	for i := range n {
		c := cut{seed: r.Uint64()}
		if i%2 == 0 && i/2 < len(flushes) {
			c.at = flushes[i/2]
		} else {
			c.at, c.fate = between[r.IntN(len(between))], fate(r.IntN(3))
			if c.fate != dropped {
				c.at = epochEnd(log, c.at, r)
			}
		}
		at[c.at] = append(at[c.at], c)
	}
	cuts := make([]cut, 0, n)
	for i := range len(log) + 1 {
		cuts = append(cuts, at[i]...)
	}
	return cuts
}

// epochEnd moves a place, often, to right before the next flush: there most writes are at stake.
func epochEnd(log []op, at int, r *rand.Rand) int {
	if r.IntN(3) == 0 {
		return at
	}
	for at < len(log) && log[at].data != nil {
		at++
	}
	return at
}
