package lower

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Name names a chain image: the sha256 over its kind and the ids of its layers, base first.
type Name struct{ content.Sum }

// chainVersion is hashed into every name, so that images of another writer are not taken for
// ours: change it whenever erofs.WriteChain or tree.Merge change what they produce.
const chainVersion = "chain image 2\n"

// What follows the version in names of shared images, and of images with fs-verity. When a setting changes, all
// images of the other kind are nobody's, and go.
const (
	ofShared = "shared\n"
	ofVerity = "fs-verity\n"
)

// Flavour says what an image is mounted under.
type Flavour bool

const (
	// Plain: a container that sees the owners of the image.
	Plain Flavour = false
	// Mapped: one in a user namespace, whose owners containerd maps. It maps directories alone, and data-only layers
	// are none to it, so the image is a private one.
	Mapped Flavour = true
)

// Name names the image of a chain. Where all images are private, both flavours are one.
func (c *Chains) Name(chain []content.LayerID, f Flavour) Name { return c.opts.Kernel.name(chain, f) }

// name names the image that the kernel lets a chain have.
func (k Kernel) name(chain []content.LayerID, f Flavour) (n Name) {
	h := sha256.New()
	h.Write([]byte(chainVersion))
	if k.Shared && f == Plain {
		h.Write([]byte(ofShared))
	}
	if k.NoVerity == nil {
		h.Write([]byte(ofVerity))
	}
	for _, id := range chain {
		h.Write(id.Sum[:])
	}
	h.Sum(n.Sum[:0])
	return n
}

// Options say where a cache lives and what it is made from.
type Options struct {
	// Images holds the images, Staging what is being written, on the same file system, and Mounts the mount points of
	// images, PackMounts those of packs.
	Images, Staging, Mounts, PackMounts string
	// Layers are what chains are made of.
	Layers *layer.Store
	Kernel Kernel
	// Merge gives the tree of a chain; nil is that of Layers.
	Merge func(context.Context, []content.LayerID) (*tree.Node, error)
	// Background runs fn, with a ctx that ends when the daemon stops, and reports whether it does.
	Background func(fn func(context.Context)) bool
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

// Chains is the cache of chain images and their mounts:
//
//	<root>/chains/<64 hex>.erofs   images; each may go at any time and is built again
//	<run>/chains/<64 hex>          their mount points
//	<run>/p/<13 hex>               mount points of the packs of mounted shared images
//
// A mount point stays mounted while an active snapshot or a view uses it: a client may mount what
// it was told at any later time. Containers themselves do not need it, since overlayfs
// clones the mounts below it.
//
// The file of an image holds the packs that it names, so that they stay while it does.
type Chains struct {
	opts  Options
	packs packMounts
	ahead ahead

	mu    sync.Mutex // guards what follows
	stats Stats
	// busy chains are being built, mounted or unmounted; the channel is closed after.
	busy map[Name]chan struct{}
	// images are those on the disk.
	images map[Name]*image
	used   layer.Usage // their sum
	// builds are the images that are being built for callers of Build, watches what moves meanwhile.
	builds  map[Name]*build
	watches map[*watch]bool
	// users are the ids of active snapshots and views, by chain, and the way back.
	users map[Name]map[string]bool
	byID  map[string]Name
}

// image is what is known of a chain image's file.
type image struct {
	bytes int64 // of the disk
	// whole: the file says of itself what follows, and holds these packs.
	whole   bool
	devices []erofs.Device
	shared  bool
	// moved: payloads of its packs have moved to others. It is right, but keeps them. damaged: they were damaged.
	moved, damaged bool
}

func (im *image) ids() (ids []content.PackID) {
	if im.whole {
		for _, d := range im.devices {
			ids = append(ids, d.Pack)
		}
	}
	return ids
}

// ImageSuffix ends the names of chain images.
const ImageSuffix = ".erofs"

// Open finds the images that are there. Their users are noted with Use.
func Open(ctx context.Context, o Options) (*Chains, error) {
	for _, dir := range []string{o.Images, o.Mounts, o.PackMounts} {
		if strings.ContainsAny(dir, ",:\\") {
			return nil, fmt.Errorf("%s has a comma, a colon or a backslash in its name, which mount options cannot say: "+
				"choose another root or run_dir", dir)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("create directory: %w", err)
		}
	}
	c := newChains(o)
	names, err := c.List()
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		if err := c.load(ctx, n); err != nil {
			return nil, err
		}
	}
	return c, c.packs.clear()
}

