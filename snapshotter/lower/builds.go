package lower

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// BuildEntryBytes is about what merging and writing a chain image takes of memory for each entry (BenchmarkChain).
const BuildEntryBytes = 640

// build is an image that is being built for all who wait for it.
type build struct {
	begun   time.Time
	entries int64
	waiters int
	cancel  context.CancelFunc
	done    chan struct{} // closed when err is set
	err     error
}

// builds are the images that are being built for callers of Build. Safe for concurrent use.
type builds struct {
	// background is that of Options, run builds the image of a chain, and entries counts what that takes.
	background func(fn func(context.Context)) bool
	run        func(ctx context.Context, n Name, chain []content.LayerID) error
	entries    func(chain []content.LayerID) int64

	mu sync.Mutex // guards what follows
	of map[Name]*build
}

// Build makes sure that a chain's image exists. Callers that want the same one at the same time share the work, which
// ends when all of them have gone.
func (c *Chains) Build(ctx context.Context, chain []content.LayerID, f Flavour) error {
	return c.builds.build(ctx, c.Name(chain, f), chain)
}

func (bs *builds) build(ctx context.Context, n Name, chain []content.LayerID) error {
	bs.mu.Lock()
	b := bs.of[n]
	if b == nil {
		b = bs.start(ctx, n, chain)
	}
	b.waiters++
	bs.mu.Unlock()
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
	}
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if b.waiters--; b.waiters == 0 {
		b.cancel()
		bs.forget(n, b) // who asks from now on starts anew
	}
	return fmt.Errorf("wait for chain image %s: %w", n, context.Cause(ctx))
}

// start is called under mu.
func (bs *builds) start(ctx context.Context, n Name, chain []content.LayerID) *build {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b := &build{begun: time.Now(), entries: bs.entries(chain), cancel: cancel, done: make(chan struct{})}
	bs.of[n] = b
	started := bs.background(func(stop context.Context) {
		defer cancel()
		defer context.AfterFunc(stop, cancel)()
		err := Safely(func() error { return bs.run(ctx, n, chain) })
		if err != nil && stop.Err() != nil {
			err = errors.Join(err, ErrClosed)
		}
		bs.mu.Lock()
		defer bs.mu.Unlock()
		bs.forget(n, b)
		b.err = err
		close(b.done)
	})
	if !started {
		bs.forget(n, b)
		b.err = ErrClosed
		close(b.done)
	}
	return b
}

// ErrClosed: the daemon stops.
var ErrClosed = fmt.Errorf("snapshotter is closed: %w", errdefs.ErrUnavailable)

// forget is called under mu.
func (bs *builds) forget(n Name, b *build) {
	if bs.of[n] == b {
		delete(bs.of, n)
	}
}

// buildShared builds an image, and once more where the disk was full and there is something to remove.
func (c *Chains) buildShared(ctx context.Context, n Name, chain []content.LayerID) error {
	err := c.buildAlone(ctx, n, chain)
	if errors.Is(err, unix.ENOSPC) && c.opts.Layers.MakeRoom(ctx) {
		err = c.buildAlone(ctx, n, chain)
	}
	return err
}

func (c *Chains) buildAlone(ctx context.Context, n Name, chain []content.LayerID) error {
	done, err := c.Users.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	return c.buildLocked(ctx, n, chain)
}

// has tells whether a chain's image is being built.
func (bs *builds) has(n Name) bool {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	return bs.of[n] != nil
}

// Work is what is being done at this moment.
type Work struct {
	Running int
	Waiters int // callers
	// Oldest is when the one that runs longest began; zero when none runs.
	Oldest time.Time
	Bytes  int64 // of memory, estimated
}

// Work are the images that are being built. Those that wait for room are among them.
func (c *Chains) Work() Work { return c.builds.work() }

func (bs *builds) work() (w Work) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	for _, b := range bs.of {
		w.Running++
		w.Waiters += b.waiters
		w.Bytes += b.entries * BuildEntryBytes
		if w.Oldest.IsZero() || b.begun.Before(w.Oldest) {
			w.Oldest = b.begun
		}
	}
	return w
}

// Safely turns a panic of fn into an error: nobody else recovers it in the background.
func Safely(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}
