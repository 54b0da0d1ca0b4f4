package lower

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// loopLabel begins what a loop device says of itself when it is there for chain images to name, followed by the
// pack's id. One that a pack is mounted from has another: a chain image cannot have it as well.
const loopLabel = "dedup pack "

// loopTries bounds how often a free loop device is looked for: others may take it first.
const loopTries = 100

// packLoop returns a loop device over a pack's open file, read-only, the same for all chain images. The kernel frees
// it when the last mount that has it, and the file that is returned, are gone.
func packLoop(pack *os.File, id content.PackID) (*os.File, error) {
	label := loopLabel + id.String()
	l, err := findLoop(pack, label)
	if l != nil || err != nil {
		return l, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device for pack %s (modprobe loop): %w", id, err)
	}
	defer control.Close()
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, explainLoop(id, err)
		}
		l, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, explainLoop(id, err)
		}
		// Direct: the device's own pages are enough. The kernel does without where the file system cannot.
		config := unix.LoopConfig{Fd: uint32(pack.Fd()), Size: content.BlockSize}
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		copy(config.Info.File_name[:len(config.Info.File_name)-1], label)
		err = unix.IoctlLoopConfigure(int(l.Fd()), &config)
		if err == nil {
			return l, nil
		}
		_ = l.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("loop device for pack %s: %w", id, err)
		}
	}
	return nil, fmt.Errorf("loop device for pack %s: others take every free one", id)
}

// explainLoop says what to do where no loop device is to be had.
func explainLoop(id content.PackID, err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("loop device for pack %s: /dev shows no more of them "+
			"(give the daemon the host's /dev, which is a devtmpfs): %w", id, err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOMEM):
		// It is not about room on the disk, and must not look so.
		return fmt.Errorf("loop device for pack %s: this machine has no more of them "+
			"(losetup -a lists who has them): %v", id, err)
	}
	return fmt.Errorf("loop device for pack %s: %w", id, err)
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
