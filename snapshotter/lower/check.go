package lower

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// Compare tells what is wrong with a chain image; "" when nothing is, or it is gone. It builds the image once more, over the packs
// that the image names, and compares the bytes: a place that shows other bytes is found as well as a damaged inode.
func (c *Chains) Compare(ctx context.Context, n Name, chain []content.LayerID) (problem string, err error) {
	done, err := c.acquire(ctx, n)
	if err != nil {
		return "", err
	}
	defer done()
	im, err := c.read(n)
	if isGone(err) {
		return "", nil
	}
	if err != nil {
		return err.Error(), nil
	}
	have, err := hashUncached(c.Image(n))
	switch {
	case isGone(err):
		return "", nil
	case err != nil:
		return "it cannot be read: " + err.Error(), nil
	}
	place, err := c.places(im.devices)
	if err != nil {
		return err.Error(), nil
	}
	root, err := c.opts.Layers.Merge(ctx, chain)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, layer.ErrDamaged) {
		return "", nil // its snapshots were removed meanwhile, or it is its layers that are damaged
	}
	if err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	for _, id := range objectsOf(root) {
		if _, ok := place(id); !ok {
			return fmt.Sprintf("no pack that it names has object %s", id), nil
		}
	}
	h := sha256.New()
	if err := c.write(ctx, h, root, place, im.devices); err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	if want := content.Sum(h.Sum(nil)); want != have {
		return "its bytes are not what its layers give", nil
	}
	return "", nil
}

// places finds objects in the tables of packs, each in the newest that has it.
func (c *Chains) places(devices []erofs.Device) (func(content.ObjectID) (content.Place, bool), error) {
	found := map[content.ObjectID]content.Place{}
	for _, d := range devices {
		pack, err := c.openPack(d)
		if err != nil {
			return nil, err
		}
		for i, slot := range pack.Slots {
			if old, ok := found[slot.ID]; slot.Size > 0 && (!ok || old.Pack < pack.ID) {
				found[slot.ID] = pack.Place(uint32(i))
			}
		}
	}
	return func(id content.ObjectID) (content.Place, bool) {
		place, ok := found[id]
		return place, ok
	}, nil
}

func (c *Chains) openPack(d erofs.Device) (*erofs.Pack, error) {
	f, err := openPack(c.packs.path(d.Pack), d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	pack, err := erofs.OpenPack(f, int64(d.Blocks)*content.BlockSize)
	if err != nil {
		return nil, fmt.Errorf("pack %s: %w", f.Name(), err)
	}
	return pack, nil
}

// hashUncached reads a file from the disk, as far as the kernel lets its cached pages go.
func hashUncached(path string) (sum content.Sum, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Rebuild builds a chain image anew and mounts that where the old one is mounted.
func (c *Chains) Rebuild(ctx context.Context, chain []content.LayerID) error {
	n := c.Name(chain)
	done, err := c.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	if err := c.remove(n); err != nil {
		return err
	}
	if err := c.buildLocked(ctx, n, chain); err != nil || !c.IsMounted(n) {
		return err
	}
	if err := unmountAll(c.MountPoint(n)); err != nil {
		return err
	}
	_, err = c.mountLocked(n)
	return err
}
