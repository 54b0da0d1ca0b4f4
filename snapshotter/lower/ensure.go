package lower

import (
	"context"
	"errors"

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
func (c *Chains) IsMounted(n Name) bool { return c.mounts.isMounted(n) }

// Ensure makes sure that a chain is mounted.
func (c *Chains) Ensure(ctx context.Context, chain []content.LayerID, f Flavour) (below Below, err error) {
	n := c.Name(chain, f)
	if !c.builds.has(n) {
		done, err := c.Users.acquire(ctx, n)
		if err != nil {
			return below, err
		}
		below, mounted := c.mounts.mounted(n)
		if done(); mounted {
			return below, nil
		}
	}
	if err := c.Build(ctx, chain, f); err != nil {
		return below, err
	}
	done, err := c.Users.acquire(ctx, n)
	if err != nil {
		return below, err
	}
	defer done()
	if below, mounted := c.mounts.mounted(n); mounted {
		return below, nil
	}
	if err := c.buildLocked(ctx, n, chain); err != nil { // it may have been dropped again
		return below, err
	}
	if below, mounted := c.mounts.mounted(n); mounted {
		return below, nil
	}
	if err := unmountAll(c.MountPoint(n)); err != nil { // a pack may be mounted no more
		return below, err
	}
	below, err = c.mount(ctx, n)
	if err == nil || isShort(err) {
		return below, err
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
	if err := c.Images.remove(n); err != nil {
		return below, err
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return below, err
	}
	return c.mount(ctx, n)
}

// PackMounts is how many packs are mounted.
func (c *Chains) PackMounts() int { return c.mounts.packs.count() }
