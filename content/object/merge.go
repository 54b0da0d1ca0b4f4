package object

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// A container's first opens cost more the more packs its image has (20: as one, 60: 1.5 times, 200: 2.5 times), and a
// pack's dead slots cost disk. So packs are merged by size, as logs are: what has come in lately is copied more often
// than what is large.
const (
	// tierWidth is how many packs of one size there may be, before they are merged; the next size is as many times larger.
	tierWidth = 6
	// tierBase is the largest pack of the smallest size, in blocks of 4 KiB: 1 MiB.
	tierBase = 256
	// tierTop is the size from which on packs are never merged for their number, in blocks: 512 MiB.
	tierTop = 128 << 10
	// A pack whose dead blocks are more than this part of it, and more than deadMin blocks, is rewritten.
	deadPart = 3 // a third
	deadMin  = 256
	// mergeMax bounds what one merge copies, in blocks: 1 GiB.
	mergeMax = 256 << 10
)

// packState is what the policy looks at.
type packState struct {
	id content.PackID
	// live and dead are blocks of 4 KiB: live is what copies of the objects take, dead what nothing names.
	live, dead int64
	// rewrite: it is damaged, lacks fs-verity, or is too dense for the kernel.
	rewrite bool
}

// plan says which packs to merge into one, nil when all is well. What lives in them is at most room blocks, and at
// most mergeMax unless one pack alone is larger. It is a pure function.
func plan(packs []packState, room int64) []content.PackID {
	packs = slices.DeleteFunc(slices.Clone(packs), func(p packState) bool {
		return p.live == 0 || p.live > room // the last holder lets it go; more room has to come
	})
	slices.SortFunc(packs, func(a, b packState) int {
		return cmp.Or(cmp.Compare(a.live, b.live), cmp.Compare(a.id, b.id))
	})
	var sparse []packState
	tiers := map[int][]packState{}
	for _, p := range packs {
		if p.rewrite || p.dead > deadMin && p.dead > (p.live+p.dead)/deadPart {
			sparse = append(sparse, p)
		}
		if t := tier(p.live); t >= 0 {
			tiers[t] = append(tiers[t], p)
		}
	}
	if len(sparse) > 0 {
		return bounded(sparse, room)
	}
	for t := 0; len(tiers) > 0; t++ {
		if len(tiers[t]) > tierWidth {
			if ids := bounded(tiers[t], room); len(ids) > 1 {
				return ids
			}
		}
		delete(tiers, t)
	}
	return nil
}

// tier is the size class of a pack, -1 for one that is large enough.
func tier(live int64) int {
	if live >= tierTop {
		return -1
	}
	t := 0
	for limit := int64(tierBase); live >= limit; limit *= tierWidth {
		t++
	}
	return t
}

// bounded takes the first packs, at least one, that are not too much.
func bounded(packs []packState, room int64) (ids []content.PackID) {
	var sum int64
	for _, p := range packs {
		if sum += p.live; len(ids) > 0 && sum > min(mergeMax, room) {
			break
		}
		ids = append(ids, p.id)
	}
	return ids
}

// CompactOptions say what merging may take.
type CompactOptions struct {
	// Sync is called before a merge writes anything. The first function that it returns puts on the disk what has
	// been written by then, and tells of writes that failed since the call; stop ends that. Old copies go after it.
	// May be nil.
	Sync func() (sync func() error, stop func(), err error)
	// Room is how many bytes merging may take now; nil for any.
	Room func() int64
}

// Compactor merges the packs of a store: those that are many and small, mostly dead, or damaged. Others use the store
// meanwhile.
type Compactor struct {
	s    *Store
	opts CompactOptions
	turn chan struct{} // is held by who merges, from one merge to the next: who waits is first then
}

// NewCompactor returns what merges the packs of s.
func NewCompactor(s *Store, opts CompactOptions) *Compactor {
	return &Compactor{s: s, opts: opts, turn: make(chan struct{}, 1)}
}

