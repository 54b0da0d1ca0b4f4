package lower

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Name names a chain image: the sha256 over the ids of its layers, base first.
type Name struct{ content.Sum }

// chainVersion is hashed into every name, so that images of another writer are not taken for
// ours: change it whenever erofs.Write or tree.Merge change what they produce.
const chainVersion = "chain image 2\n"

// withDigests follows it for images that hold the digests of their objects. When the setting changes, all images of
// the other kind are nobody's, and go.
const withDigests = "fs-verity\n"

// Name names the image of a chain.
func (c *Chains) Name(chain []content.LayerID) (n Name) {
	h := sha256.New()
	h.Write([]byte(chainVersion))
	if c.opts.Digests != nil {
		h.Write([]byte(withDigests))
	}
	for _, id := range chain {
		h.Write(id.Sum[:])
	}
	h.Sum(n.Sum[:0])
	return n
}

// Chains is the cache of chain images and their mounts:
//
//	<root>/chains/<64 hex>.erofs   images; each may go at any time and is built again
//	<run>/chains/<64 hex>          mount points
//
// A mount point stays mounted while an active snapshot or a view uses it: a client may mount what
// it was told at any later time. Containers themselves do not need it, since overlayfs
// clones the mounts below it.
type Chains struct {
	opts Options

	room *semaphore.Weighted // of builds

	mu    sync.Mutex // guards what follows
	stats Stats
	// builds are the images that are being built for callers of Build.
	builds map[Name]*build
	// busy chains are being built, mounted or unmounted; the channel is closed after.
	busy map[Name]chan struct{}
	// sizes are what the images occupy.
	sizes map[Name]int64
	used  layer.Usage // the sum
	// users are the ids of active snapshots and views, by chain, and the way back.
	users map[Name]map[string]bool
	byID  map[string]Name
}

// ImageSuffix ends the names of chain images.
const ImageSuffix = ".erofs"

// Options say where a cache lives and what it is made from.
type Options struct {
	// Images holds the images, Staging what is being written, on the same file system, and Mounts the mount points.
	Images, Staging, Mounts string
	// Merge gives the tree of a chain of layers.
	Merge func(context.Context, []content.LayerID) (*tree.Node, error)
	// Digests gives fs-verity's digests of objects; nil when it is off.
	Digests func(context.Context, []content.ObjectID) (map[content.ObjectID]verity.Digest, error)
	// Background runs fn, with a ctx that ends when the daemon stops, and reports whether it does; Entries counts the
	// entries of a chain's layers.
	Background func(fn func(context.Context)) bool
	Entries    func([]content.LayerID) int64
	// Loop: mount from loop devices only.
	Loop bool
	// Step names points at which a test may end the process; nil for none.
	Step func(name string)
}

// Stats count what has been done since Open.
type Stats struct {
	// Builds are images that were built, and how long that took, one after the other. Rebuilt are those that did not
	// mount.
	Builds    int64
	BuildTime time.Duration
	Rebuilt   int64
}

// Open finds the images that are there. Their users are noted with Use.
func Open(o Options) (*Chains, error) {
	if err := os.MkdirAll(o.Mounts, 0o700); err != nil {
		return nil, fmt.Errorf("create mount directory: %w", err)
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	c := &Chains{
		opts:   o,
		room:   semaphore.NewWeighted(buildRoom),
		builds: map[Name]*build{},
		busy:   map[Name]chan struct{}{},
		sizes:  map[Name]int64{},
		users:  map[Name]map[string]bool{},
		byID:   map[string]Name{},
	}
	names, err := c.List()
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		if err := c.measure(n); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// MountPoint is where a chain's image is mounted while it is used, Image its file.
func (c *Chains) MountPoint(n Name) string { return filepath.Join(c.opts.Mounts, n.Hex()) }
func (c *Chains) Image(n Name) string      { return filepath.Join(c.opts.Images, n.Hex()+ImageSuffix) }

// Use notes that a snapshot may be mounted over a chain.
func (c *Chains) Use(n Name, id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users[n] == nil {
		c.users[n] = map[string]bool{}
	}
	c.users[n][id] = true
	c.byID[id] = n
}

// Unuse takes a snapshot's use back. orphaned tells that it was the last: the caller releases the
// chain. busy tells that it would have to wait for somebody who builds it.
func (c *Chains) Unuse(id string) (n Name, orphaned, busy bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.byID[id]
	if !ok {
		return n, false, false
	}
	delete(c.byID, id)
	delete(c.users[n], id)
	if len(c.users[n]) > 0 {
		return n, false, false
	}
	delete(c.users, n)
	return n, true, c.busy[n] != nil
}

// IsUsed tells whether a snapshot may be mounted over a chain, or somebody is busy with it.
func (c *Chains) IsUsed(n Name) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users[n]) > 0 || c.busy[n] != nil
}

