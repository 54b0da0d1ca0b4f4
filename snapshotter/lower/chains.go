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
	// Linger is how long a chain stays mounted after its last user has gone.
	Linger time.Duration
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
// A mount point stays mounted while an active snapshot or a view uses it, and for a while after (Leave): a client may
// mount what it was told at any later time. Containers themselves do not need it, since overlayfs clones the mounts
// below it.
//
// The file of an image holds the packs that it names, so that they stay while it does.
//
// Images, Users, mounts and builds each have locks of their own. None of them calls another with its lock held.
type Chains struct {
	opts   Options
	Images *Images
	Users  *Users
	mounts imageMounts
	builds builds

	mu    sync.Mutex // guards what follows
	stats Stats
}

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
	return c, c.mounts.packs.clear()
}

func newChains(o Options) *Chains {
	if o.Merge == nil {
		o.Merge = o.Layers.Merge
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	c := &Chains{
		opts: o,
		Images: &Images{
			dir: o.Images, packs: o.Layers.Packs(), verity: o.Kernel.NoVerity == nil,
			images: map[Name]*image{}, watches: map[*watch]bool{},
		},
		Users: newUsers(),
	}
	c.mounts = imageMounts{
		dir: o.Mounts, images: c.Images, kernel: o.Kernel, step: o.Step,
		packs: packMounts{
			dir: o.PackMounts, path: o.Layers.Packs().Path, loop: o.Kernel.Loop, users: map[content.PackID]map[Name]bool{},
		},
		ahead: ahead{background: o.Background, busy: map[Name]bool{}}, reads: o.Layers.Reads,
	}
	c.builds = builds{background: o.Background, run: c.buildShared, entries: o.Layers.Entries, of: map[Name]*build{}}
	return c
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
			chain, _ := erofs.ReadChain(f, fi.Size())
			for _, d := range chain.Packs {
				ids = append(ids, d.Pack)
			}
		}
		_ = f.Close()
	}
	return ids, nil
}

// load reads what the image of a chain says of itself. One that cannot be mounted again is removed.
func (c *Chains) load(ctx context.Context, n Name) error {
	im, err := c.Images.read(n)
	if isGone(err) {
		return nil
	}
	if err == nil && im.dense && c.opts.Kernel.NoDense != nil {
		err = fmt.Errorf("it has small blocks: %w", c.opts.Kernel.NoDense)
	}
	if err == nil {
		err = c.Images.packs.Hold(im.ids())
	}
	if err != nil {
		log.G(ctx).WithError(err).Warnf("chain image %s cannot be mounted any more: removing it", n)
		if err := os.RemoveAll(c.Images.Path(n)); err != nil {
			return fmt.Errorf("remove chain image: %w", err)
		}
		return nil
	}
	c.Images.set(n, im)
	mounted := c.IsMounted(n)
	if im.shared && mounted {
		c.mounts.packs.note(n, im.ids())
	}
	if !mounted && c.Images.isStale(n) {
		return c.Images.remove(n)
	}
	return nil
}

// MountPoint is where a chain's image is mounted while it is used.
func (c *Chains) MountPoint(n Name) string { return c.mounts.at(n) }

// UsersAt returns the ids of the snapshots that may be mounted over what has a mount point, none for any other
// directory.
func (c *Chains) UsersAt(mountPoint string) (ids []string) {
	sum, err := content.ParseSum(filepath.Base(mountPoint))
	n := Name{sum}
	if err != nil || c.MountPoint(n) != mountPoint {
		return nil
	}
	return c.Users.of(n)
}

// Release unmounts a chain that has no users. An image whose packs have lost payloads to others goes, too.
func (c *Chains) Release(ctx context.Context, n Name) error {
	return c.Users.ifUnused(ctx, n, func() error {
		err := c.unmount(n)
		if c.Images.isStale(n) {
			err = errors.Join(err, c.Images.remove(n))
		}
		return err
	})
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
	return c.Users.ifUnused(ctx, n, func() error {
		err := c.Images.remove(n)
		c.opts.Step("chain.dropped")
		return errors.Join(err, c.unmount(n))
	})
}
