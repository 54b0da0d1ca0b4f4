package lower

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// erofsMagic is the kernel's EROFS_SUPER_MAGIC_V1.
const erofsMagic = 0xE0F5E1E2

func isErofs(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && int64(st.Type) == erofsMagic
}

// isOther reports whether a path is on another file system than the directory that it is in.
func isOther(path string) bool {
	var st, above unix.Stat_t
	return unix.Lstat(path, &st) == nil && unix.Lstat(filepath.Dir(path), &above) == nil && st.Dev != above.Dev
}

// unmountAll unmounts the images that are mounted at a path, and removes the path. Who has them mounted elsewhere keeps
// them.
func unmountAll(path string) error { return unmountEach(path, isErofs) }

func unmountEach(path string, mounted func(string) bool) error {
	for mounted(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// source is what images are mounted from.
type source uint8

const (
	files source = iota
	loops
	denseLoops // whose blocks are as small as those of a dense image
)

func from(loop, dense bool) source {
	switch {
	case loop && dense:
		return denseLoops
	case loop:
		return loops
	}
	return files
}

// mountImage mounts an image over its packs.
func mountImage(image, target string, devices []erofs.Device, path func(content.PackID) string, from source) (
	err error,
) {
	options := make([]string, 0, len(devices))
	for _, d := range devices {
		f, err := openPack(path(d.Pack), d)
		if err != nil {
			return err
		}
		defer f.Close()
		// The kernel opens exactly the file that has been looked at, and its name is short: all fit into one page.
		name := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		if from != files {
			l, err := packLoop(f, d.Pack, from)
			if err != nil {
				return err
			}
			defer l.Close()
			name = l.Name()
		}
		options = append(options, "device="+name)
	}
	if n := length(labelled(options)); n > os.Getpagesize() {
		return fmt.Errorf("mount %s: %d bytes of options for %d packs: %w", image, n, len(devices), ErrTooLong)
	}
	if from == files {
		return mountFile(image, target, options)
	}
	return mountLoop(image, target, options)
}

// mountPack mounts a pack by itself.
func mountPack(path, target string, d erofs.Device, loop bool) error {
	f, err := openPack(path, d)
	if err != nil {
		return err
	}
	defer f.Close()
	if !loop {
		return mountFile(path, target, nil)
	}
	// A device of its own: the kernel does not let a file system have one that is part of another.
	return mountLoop(path, target, nil)
}

func mountFile(source, target string, options []string) error {
	return explainMount(source, unix.Mount(source, target, "erofs", unix.MS_RDONLY, strings.Join(labelled(options), ",")))
}

// errNoMount is wrapped when the kernel allows no more mounts.
var errNoMount = errors.New("this machine has too many mounts")

func explainMount(source string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC): // it is not about space, and must not look so
		return fmt.Errorf("mount %s: %w: raise fs.mount-max", source, errNoMount)
	case err != nil:
		return fmt.Errorf("mount %s: %w", source, err)
	}
	return nil
}

// packError is an error about one pack.
type packError struct {
	id content.PackID
	error
}

func (e packError) Unwrap() error { return e.error }

// errOther is wrapped when a pack's file is not the one that a chain image was built for.
var errOther = errors.New("not the pack that the chain image was built for")

// openPack opens a pack's file, and compares it with what a chain image says of it: with fs-verity its digest, else
// its length and the sum in its trailer. A pack that was cut mounts all the same, and then every read fails.
func openPack(path string, d erofs.Device) (_ *os.File, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, packError{d.Pack, fmt.Errorf("open pack %s: %w", path, err)}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := comparePack(f, d); err != nil {
		return nil, packError{d.Pack, errors.Join(fmt.Errorf("pack %s: %w", path, err), f.Close())}
	}
	return f, nil
}

func comparePack(f *os.File, d erofs.Device) error {
	fi, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: it is no regular file", errOther)
	case fi.Size() != int64(d.Blocks)*content.BlockSize:
		return fmt.Errorf("%w: it has %d bytes, and should have %d", errOther, fi.Size(), int64(d.Blocks)*content.BlockSize)
	}
	if digest, err := verity.Measure(int(f.Fd())); err == nil {
		if digest.Hex() != d.Tag {
			return fmt.Errorf("%w: its fs-verity digest is %s", errOther, digest.Hex())
		}
		return nil
	}
	t, err := erofs.ReadTrailer(f, fi.Size())
	switch {
	case err != nil:
		return err
	case t.Pack != d.Pack || t.Sum.Hex() != d.Tag:
		return fmt.Errorf("%w: it says it is %s, with the sum %s", errOther, t.Pack, t.Sum.Hex())
	}
	return nil
}

// isGone reports whether a file is not there.
func isGone(err error) bool { return errors.Is(err, fs.ErrNotExist) }