// begin waits until nobody else merges.
func (c *Compactor) begin(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (c *Compactor) end() { <-c.turn }

// Needed reports whether Compact has something to do.
func (c *Compactor) Needed() bool { return len(c.next()) > 0 }

func (c *Compactor) next() []content.PackID {
	room := int64(math.MaxInt64)
	if c.opts.Room != nil {
		room = c.opts.Room()
	}
	s := c.s
	s.lock()
	defer s.unlock()
	if s.packs.keepDead {
		return nil
	}
	states := make([]packState, 0, len(s.packs.all))
	bad := map[*pack]int64{} // objects that a merge leaves where they are
	for id := range s.bad {
		if r := s.refs[id]; r.pack != nil {
			bad[r.pack] += r.pack.space(r.n)
		}
	}
	for _, p := range s.packs.all {
		live := p.live - bad[p]
		if live > 0 {
			live += s.packs.growth(p)
		}
		states = append(states, packState{
			id: p.id, live: blocks(live), dead: blocks(p.dead()),
			rewrite: p.damaged != nil || p.torn || p.plain && s.packs.opts.Verity || s.packs.tooDense(p),
		})
	}
	return plan(states, room/content.BlockSize)
}

// blocks is how many blocks of 4 KiB so many bytes take.
func blocks(bytes int64) int64 { return content.Blocks(bytes) / content.BlockSize }

// Compact merges packs until the policy is content. Others use the store meanwhile. An object whose bytes are found to
// be bad stays where it is, and is bad then; so does its pack, which is not tried again in this call.
func (c *Compactor) Compact(ctx context.Context) error {
	var last []content.PackID
	for {
		ids, err := c.mergeNext(ctx, last)
		if err != nil {
			return fmt.Errorf("merge packs: %w", err)
		}
		if len(ids) == 0 {
			return nil
		}
		last = ids
	}
}

// mergeNext merges the packs that are due, unless they are the same as the last time, and returns them.
func (c *Compactor) mergeNext(ctx context.Context, last []content.PackID) ([]content.PackID, error) {
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	defer c.end()
	ids := c.next()
	if len(ids) == 0 || slices.Equal(ids, last) {
		return nil, nil
	}
	return ids, c.merge(ctx, ids)
}

// MendTorn copies what is whole in packs that came to the disk in parts, and removes these. It reports whether none
// is left: the next Open would take what they hold for whole.
func (c *Compactor) MendTorn(ctx context.Context) (mended bool, err error) {
	if err := c.begin(ctx); err != nil {
		return false, err
	}
	defer c.end()
	torn := map[*pack]int64{} // how much their copies take
	packs := c.s.packs
	packs.mu.Lock()
	for _, p := range packs.all {
		if p.torn {
			torn[p] = p.live + packs.growth(p)
		}
	}
	keep := packs.keepDead
	packs.mu.Unlock()
	if keep {
		return len(torn) == 0, nil
	}
	for p, bytes := range torn {
		if c.opts.Room != nil && c.opts.Room() < bytes {
			return false, nil
		}
		if err := c.merge(ctx, []content.PackID{p.id}); err != nil {
			return false, fmt.Errorf("mend pack %s: %w", packs.Path(p.id), err)
		}
	}
	return true, nil
}

// Coarsen copies what lives in packs that are too dense to others, as far as some objects lie there. room is asked
// for the bytes of each, and says why they must not be taken. It must not wait for anybody who may be in Coarsen.
func (c *Compactor) Coarsen(ctx context.Context, ids []content.ObjectID, room func(bytes int64) error) error {
	s := c.s
	need := map[*pack]bool{}
	s.lock()
	for _, id := range ids {
		if p := s.refs[id].pack; p != nil && s.packs.tooDense(p) {
			need[p] = true
		}
	}
	s.unlock()
	for p := range need {
		if err := c.coarsen(ctx, p, room); err != nil {
			return fmt.Errorf("copy pack %s: %w: %w", s.packs.Path(p.id), ErrTooDense, err)
		}
	}
	return nil
}

func (c *Compactor) coarsen(ctx context.Context, p *pack, room func(bytes int64) error) error {
	if err := c.begin(ctx); err != nil {
		return err
	}
	defer c.end()
	bytes := c.s.coarse(p)
	if bytes == 0 {
		return nil // somebody else was faster
	}
	if err := room(bytes); err != nil {
		return err
	}
	return c.merge(ctx, []content.PackID{p.id})
}

// coarse is what copies take of what lives in a pack, but for what stays because it is bad.
func (x *index) coarse(p *pack) (bytes int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id, r := range x.refs {
		if _, bad := x.bad[id]; r.pack == p && r.count > 0 && !bad {
			bytes += content.Blocks(p.slots[r.n].size)
		}
	}
	return bytes
}

// copied is an object on its way to another pack.
type copied struct {
	id   content.ObjectID
	from *pack
	old  uint32
	n    uint32 // in the new one
}

// merge copies what lives in some packs into a new one.
func (c *Compactor) merge(ctx context.Context, ids []content.PackID) (err error) {
	sync := func() error { return nil }
	if c.opts.Sync != nil {
		var stop func()
		if sync, stop, err = c.opts.Sync(); err != nil {
			return err
		}
		defer stop()
	}
	packs := c.s.packs
	f, err := packs.begin()
	if err != nil {
		return err
	}
	moves, bytes, err := c.copyLive(ctx, f.PackWriter, ids)
	if err != nil || len(moves) == 0 {
		return errors.Join(err, f.discard())
	}
	packs.step("merge.copied")
	p, err := packs.seal(f)
	if err != nil {
		return errors.Join(err, f.discard())
	}
	// The new copies are on the disk before the old ones go.
	if err := sync(); err != nil {
		return errors.Join(err, packs.remove(p))
	}
	packs.step("merge.synced")
	dropCache(p.file, 0)
	return c.switchOver(p, moves, bytes)
}

func (c *Compactor) copyLive(ctx context.Context, w *erofs.PackWriter, ids []content.PackID) (moves []copied,
	bytes int64, err error) {
	for _, m := range c.s.objectsOf(ids) {
		if ctx.Err() != nil {
			return nil, 0, context.Cause(ctx)
		}
		x := m.from.slots[m.old]
		n, err := copyObject(ctx, w, m, x)
		if isDamage(err) {
			c.s.SetBad(m.id)
			continue
		}
		if errors.Is(err, os.ErrClosed) {
			continue // its pack is gone
		}
		if err != nil {
			return nil, 0, err
		}
		m.n = n
		bytes += m.from.space(m.old)
		moves = append(moves, m)
	}
	for _, id := range ids {
		packs := c.s.packs
		packs.mu.Lock()
		p := packs.all[id]
		packs.mu.Unlock()
		if p != nil {
			dropCache(p.file, 0)
		}
	}
	return moves, bytes, nil
}

// copyObject copies one payload, and compares it with its name.
func copyObject(ctx context.Context, w *erofs.PackWriter, m copied, x extent) (n uint32, err error) {
	to, err := w.Stream(x.size)
	if err != nil {
		return 0, err
	}
	h := sha256.New()
	from := io.NewSectionReader(m.from.file, x.offset, x.size)
	buf := make([]byte, min(copyBuffer, x.size))
	for err == nil && ctx.Err() == nil {
		var got int
		if got, err = from.Read(buf); got > 0 {
			h.Write(buf[:got])
			if _, werr := to.Write(buf[:got]); werr != nil {
				return 0, errors.Join(werr, to.Abort())
			}
		}
	}
	if ctx.Err() != nil {
		return 0, errors.Join(context.Cause(ctx), to.Abort())
	}
	if err != io.EOF {
		return 0, errors.Join(err, to.Abort())
	}
	if content.Sum(h.Sum(nil)) != m.id.Sum {
		return 0, errors.Join(fmt.Errorf("object %s is %w", m.id, ErrDamaged), to.Abort())
	}
	if n, err = to.Commit(m.id); err != nil {
		return 0, errors.Join(err, to.Abort())
	}
	return n, nil
}

const copyBuffer = 1 << 20

// switchOver makes a new pack the place of the objects that have been copied into it.
func (c *Compactor) switchOver(p *pack, moves []copied, bytes int64) error {
	s := c.s
	s.lock()
	s.packs.add(p)
	s.packs.merged += bytes
	from := map[*pack]bool{p: true}
	for _, m := range moves {
		r := s.refs[m.id]
		if r.pack != m.from || r.n != m.old || r.count == 0 {
			continue // gone, or put anew
		}
		m.from.die(m.old)
		r.pack, r.n = p, m.n
		s.refs[m.id] = r
		p.revive(m.n)
		from[m.from] = true
	}
	held, drops := s.packs.emptied(from)
	var bad []content.PackID
	held = slices.DeleteFunc(held, func(id content.PackID) bool {
		damaged := s.packs.all[id].damaged != nil
		if damaged {
			bad = append(bad, id)
		}
		return damaged
	})
	s.unlock()
	s.packs.tellMoved(held, false)
	s.packs.tellMoved(bad, true)
	var errs []error
	for _, d := range drops {
		errs = append(errs, s.packs.remove(d))
	}
	s.packs.step("merge.done")
	return errors.Join(errs...)
}
