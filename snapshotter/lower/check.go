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

// Compare tells what is wrong with a chain image; "" when nothing is, or it is gone. It compares the image with the
// tables of its packs, builds it once more over the same places, and compares the bytes: what shows another payload
// is found as well as a damaged inode.
func (c *Chains) Compare(ctx context.Context, n Name, chain []content.LayerID) (problem string, err error) {
	done, err := c.Users.acquire(ctx, n)
	if err != nil {
		return "", err
	}
	defer done()
	im, err := c.Images.read(n)
	if isGone(err) {
		return "", nil
	}
	if err != nil {
		return err.Error(), nil
	}
	have, places, err := c.inspect(ctx, n, im.devices)
	if ctx.Err() != nil {
		return "", err
	}
	if err != nil {
		return err.Error(), nil
	}
	place := func(id content.ObjectID) (content.Place, bool) { at, ok := places[id]; return at, ok }
	root, err := c.opts.Merge(ctx, chain)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, layer.ErrDamaged) {
		return "", nil // its snapshots were removed meanwhile, or it is its layers that are damaged
	}
	if err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	for _, id := range root.Objects() {
		if _, ok := place(id); !ok {
			return fmt.Sprintf("it does not show object %s", id), nil
		}
	}
	h := sha256.New()
	if err := c.write(ctx, h, root, Flavour(n != c.Name(chain, Plain)),
		erofs.Options{Place: place, Packs: im.devices, Dense: im.dense}); err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	if want := content.Sum(h.Sum(nil)); want != have {
		return "its bytes are not what its layers give", nil
	}
	return "", nil
}

// inspect checks the image of a chain as far as it and the tables of its packs tell. It returns the sum of its bytes,
// and where it shows objects from: where an object is in two packs, only the image says which one it was built over.
func (c *Chains) inspect(ctx context.Context, n Name, devices []erofs.Device) (
	sum content.Sum, places map[content.ObjectID]content.Place, err error,
) {
	f, err := os.Open(c.Images.Path(n))
	if err != nil {
		return sum, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return sum, nil, err
	}
	packs := map[content.PackID]*erofs.Pack{}
	for _, d := range devices {
		if packs[d.Pack], err = c.openPack(d); err != nil {
			return sum, nil, err
		}
	}
	// As far as the kernel lets cached pages go, what follows reads the disk.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	places, err = erofs.CheckChain(ctx, f, fi.Size(), func(id content.PackID) *erofs.Pack { return packs[id] })
	if err != nil {
		return sum, nil, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, nil, fmt.Errorf("read chain image: %w", err)
	}
	h.Sum(sum[:0])
	return sum, places, nil
}

func (c *Chains) openPack(d erofs.Device) (*erofs.Pack, error) {
	f, err := openPack(c.mounts.packs.path(d.Pack), d)
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

// Rebuild builds the image of a chain anew and mounts that where the old one is mounted.
func (c *Chains) Rebuild(ctx context.Context, n Name, chain []content.LayerID) error {
	done, err := c.Users.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	if err := c.Images.remove(n); err != nil {
		return err
	}
	return c.buildLocked(ctx, n, chain)
}
