// Package verity is fs-verity: the kernel keeps a tree of hashes beside a file's bytes, compares every block that it
// reads from the disk with it, and lets nobody write to the file again. A read of other bytes is EIO, in a program's
// mmap SIGBUS.
//
// A file's digest names its bytes: it is the sha256 of a descriptor that holds the size and the root of the tree. It
// depends on nothing else, so that the same bytes have the same digest on every file system.
package verity

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Digest is fs-verity's digest of a file, with sha256 over blocks of 4 KiB and no salt.
type Digest struct{ content.Sum }

// ErrNone is what Measure returns for a file without.
var ErrNone = errors.New("the file has no fs-verity")

const (
	// SHA256 is linux/fsverity.h's FS_VERITY_HASH_ALG_SHA256, the same in overlayfs's xattr.
	SHA256    = 1
	blockSize = 4096
	hashSize  = 32
	// busyTries bounds how often Enable tries again.
	busyTries = 1000
)

// Enable gives a file that is open for reading fs-verity, and says whether it had none before. Nobody may have it open
// for writing. The file's bytes and the tree are written to the disk, and are not yet sure to survive a power cut.
func Enable(fd int) (enabled bool, err error) {
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: SHA256, Block_size: blockSize}
	for try := 0; ; try++ {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg)))
		switch {
		case errno == 0:
			return true, nil
		case errno == unix.EEXIST:
			return false, nil
		case errno == unix.EINTR:
		case errno == unix.ETXTBSY && try < busyTries:
			// A process that was forked while the file was being written has it open until it calls exec.
			time.Sleep(time.Millisecond)
		default:
			return false, fmt.Errorf("enable fs-verity: %w", errno)
		}
	}
}

// Measure returns the digest of an open file. The kernel knows it once the file is open.
func Measure(fd int) (d Digest, err error) {
	var arg struct {
		unix.FsverityDigest
		digest [64]byte
	}
	arg.Size = uint16(len(arg.digest))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_MEASURE_VERITY, uintptr(unsafe.Pointer(&arg)))
	switch {
	case errno == unix.ENODATA:
		return d, ErrNone
	case errno != 0:
		return d, fmt.Errorf("measure fs-verity: %w", errno)
	case arg.Algorithm != SHA256 || int(arg.Size) != copy(d.Sum[:], arg.digest[:arg.Size]):
		return d, fmt.Errorf("measure fs-verity: %w: algorithm %d with %d bytes", errOther, arg.Algorithm, arg.Size)
	}
	return d, nil
}

// errOther: the file has fs-verity that is not of our making.
var errOther = errors.New("not sha256")

// EnablePath is Enable for a file by its path.
func EnablePath(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	_, err = Enable(fd)
	return errors.Join(err, unix.Close(fd))
}

// Probe tells why files below dir cannot have fs-verity, nil when they can.
func Probe(dir string) error {
	f, err := os.CreateTemp(dir, "verity-")
	if err != nil {
		return err
	}
	_, err = f.WriteString("probe")
	err = errors.Join(err, f.Close())
	if err == nil {
		err = EnablePath(f.Name())
	}
	return errors.Join(err, os.Remove(f.Name()))
}

// Space returns how many bytes of the disk the hashes and the descriptor of a file of this size take on ext4 and f2fs,
// which keep them behind the file's end, in blocks of 4 KiB. btrfs keeps them among its metadata, tightly packed.
func Space(size int64) int64 {
	blocks := (size + blockSize - 1) / blockSize
	total := int64(1) // the descriptor's
	for blocks > 1 {
		blocks = (blocks*hashSize + blockSize - 1) / blockSize
		total += blocks
	}
	return total * blockSize
}
