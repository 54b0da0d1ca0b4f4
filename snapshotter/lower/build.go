package lower

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

func (c *Chains) buildLocked(ctx context.Context, n Name, chain []content.LayerID) (err error) {
	if _, mounted := c.mounts.mounted(n); mounted || c.Images.isCurrent(n) {
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
	w, end := c.Images.watch()
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
	if err := c.Images.remove(n); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	if err := os.Rename(path, c.Images.Path(n)); err != nil {
		return errors.Join(fmt.Errorf("build chain image: %w", err), os.Remove(path))
	}
	c.opts.Step("chain.renamed")
	im, err := c.Images.read(n)
	if err != nil {
		return fmt.Errorf("read back chain image: %w", err)
	}
	held = false // now the image's file does
	c.Images.set(n, im)
	c.Images.settle(n, w)
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
	_, err = c.mount(ctx, n)
	return err
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
	err = c.write(ctx, f, root, Flavour(n != c.Name(chain, Plain)),
		erofs.Options{Place: placed.Place, Packs: placed.Packs(), Dense: placed.Dense()})
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
func (c *Chains) write(ctx context.Context, to io.Writer, root *tree.Node, flavour Flavour, o erofs.Options) error {
	o.Redirect = c.opts.Kernel.Shared && flavour == Plain && c.fits(len(o.Packs))
	_, err := erofs.WriteChain(ctx, to, root, o)
	if errors.Is(err, erofs.ErrPackName) { // it has written nothing
		log.G(ctx).WithError(err).Warn("a chain image is built as a private one, which shares no memory with others")
		o.Redirect = false
		_, err = erofs.WriteChain(ctx, to, root, o)
	}
	return err
}

// fits reports whether an overlay's options have room for so many packs. The rest of them is estimated from above.
func (c *Chains) fits(packs int) bool {
	var n Name
	rest := 2*len(c.MountPoint(n)) + 2*len(c.opts.Images) + 300
	return rest+packs*2*(len(c.mounts.packs.at(0))+2) <= maxOptions
}

// DropStale removes the images of chains over old packs that nobody uses.
func (c *Chains) DropStale(ctx context.Context, names []Name) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, c.Users.ifUnused(ctx, n, func() error {
			if c.IsMounted(n) && !c.Users.IsLeft(n) || !c.Images.isStale(n) {
				return nil
			}
			return errors.Join(c.unmount(n), c.Images.remove(n))
		}))
	}
	return errors.Join(errs...)
}
