package lower

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// aheadMax bounds what is read ahead of one file, in bytes.
const aheadMax = 16 << 20

// readAhead has the kernel read the metadata of an image and of its packs, while a container is made. By itself it
// reads a block when it needs it, and none behind it: on a cold node the first open of a file waits for several of
// them, one after the other. The call returns at once. Loop devices have a cache of their own, which this would not
// fill.
func (c *Chains) readAhead(n Name, im *image) {
	if im == nil || c.opts.Kernel.Loop || !c.beginAhead(n) {
		return
	}
	started := c.opts.Background(func(ctx context.Context) {
		defer c.endAhead(n)
		if err := c.readMetadata(ctx, n, im); err != nil {
			log.G(ctx).WithError(err).Debugf("chain image %s is not read ahead", n)
		}
	})
	if !started {
		c.endAhead(n)
	}
}

// beginAhead reports whether nobody reads a chain's metadata ahead right now.
func (c *Chains) beginAhead(n Name) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aheads[n] {
		return false
	}
	c.aheads[n] = true
	return true
}

func (c *Chains) endAhead(n Name) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.aheads, n)
}

func (c *Chains) readMetadata(ctx context.Context, n Name, im *image) error {
	whole := func(*os.File, int64) (first, length int64, err error) { return 0, aheadMax, nil }
	if err := adviseFile(c.Image(n), whole); err != nil {
		return err
	}
	if !im.shared { // who reads a private image reads no pack's metadata
		return nil
	}
	for _, id := range im.ids() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := adviseFile(c.packs.path(id), packMetadata); err != nil {
			return err
		}
	}
	return nil
}

// packMetadata is where a pack has its inodes and names.
func packMetadata(f *os.File, size int64) (first, length int64, err error) {
	t, err := erofs.ReadTrailer(f, size)
	return t.Metadata, t.MetadataLen, err
}

// adviseFile tells the kernel that a part of a file will be needed soon.
func adviseFile(path string, part func(f *os.File, size int64) (first, length int64, err error)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	first, length, err := part(f, fi.Size())
	if err != nil {
		return err
	}
	if err := unix.Fadvise(int(f.Fd()), first, min(length, aheadMax), unix.FADV_WILLNEED); err != nil {
		return fmt.Errorf("read %s ahead: %w", path, err)
	}
	return nil
}
