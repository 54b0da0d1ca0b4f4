package layer

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/docker/go-units"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// DefaultMaxMemory is Options.MaxMemory where that is 0.
const DefaultMaxMemory = 1 << 30

const (
	// smallShares is how many ingests and builds may run at a time, each with a small share of the memory;
	// together they have a quarter of it. The one that needs more waits for the other three quarters, which only
	// one has at a time: so nobody waits while holding what another one waits for.
	smallShares = 8
	// freeAfter is how long nothing runs before the heap goes back to the kernel.
	freeAfter = 2 * time.Second
)

// budget bounds what all ingests and chain builds keep until they are done: entries, inline data and zstd windows.
// Payloads on their way to the disk are not part of it; they have a bound of their own (buffersSize).
type budget struct {
	max          int64
	small, large chan struct{} // each holds one token for each who runs
	idle         func()        // what is done when nothing has run for a while

	mu     sync.Mutex // guards what follows
	active int
	kept   int64       // by all shares
	timer  *time.Timer // runs while nothing does
	closed bool
}

func newBudget(most int64, idle func()) *budget {
	if most == 0 {
		most = DefaultMaxMemory
	}
	return &budget{max: most, small: make(chan struct{}, smallShares), large: make(chan struct{}, 1), idle: idle}
}

func (b *budget) smallShare() int64 { return b.max / 4 / smallShares }
func (b *budget) largeShare() int64 { return b.max / 4 * 3 }

// share is what one ingest or build may keep.
type share struct {
	b        *budget
	ctx      context.Context
	arriving bool

	mu    sync.Mutex // guards what follows
	kept  int64
	large bool
}

// share waits for a small share. One that is arriving waits for nothing: a download may stand still, and must not
// hold what others wait for, so it leaves half of the small shares to them too.
func (b *budget) share(ctx context.Context, arriving bool) (*share, error) {
	if arriving {
		select {
		case b.small <- struct{}{}:
		default:
			return nil, fmt.Errorf("%w: others are being read", archive.ErrMemory)
		}
		if len(b.small) > smallShares/2 {
			<-b.small
			return nil, fmt.Errorf("%w: others are being read", archive.ErrMemory)
		}
	} else {
		select {
		case b.small <- struct{}{}:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.active++; b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	return &share{b: b, ctx: ctx, arriving: arriving}, nil
}

// keep is an archive.Memory.
func (s *share) keep(bytes int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept += bytes
	s.b.count(bytes)
	switch {
	case s.kept <= s.b.smallShare():
		return nil
	case s.kept > s.b.largeShare():
		return s.b.refuse()
	case s.large:
		return nil
	case s.arriving:
		return fmt.Errorf("%w: it is read when it is whole", archive.ErrMemory)
	}
	select {
	case s.b.large <- struct{}{}:
		s.large = true
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

// count adds to what all keep, or takes from it.
func (b *budget) count(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept += bytes
}

// Memory returns what ingests and chain builds keep at this moment of what they may keep (max_memory), in bytes.
func Memory(s *Store) (used, most int64) {
	b := s.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kept, b.max
}

func (b *budget) refuse() error {
	return fmt.Errorf("%w: it takes more than %s, three quarters of max_memory: "+
		"raise max_memory in the daemon's configuration, and MemoryMax in its unit",
		archive.ErrMemory, units.BytesSize(float64(b.largeShare())))
}

// end gives back all that is kept.
func (s *share) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.large {
		<-s.b.large
	}
	<-s.b.small
	b := s.b
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept -= s.kept
	if b.active--; b.active == 0 && !b.closed {
		b.timer = time.AfterFunc(freeAfter, b.idle)
	}
}

// close ends what the budget does by itself.
func (b *budget) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.timer != nil {
		b.timer.Stop()
	}
}

// freeHeap gives the heap back to the kernel, with what pools hold, which lasts for one collection.
func freeHeap() {
	runtime.GC()
	debug.FreeOSMemory()
}

// chainCost is what a build keeps of a layer: its entries, then nodes, then inodes of an image, and twice the encoded
// tree. An ingest counts as much, so that each layer that came in can be built.
func chainCost(entries, encoded int64) int64 { return entries*archive.EntryCost + 2*encoded }

// ReserveChain waits until there is memory to merge a chain and to write its image, and returns how to give it back.
// It refuses a chain that takes more than there is for one.
func (s *Store) ReserveChain(ctx context.Context, chain []content.LayerID) (release func(), err error) {
	var cost int64
	for _, id := range chain {
		f, err := s.Facts(id)
		if err != nil {
			return nil, fmt.Errorf("measure chain: %w", err)
		}
		encoded, err := tree.Length(s.treePath(id), id)
		if isDamage(err) {
			s.harm(ctx, id, Damage{Tree: err})
		}
		if err != nil {
			return nil, fmt.Errorf("measure chain: %w", err)
		}
		cost += chainCost(f.Entries, encoded)
	}
	sh, err := s.budget.share(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("wait for memory: %w", err)
	}
	if err := sh.keep(cost); err != nil {
		sh.end()
		return nil, fmt.Errorf("chain of %d layers: %w", len(chain), err)
	}
	return sh.end, nil
}
