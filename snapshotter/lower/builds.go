package lower

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"

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

// Build makes sure that a chain's image exists. Callers that want the same one at the same time share the work, which
// ends when all of them have gone.
func (c *Chains) Build(ctx context.Context, chain []content.LayerID, f Flavour) error {
	n := c.Name(chain, f)
	c.mu.Lock()
	b := c.builds[n]
	if b == nil {
		b = c.startBuild(ctx, n, chain)
	}
	b.waiters++
	c.mu.Unlock()
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if b.waiters--; b.waiters == 0 {
		b.cancel()
		c.forgetBuild(n, b) // who asks from now on starts anew
	}
	return fmt.Errorf("wait for chain image %s: %w", n, context.Cause(ctx))
}

// startBuild is called under mu.
func (c *Chains) startBuild(ctx context.Context, n Name, chain []content.LayerID) *build {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b := &build{begun: time.Now(), entries: c.opts.Layers.Entries(chain), cancel: cancel, done: make(chan struct{})}
	c.builds[n] = b
	started := c.opts.Background(func(stop context.Context) {
		defer cancel()
		defer context.AfterFunc(stop, cancel)()
		err := Safely(func() error { return c.buildShared(ctx, n, chain) })
		if err != nil && stop.Err() != nil {
			err = errors.Join(err, ErrClosed)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.forgetBuild(n, b)
		b.err = err
		close(b.done)
	})
	if !started {
		c.forgetBuild(n, b)
		b.err = ErrClosed
		close(b.done)
	}
	return b
}

// ErrClosed: the daemon stops.
var ErrClosed = fmt.Errorf("snapshotter is closed: %w", errdefs.ErrUnavailable)

// forgetBuild is called under mu.
func (c *Chains) forgetBuild(n Name, b *build) {
	if c.builds[n] == b {
		delete(c.builds, n)
	}
}

func (c *Chains) buildShared(ctx context.Context, n Name, chain []content.LayerID) error {
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	return c.buildLocked(ctx, n, chain)
}

// isBuilding tells whether a chain's image is being built.
func (c *Chains) isBuilding(n Name) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.builds[n] != nil
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
func (c *Chains) Work() (w Work) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.builds {
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
