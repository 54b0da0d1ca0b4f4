package snapshotter

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

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// chainName names a chain image: the sha256 over the ids of its layers, base first.
type chainName struct{ content.Sum }

// chainVersion is hashed into every name, so that images of another writer are not taken for
// ours: change it whenever erofs.Write or tree.Merge change what they produce.
const chainVersion = "chain image 1\n"

// withDigests follows it for images that hold the digests of their objects. When the setting changes, all images of the other kind
// are nobody's, and go.
const withDigests = "fs-verity\n"

// name names the image of a chain.
func (c *chains) name(chain []content.LayerID) (n chainName) {
	h := sha256.New()
	h.Write([]byte(chainVersion))
	if c.digests != nil {
		h.Write([]byte(withDigests))
	}
	for _, id := range chain {
		h.Write(id.Sum[:])
	}
	h.Sum(n.Sum[:0])
	return n
}

// chains is the cache of chain images and their mounts:
//
//	<root>/chains/<64 hex>.erofs   images; each may go at any time and is built again
//	<run>/chains/<64 hex>          mount points
//
// A mount point stays mounted while an active snapshot or a view uses it: a client may mount what
// it was told at any later time. Containers themselves do not need it, since overlayfs
// clones the mounts below it.
type chains struct {
	images, staging, mnt string
	merge                func(context.Context, []content.LayerID) (*tree.Node, error)
	// reserve waits for the memory that a build takes.
	reserve func(context.Context, []content.LayerID) (release func(), err error)
	// digests gives fs-verity's digests of objects; nil when it is off.
	digests  func(context.Context, []content.ObjectID) (map[content.ObjectID]verity.Digest, error)
	counters *counters
	step     func(name string)

	mu sync.Mutex // guards what follows
	// busy chains are being built, mounted or unmounted; the channel is closed after.
	busy map[chainName]chan struct{}
	// sizes are what the images occupy.
	sizes map[chainName]int64
	used  layer.Usage // the sum
	// users are the ids of active snapshots and views, by chain, and the way back.
	users map[chainName]map[string]bool
	byID  map[string]chainName
}

const imageSuffix = ".erofs"

func openChains(images, staging, mnt string, merge func(context.Context, []content.LayerID) (*tree.Node, error), counters *counters) (*chains, error) {
	if err := os.MkdirAll(mnt, 0o700); err != nil {
		return nil, fmt.Errorf("create mount directory: %w", err)
	}
	c := &chains{
		images: images, staging: staging, mnt: mnt, merge: merge, step: func(string) {}, counters: counters,
		busy:  map[chainName]chan struct{}{},
		sizes: map[chainName]int64{},
		users: map[chainName]map[string]bool{},
		byID:  map[string]chainName{},
	}
	names, err := c.list()
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

func (c *chains) mountPoint(n chainName) string { return filepath.Join(c.mnt, n.Hex()) }
func (c *chains) image(n chainName) string      { return filepath.Join(c.images, n.Hex()+imageSuffix) }

// use notes that a snapshot may be mounted over a chain.
func (c *chains) use(n chainName, id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users[n] == nil {
		c.users[n] = map[string]bool{}
	}
	c.users[n][id] = true
	c.byID[id] = n
}

// unuse takes a snapshot's use back. orphaned tells that it was the last: the caller releases the
// chain. busy tells that it would have to wait for somebody who builds it.
func (c *chains) unuse(id string) (n chainName, orphaned, busy bool) {
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

// isUsed tells whether a snapshot may be mounted over a chain, or somebody is busy with it.
func (c *chains) isUsed(n chainName) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users[n]) > 0 || c.busy[n] != nil
}

// release unmounts a chain that has no users.
func (c *chains) release(ctx context.Context, n chainName) error {
	return c.ifUnused(ctx, n, func() error { return c.unmount(n) })
}

