package lower

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Below is what lies below a container: a mounted chain image, and the packs that it lies over, if it is a shared
// one.
type Below struct {
	Chain string
	Packs []string
}

// IsMounted reports whether a chain's image is mounted where its users look for it.
func (c *Chains) IsMounted(n Name) bool { return isErofs(c.MountPoint(n)) }

// Ensure makes sure that a chain is mounted.
func (c *Chains) Ensure(ctx context.Context, chain []content.LayerID, f Flavour) (below Below, err error) {
	n := c.Name(chain, f)
	if !c.isBuilding(n) {
		done, err := c.acquire(ctx, n)
		if err != nil {
			return below, err
		}
		below, mounted := c.mounted(n)
		if done(); mounted {
			return below, nil
		}
	}
	if err := c.Build(ctx, chain, f); err != nil {
		return below, err
	}
	done, err := c.acquire(ctx, n)
	if err != nil {
		return below, err
	}
	defer done()
	if below, mounted := c.mounted(n); mounted {
		return below, nil
	}
	if err := c.buildLocked(ctx, n, chain); err != nil { // it may have been dropped again
		return below, err
	}
	if below, mounted := c.mounted(n); mounted {
		return below, nil
	}
	if err := unmountAll(c.MountPoint(n)); err != nil { // a pack may be mounted no more
		return below, err
	}
	below, err = c.mountLocked(n)
	if err == nil {
		return below, nil
	}
	// Whatever is wrong with the image, a new one costs less than finding out.
	c.change(func(s *Stats) { s.Rebuilt++ })
	log.G(ctx).WithError(err).Warnf("chain image %s does not mount: building it again", n)
	if bad := (packError{}); errors.As(err, &bad) {
		if err := c.opts.Layers.DistrustPack(ctx, bad.id, bad.error); err != nil {
			return below, err
		}
		if err := c.opts.Layers.InService(chain...); err != nil {
			return below, err
		}
	}
	if err := c.remove(n); err != nil {
		return below, err
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return below, err
	}
	return c.mountLocked(n)
}

// mounted tells what lies below who uses a chain, where it is mounted as it should be.
func (c *Chains) mounted(n Name) (Below, bool) {
	if !c.IsMounted(n) {
		return Below{}, false
	}
	im := c.known(n)
	if im == nil || !im.whole || im.damaged || im.shared && !c.packs.areMounted(im.ids()) {
		return Below{}, false
	}
	return c.below(n, im), true
}

// below tells what lies below who uses a chain that is mounted, and has it read ahead.
func (c *Chains) below(n Name, im *image) Below {
	b := Below{Chain: c.MountPoint(n)}
	var files []string
	if im.shared { // of a private image no pack's metadata is needed
		for _, id := range im.ids() {
			b.Packs = append(b.Packs, c.packs.at(id))
			files = append(files, c.packs.path(id))
		}
	}
	if !c.opts.Kernel.Loop { // the cache of a loop device is another
		c.ahead.start(n, c.Image(n), files)
	}
	return b
}

// mountLocked mounts an image, and below it, if it is a shared one, its packs.
func (c *Chains) mountLocked(n Name) (below Below, err error) {
	im := c.known(n)
	if err := unmountView(c, n); err != nil { // it shows the image that was here before
		return below, err
	}
	if err := os.MkdirAll(c.MountPoint(n), 0o700); err != nil {
		return below, fmt.Errorf("create mount point: %w", err)
	}
	c.opts.Step("chain.mounting")
	if im.shared {
		err = c.packs.mount(n, im.devices)
		c.opts.Step("chain.packs")
	}
	if err == nil {
		err = mountImage(c.Image(n), c.MountPoint(n), im.devices, c.packs.path, c.opts.Kernel.Loop)
	}
	c.opts.Step("chain.mounted")
	if err != nil {
		return below, errors.Join(err, c.packs.unmount(n))
	}
	return c.below(n, im), nil
}

func (c *Chains) unmount(n Name) error {
	err := errors.Join(unmountView(c, n), unmountAll(c.MountPoint(n)))
	c.opts.Step("chain.unmounted")
	return errors.Join(err, c.packs.unmount(n))
}

// PackMounts is how many packs are mounted.
func (c *Chains) PackMounts() int { return c.packs.count() }
