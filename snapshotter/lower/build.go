package lower

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// isCurrent reports whether an image can be mounted as it is.
func (c *Chains) isCurrent(n Name) bool {
	im := c.known(n)
	if im == nil || !im.whole || im.moved || im.damaged || !c.HasImage(n) || !c.isHashed(n) {
		return false
	}
	for _, d := range im.devices { // a pack may have got fs-verity since
		if now, ok := c.opts.Layers.Packs().Device(d.Pack); !ok || now != d {
			return false
		}
	}
	return true
}

// watch is told which packs lose payloads while an image is being built over them.
type watch struct {
	moved, damaged map[content.PackID]bool
}

func (c *Chains) buildLocked(ctx context.Context, n Name, chain []content.LayerID) (err error) {
	if _, mounted := c.mounted(n); mounted || c.isCurrent(n) {
		return nil
	}
	release, err := c.opts.Layers.ReserveChain(ctx, chain)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	defer release()
	start := time.Now()
	root, err := c.opts.Merge(ctx, chain)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	w, end := c.watch()
	defer end()
	placed, err := c.opts.Layers.Places(ctx, root.Objects())
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	held := true
	defer func() {
		if held {
			err = errors.Join(err, placed.Release())
		}
	}()
	path, err := c.stage(ctx, n, chain, root, placed)
	if err != nil {
		return fmt.Errorf("build chain image: %w", err)
	}
	c.opts.Step("chain.staged")
	if err := c.remove(n); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	if err := os.Rename(path, c.Image(n)); err != nil {
		return errors.Join(fmt.Errorf("build chain image: %w", err), os.Remove(path))
	}
	c.opts.Step("chain.renamed")
	im, err := c.read(n)
	if err != nil {
		return fmt.Errorf("read back chain image: %w", err)
	}
	held = false // now the image's file does
	c.set(n, im)
	c.settle(n, w)
	c.change(func(s *Stats) {
		s.Builds++
		s.BuildTime += time.Since(start)
	})
	if !c.IsMounted(n) {
		return nil
	}
	// The old one was of no use. The mounts of its packs stay until the chain is unmounted: who was told of them a
	// moment ago may be about to mount.
	if err := unmountAll(c.MountPoint(n)); err != nil {
		return err
	}
	_, err = c.mountLocked(n)
	return err
}

func (c *Chains) watch() (w *watch, end func()) {
	w = &watch{map[content.PackID]bool{}, map[content.PackID]bool{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watches[w] = true
	return w, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.watches, w)
	}
}

// settle notes what has moved while an image was being built.
func (c *Chains) settle(n Name, w *watch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range c.images[n].devices {
		c.images[n].moved = c.images[n].moved || w.moved[d.Pack]
		c.images[n].damaged = c.images[n].damaged || w.damaged[d.Pack]
	}
}

// stage writes a chain's image under another name.
func (c *Chains) stage(ctx context.Context, n Name, chain []content.LayerID, root *tree.Node, placed *object.Placed) (
	path string, err error,
) {
	f, err := os.CreateTemp(c.opts.Staging, "chain-")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	err = c.write(ctx, f, root, Flavour(n != c.Name(chain, Plain)), placed.Place, placed.Packs())
	// A torn image would mount and show wrong metadata, so its bytes come before its name.
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil && c.opts.Kernel.NoVerity == nil {
		err = verity.EnablePath(f.Name())
	}
	return f.Name(), err
}

// write writes a chain's image. It is a private one where a shared one cannot be: with more packs than fit a mount's
// options, with a file that is named like a pack, or when it is for mapped owners.
func (c *Chains) write(ctx context.Context, to io.Writer, root *tree.Node, flavour Flavour,
	place func(content.ObjectID) (content.Place, bool), packs []erofs.Device,
) error {
	w := bufio.NewWriterSize(to, 1<<20)
	shared := c.opts.Kernel.Shared && flavour == Plain && c.fits(len(packs))
	o := erofs.Options{Place: place, Packs: packs, Redirect: shared}
	_, err := erofs.WriteChain(ctx, w, root, o)
	if errors.Is(err, erofs.ErrPackName) { // it has written nothing
		log.G(ctx).WithError(err).Warn("a chain image shares no memory with others")
		o.Redirect = false
		_, err = erofs.WriteChain(ctx, w, root, o)
	}
	if err != nil {
		return err
	}
	return w.Flush()
}

// fits reports whether an overlay's options have room for so many packs. The rest of them is estimated from above.
func (c *Chains) fits(packs int) bool {
	var n Name
	rest := 2*len(c.MountPoint(n)) + 2*len(c.opts.Images) + 300
	return rest+packs*2*(len(c.packs.at(0))+2) <= maxOptions
}

// Moved notes that packs have lost payloads to others, because they were damaged or merged, and returns the chains
// whose images name them. Those go when they are not mounted any more (DropStale, Release); of damaged ones the next
// container gets a new one.
func (c *Chains) Moved(packs []content.PackID, damaged bool) (stale []Name) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for w := range c.watches {
		for _, id := range packs {
			w.moved[id], w.damaged[id] = true, w.damaged[id] || damaged
		}
	}
	for n, im := range c.images {
		if slices.ContainsFunc(im.devices, func(d erofs.Device) bool { return slices.Contains(packs, d.Pack) }) {
			im.moved, im.damaged = true, im.damaged || damaged
			stale = append(stale, n)
		}
	}
	return stale
}

// DropStale removes the images of chains over old packs that are not mounted.
func (c *Chains) DropStale(ctx context.Context, names []Name) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, c.ifUnused(ctx, n, func() error {
			if c.IsMounted(n) || !c.isStale(n) {
				return nil
			}
			return c.remove(n)
		}))
	}
	return errors.Join(errs...)
}

// isStale reports whether an image keeps packs that nothing else needs.
func (c *Chains) isStale(n Name) bool {
	im := c.known(n)
	return im != nil && (im.moved || im.damaged || slices.ContainsFunc(im.ids(), c.opts.Layers.Packs().Superseded))
}