func newChains(o Options) *Chains {
	if o.Merge == nil {
		o.Merge = o.Layers.Merge
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	return &Chains{
		opts: o,
		packs: packMounts{
			dir: o.PackMounts, path: o.Layers.Packs().Path, loop: o.Kernel.Loop, users: map[content.PackID]map[Name]bool{},
		},
		ahead:  ahead{background: o.Background, busy: map[Name]bool{}},
		busy:   map[Name]chan struct{}{},
		images: map[Name]*image{},
		builds: map[Name]*build{}, watches: map[*watch]bool{},
		users: map[Name]map[string]bool{},
		byID:  map[string]Name{},
	}
}

// PacksOf returns the packs that the images in a directory name, each as often as it is named. An image that cannot
// be read names none: Open removes it.
func PacksOf(images string) (ids []content.PackID, err error) {
	files, err := os.ReadDir(images)
	if err != nil {
		return nil, fmt.Errorf("list chain images: %w", err)
	}
	for _, file := range files {
		f, err := os.OpenFile(filepath.Join(images, file.Name()), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
			devices, _, _ := erofs.ReadChain(f, fi.Size())
			for _, d := range devices {
				ids = append(ids, d.Pack)
			}
		}
		_ = f.Close()
	}
	return ids, nil
}

// load reads what the image of a chain says of itself. One that cannot be mounted again is removed.
func (c *Chains) load(ctx context.Context, n Name) error {
	im, err := c.read(n)
	if isGone(err) {
		return nil
	}
	if err == nil {
		err = c.opts.Layers.Packs().Hold(im.ids())
	}
	if err != nil {
		log.G(ctx).WithError(err).Warnf("chain image %s is of no use any more: removing it", n)
		if err := os.RemoveAll(c.Image(n)); err != nil {
			return fmt.Errorf("remove chain image: %w", err)
		}
		return nil
	}
	c.set(n, im)
	mounted := c.IsMounted(n)
	if im.shared && mounted {
		c.packs.note(n, im.ids())
	}
	if !mounted && c.isStale(n) {
		return c.remove(n)
	}
	return nil
}

// read looks at the file of an image.
func (c *Chains) read(n Name) (*image, error) {
	f, err := os.Open(c.Image(n))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("measure chain image: %w", err)
	}
	im := &image{bytes: st.Blocks * 512, whole: true}
	im.devices, im.shared, err = erofs.ReadChain(f, st.Size)
	return im, err
}

// set notes what the image of a chain is now; nil for none.
func (c *Chains) set(n Name, im *image) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.images[n]; old != nil {
		c.used.Bytes -= old.bytes
		c.used.Inodes--
		delete(c.images, n)
	}
	if im != nil {
		c.images[n] = im
		c.used.Bytes += im.bytes
		c.used.Inodes++
	}
}

// known returns what is known of a chain's image, nil when there is none.
func (c *Chains) known(n Name) *image {
	c.mu.Lock()
	defer c.mu.Unlock()
	if im := c.images[n]; im != nil {
		copied := *im
		return &copied
	}
	return nil
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

// Users returns the ids of the snapshots that may be mounted over what has a mount point, none for any other directory.
func Users(c *Chains, mountPoint string) (ids []string) {
	sum, err := content.ParseSum(filepath.Base(mountPoint))
	n := Name{sum}
	if err != nil || c.MountPoint(n) != mountPoint {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.users[n]))
}

// Release unmounts a chain that has no users. An image whose packs have lost payloads to others goes, too.
func (c *Chains) Release(ctx context.Context, n Name) error {
	return c.ifUnused(ctx, n, func() error {
		err := c.unmount(n)
		if c.isStale(n) {
			err = errors.Join(err, c.remove(n))
		}
		return err
	})
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
	im := c.known(n)
	if im == nil {
		return 0, false
	}
	return im.bytes, true
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

// List returns the chains that have an image or a mount point.
func (c *Chains) List() ([]Name, error) {
	seen := map[Name]bool{}
	var names []Name
	for _, dir := range []string{c.opts.Images, c.opts.Mounts} {
		files, err := os.ReadDir(dir)
		if err != nil && !isGone(err) {
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
		err := c.remove(n)
		c.opts.Step("chain.dropped")
		return errors.Join(err, c.unmount(n))
	})
}

// remove removes the image's file, which gives its packs up.
func (c *Chains) remove(n Name) error {
	im := c.known(n)
	if err := os.RemoveAll(c.Image(n)); err != nil {
		return fmt.Errorf("remove chain image: %w", err)
	}
	if im == nil {
		return nil
	}
	c.set(n, nil)
	return c.opts.Layers.Packs().Release(im.ids())
}