// ifUnused calls fn for a chain that has no users, while nobody else is busy with it.
func (c *chains) ifUnused(ctx context.Context, n chainName, fn func() error) error {
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
func (c *chains) acquire(ctx context.Context, n chainName) (release func(), err error) {
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

// build makes sure that a chain's image exists.
func (c *chains) build(ctx context.Context, chain []content.LayerID) error {
	n := c.name(chain)
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	return c.buildLocked(ctx, n, chain)
}

func (c *chains) buildLocked(ctx context.Context, n chainName, chain []content.LayerID) (err error) {
	if c.hasImage(n) && c.isHashed(n) {
		return nil
	}
	release, err := c.reserve(ctx, chain)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	defer release()
	start := time.Now()
	root, err := c.merge(ctx, chain)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	f, err := os.CreateTemp(c.staging, "chain-")
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
	if err == nil && c.digests != nil {
		err = verity.EnablePath(f.Name())
	}
	if err != nil {
		return err
	}
	c.step("chain.staged")
	if err := os.Rename(f.Name(), c.image(n)); err != nil {
		return err
	}
	c.step("chain.renamed")
	c.counters.change(func(s *Stats) {
		s.ChainBuilds++
		s.ChainBuildTime += time.Since(start)
	})
	return c.measure(n)
}

// measure notes what an image occupies, also one that is gone.
func (c *chains) measure(n chainName) error {
	var st unix.Stat_t
	err := unix.Stat(c.image(n), &st)
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

// usage is what all images occupy.
func (c *chains) usage() layer.Usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

// ensure makes sure that a chain is mounted.
func (c *chains) ensure(ctx context.Context, chain []content.LayerID) error {
	n := c.name(chain)
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	if c.isMounted(n) {
		return nil
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return err
	}
	err = c.mountImage(n)
	if err == nil {
		return nil
	}
	// Whatever is wrong with the image, a new one costs less than finding out.
	c.counters.change(func(s *Stats) { s.ChainsRebuilt++ })
	log.G(ctx).WithError(err).Warnf("chain image %s does not mount: building it again", n)
	if err := os.Remove(c.image(n)); err != nil {
		return fmt.Errorf("remove chain image: %w", err)
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return err
	}
	return c.mountImage(n)
}

// erofsMagic is the kernel's EROFS_SUPER_MAGIC_V1.
const erofsMagic = 0xE0F5E1E2

func (c *chains) isMounted(n chainName) bool {
	var st unix.Statfs_t
	return unix.Statfs(c.mountPoint(n), &st) == nil && int64(st.Type) == erofsMagic
}

func (c *chains) mountImage(n chainName) error {
	if err := os.MkdirAll(c.mountPoint(n), 0o700); err != nil {
		return fmt.Errorf("create mount point: %w", err)
	}
	c.step("chain.mounting")
	_, err := mountErofs(c.image(n), c.mountPoint(n))
	c.step("chain.mounted")
	return err
}

// mountErofs mounts an image from its file where the kernel can (6.12), else from a loop device.
func mountErofs(image, target string) (loop bool, err error) {
	err = unix.Mount(image, target, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) {
		m := mount.Mount{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}
		loop, err = true, m.Mount(target)
	}
	if errors.Is(err, unix.ENOSPC) { // it is not about space, and must not look so
		return loop, fmt.Errorf("mount %s: this machine has too many mounts: raise fs.mount-max", image)
	}
	if err != nil {
		return loop, fmt.Errorf("mount %s: %w", image, err)
	}
	return loop, nil
}

func (c *chains) unmount(n chainName) error {
	for c.isMounted(n) {
		if err := unix.Unmount(c.mountPoint(n), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount chain image %s: %w", n, err)
		}
	}
	c.step("chain.unmounted")
	if err := os.Remove(c.mountPoint(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// list returns the chains that have an image or a mount point.
func (c *chains) list() ([]chainName, error) {
	seen := map[chainName]bool{}
	var names []chainName
	for _, dir := range []string{c.images, c.mnt} {
		files, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list chain images: %w", err)
		}
		for _, f := range files {
			sum, err := content.ParseSum(strings.TrimSuffix(f.Name(), imageSuffix))
			n := chainName{sum}
			if err == nil && !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	return names, nil
}

// drop removes the image and the mount of a chain that no snapshot has.
func (c *chains) drop(ctx context.Context, n chainName) error {
	return c.ifUnused(ctx, n, func() error {
		err := os.Remove(c.image(n))
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		c.step("chain.dropped")
		return errors.Join(err, c.measure(n), c.unmount(n))
	})
}
