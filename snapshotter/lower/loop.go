package lower

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// loopLabel begins what a loop device says of itself when it is there for chain images to name, followed by the
// pack's id. One that a pack is mounted from has another: a chain image cannot have it as well. Dense images name
// devices of their own: the others' blocks are too large.
const (
	loopLabel      = "dedup pack "
	denseLoopLabel = "dedup dense pack "
)

// loopTries bounds how often a free loop device is looked for: others may take it first.
const loopTries = 100

// loopControl hands out numbers of free loop devices.
const loopControl = "/dev/loop-control"

// packLoop returns a loop device over a pack's open file, read-only, the same for all chain images of a kind. The
// kernel frees it when the last mount that has it, and the file that is returned, are gone.
func packLoop(pack *os.File, id content.PackID, from source) (*os.File, error) {
	label, size := loopLabel+id.String(), uint32(content.BlockSize)
	if from == denseLoops {
		label, size = denseLoopLabel+id.String(), erofs.DenseBlock
	}
	l, err := findLoop(pack, label)
	if l != nil || err != nil {
		return l, err
	}
	// Direct: the device's own pages are enough. The kernel does without where the file system cannot.
	return newLoop(pack, unix.LoopConfig{
		Size: size, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO, File_name: loopName(label)},
	})
}

// mountLoop mounts an image from a new loop device. The kernel frees it with the mount. It reads the file through the
// page cache: what is read of a chain image is small and lies close together, so the kernel's readahead pays.
func mountLoop(image, target string, options []string) error {
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer f.Close()
	l, err := newLoop(f, unix.LoopConfig{Info: unix.LoopInfo64{File_name: loopName(image)}})
	if err != nil {
		return err
	}
	defer l.Close()
	return explainMount(image, unix.Mount(l.Name(), target, "erofs", unix.MS_RDONLY, strings.Join(labelled(options), ",")))
}

// loopName is what a loop device says of itself, as much of it as fits.
func loopName(label string) (name [unix.LO_NAME_SIZE]uint8) {
	copy(name[:len(name)-1], label)
	return name
}

// newLoop makes a read-only loop device over a file that goes with its last user, also if the daemon is killed.
func newLoop(file *os.File, config unix.LoopConfig) (*os.File, error) {
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return nil, explainLoop(file, err)
	}
	defer control.Close()
	config.Fd = uint32(file.Fd())
	config.Info.Flags |= unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if errors.Is(err, unix.EINVAL) {
			err = unix.ENOSPC // the kernel has no number left
		}
		if err != nil {
			return nil, explainLoop(file, err)
		}
		l, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, explainLoop(file, err)
		}
		err = unix.IoctlLoopConfigure(int(l.Fd()), &config)
		if err == nil {
			return l, nil
		}
		_ = l.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, explainLoop(file, err)
		}
	}
	return nil, explainLoop(file, unix.EBUSY) // others take every free one
}

// errNoLoop is wrapped when no loop device is to be had. The image that wants one is as good as ever. What the kernel
// says is not wrapped: it is neither about a file that is gone nor about room on the disk, and must not look so.
var errNoLoop = errors.New("no loop device")

// explainLoop says what to do where no loop device is to be had.
func explainLoop(file *os.File, err error) error {
	hint := "losetup -a lists who has them"
	switch {
	case errors.Is(err, unix.ENOENT) && strings.Contains(err.Error(), loopControl):
		hint = "load them with `modprobe loop`; in a container, give the daemon the host's /dev"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		hint = "/dev shows no more of them: give the daemon the host's /dev, which is a devtmpfs"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = "the daemon may not use them: run it as root, and in a container as a privileged one"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EBUSY):
		hint = "this machine has no more of them: " + hint
	}
	return fmt.Errorf("%w for %s (%s): %v", errNoLoop, file.Name(), hint, err)
}

// findLoop returns the loop device with a label over an open file, or nil.
func findLoop(pack *os.File, label string) (*os.File, error) {
	var want unix.Stat_t
	if err := unix.Fstat(int(pack.Fd()), &want); err != nil {
		return nil, fmt.Errorf("stat %s: %w", pack.Name(), err)
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(backing)) != pack.Name() {
			continue
		}
		l, err := os.Open("/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file))))
		if err != nil {
			continue // detached meanwhile
		}
		// Open, it stays what it is now.
		info, err := unix.IoctlLoopGetStatus64(int(l.Fd()))
		if err == nil && info.Inode == want.Ino && info.Device == want.Dev &&
			unix.ByteSliceToString(info.File_name[:]) == label {
			return l, nil
		}
		_ = l.Close()
	}
	return nil, nil
}
