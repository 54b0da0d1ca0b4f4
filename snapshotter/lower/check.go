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
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// Compare tells what is wrong with a chain image; "" when nothing is, or it is gone.
func (c *Chains) Compare(ctx context.Context, n Name, chain []content.LayerID) (problem string, err error) {
	done, err := c.acquire(ctx, n)
	if err != nil {
		return "", err
	}
	defer done()
	have, err := hashUncached(c.Image(n))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "it cannot be read: " + err.Error(), nil
	}
	root, err := c.opts.Merge(ctx, chain)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // its snapshots were removed meanwhile
	}
	if err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	h := sha256.New()
	err = c.write(ctx, h, root)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, layer.ErrDamaged) {
		return "", nil // removed meanwhile, or it is its layers that are damaged
	}
	if err != nil {
		return "", fmt.Errorf("build chain image %s for comparison: %w", n, err)
	}
	if want := content.Sum(h.Sum(nil)); want != have {
		return "its bytes are not what its layers give", nil
	}
	return "", nil
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
	if err := os.RemoveAll(c.Image(n)); err != nil {
		return err
	}
	if err := c.buildLocked(ctx, n, chain); err != nil {
		return err
	}
	if !c.IsMounted(n) {
		return nil
	}
	return errors.Join(c.unmount(n), c.mountImage(n))
}
