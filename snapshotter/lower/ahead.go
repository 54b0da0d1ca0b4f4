package lower

import (
	"context"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// aheadMax bounds what is read ahead of one file, in bytes.
const aheadMax = 16 << 20

// ahead has the kernel read the metadata of an image and of its packs, while a container is made. By itself it reads
// a block when it needs it, and none behind it: on a cold node the first open of a file waits for several of them, one
// after the other.
type ahead struct {
	background func(fn func(context.Context)) bool // see Options

	mu   sync.Mutex
	busy map[Name]bool // those that are being read
}

// start reads the file of an image, and of packs their metadata. It returns at once.
func (a *ahead) start(n Name, image string, packs []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.busy[n] {
		return
	}
	a.busy[n] = a.background(func(ctx context.Context) {
		if err := readMetadata(ctx, image, packs); err != nil {
			log.G(ctx).WithError(err).Debugf("chain image %s is not read ahead", n)
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.busy, n)
	})
}

func readMetadata(ctx context.Context, image string, packs []string) error {
	whole := func(*os.File, int64) (first, length int64, err error) { return 0, aheadMax, nil }
	if err := adviseFile(image, whole); err != nil {
		return err
	}
	for _, pack := range packs {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := adviseFile(pack, packMetadata); err != nil {
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