// Release unmounts a chain that has no users.
func (c *Chains) Release(ctx context.Context, n Name) error {
	return c.ifUnused(ctx, n, func() error { return c.unmount(n) })
}

// ifUnused calls fn for a chain that has no users, while nobody else is busy with it.
func (c *Chains) ifUnused(ctx context.Context, n Name, fn func() error) error {
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	c.mu.Lock()
	used := len(c.users[n]) > 0
	c.mu.Unlock()
	if used {
		return nil
	}
	return fn()
}

// acquire waits until nobody else is busy with a chain, and returns how to let go.
func (c *Chains) acquire(ctx context.Context, n Name) (release func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.busy[n] != nil {
		done := c.busy[n]
		c.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			err = fmt.Errorf("wait for chain image %s: %w", n, context.Cause(ctx))
		}
		c.mu.Lock()
		if err != nil {
			return nil, err
		}
	}
	done := make(chan struct{})
	c.busy[n] = done
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.busy, n)
		close(done)
	}, nil
}

func (c *Chains) buildLocked(ctx context.Context, n Name, chain []content.LayerID) (err error) {
	if c.HasImage(n) && c.isHashed(n) {
		return nil
	}
	start := time.Now()
	root, err := c.opts.Merge(ctx, chain)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	f, err := os.CreateTemp(c.opts.Staging, "chain-")
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("build chain image: %w", err), os.Remove(f.Name()))
		}
	}()
	err = c.write(ctx, f, root)
	// A torn image would mount and show wrong metadata, so its bytes come before its name.
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil && c.opts.Digests != nil {
		err = verity.EnablePath(f.Name())
	}
	if err != nil {
		return err
	}
	c.opts.Step("chain.staged")
	if err := os.Rename(f.Name(), c.Image(n)); err != nil {
		return err
	}
	c.opts.Step("chain.renamed")
	c.change(func(s *Stats) {
		s.Builds++
		s.BuildTime += time.Since(start)
	})
	return c.measure(n)
}

// measure notes what an image occupies, also one that is gone.
func (c *Chains) measure(n Name) error {
	var st unix.Stat_t
	err := unix.Stat(c.Image(n), &st)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("measure chain image: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.sizes[n]; ok {
		c.used.Bytes -= old
		c.used.Inodes--
		delete(c.sizes, n)
	}
	if err == nil {
		c.sizes[n] = st.Blocks * 512
		c.used.Bytes += c.sizes[n]
		c.used.Inodes++
	}
	return nil
}

func (c *Chains) change(fn func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(&c.stats)
}

// Stats returns the counts at this moment.
func (c *Chains) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// Size returns what a chain's image occupies; false when there is none.
func (c *Chains) Size(n Name) (bytes int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	bytes, ok = c.sizes[n]
	return bytes, ok
}

// HasImage reports whether a chain has an image.
func (c *Chains) HasImage(n Name) bool {
	_, err := os.Stat(c.Image(n))
	return err == nil
}

// Usage is what all images occupy.
func (c *Chains) Usage() layer.Usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

// Ensure makes sure that a chain is mounted.
func (c *Chains) Ensure(ctx context.Context, chain []content.LayerID) error {
	n := c.Name(chain)
	if !c.isBuilding(n) {
		done, err := c.acquire(ctx, n)
		if err != nil {
			return err
		}
		mounted := c.IsMounted(n)
		if done(); mounted {
			return nil
		}
	}
	if err := c.Build(ctx, chain); err != nil {
		return err
	}
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	if c.IsMounted(n) {
		return nil
	}
	if err := c.buildLocked(ctx, n, chain); err != nil { // it may have been dropped again
		return err
	}
	err = c.mountImage(n)
	if err == nil {
		return nil
	}
	// Whatever is wrong with the image, a new one costs less than finding out.
	c.change(func(s *Stats) { s.Rebuilt++ })
	log.G(ctx).WithError(err).Warnf("chain image %s does not mount: building it again", n)
	if err := os.Remove(c.Image(n)); err != nil {
		return fmt.Errorf("remove chain image: %w", err)
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return err
	}
	return c.mountImage(n)
}

// List returns the chains that have an image or a mount point.
func (c *Chains) List() ([]Name, error) {
	seen := map[Name]bool{}
	var names []Name
	for _, dir := range []string{c.opts.Images, c.opts.Mounts} {
		files, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list chain images: %w", err)
		}
		for _, f := range files {
			sum, err := content.ParseSum(strings.TrimSuffix(f.Name(), ImageSuffix))
			n := Name{sum}
			if err == nil && !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	return names, nil
}

// Drop removes the image and the mount of a chain that no snapshot has.
func (c *Chains) Drop(ctx context.Context, n Name) error {
	return c.ifUnused(ctx, n, func() error {
		err := os.Remove(c.Image(n))
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		c.opts.Step("chain.dropped")
		return errors.Join(err, c.measure(n), c.unmount(n))
	})
}
