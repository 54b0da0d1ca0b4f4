// Package quota limits what a directory may hold, with the project quotas of XFS and ext4. It knows nothing of
// snapshots.
//
// A project is a number that files carry. The kernel counts the blocks of all files of a project, and fails writes
// (ENOSPC on XFS, EDQUOT on ext4) that would pass its limit. What is made in a directory that passes its project on
// belongs to the same one; so a limit for a tree takes a directory that was given a project while it was empty.
//
// There are libraries for this (moby's and containers/storage's), which need cgo, a device node and choose ids by
// themselves. Here everything is asked of an open directory (quotactl_fd, Linux 5.14).
package quota

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Project is a project id; 0 is that of files that have none.
type Project uint32

// Usage is what the kernel knows of a project, in bytes.
type Usage struct {
	Used, Inodes uint64
	Limit        uint64 // 0: none
}

// Idle: nothing is charged to the project, and nothing limits it.
func (u Usage) Idle() bool { return u == Usage{} }

// From linux/quota.h, linux/dqblk_xfs.h and linux/fs.h. The numbers of the two ioctls are those of all machines but
// MIPS, PowerPC and SPARC.
const (
	prjQuota     = 2
	getQuota     = 0x800007
	setQuota     = 0x800008
	getState     = 'X'<<8 + 8 // Q_XGETQSTATV, which all file systems with quotas answer
	limitsOnly   = 1          // QIF_BLIMITS
	blockSize    = 1024       // QIF_DQBLKSIZE
	stateVersion = 1
	counted      = 1 << 4 // FS_QUOTA_PDQ_ACCT
	enforced     = 1 << 5 // FS_QUOTA_PDQ_ENFD

	getAttributes = 0x801c581f // FS_IOC_FSGETXATTR
	setAttributes = 0x401c5820 // FS_IOC_FSSETXATTR
	projInherit   = 0x200      // FS_XFLAG_PROJINHERIT
)

// dqblk is struct if_dqblk.
type dqblk struct {
	blockHard, blockSoft, space, inodeHard, inodeSoft, inodes, blockTime, inodeTime uint64

	valid uint32
	_     uint32
}

// statv is struct fs_quota_statv.
type statv struct {
	version uint8
	_       uint8
	flags   uint16
	_       [156]byte
}

// attributes is struct fsxattr.
type attributes struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

// Probe tells why the file system of dir enforces no project quotas; nil when it does. It needs root.
func Probe(dir string) error {
	st := statv{version: stateVersion}
	err := quotactl(dir, getState, 0, unsafe.Pointer(&st))
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("quotactl_fd is forbidden (a seccomp profile, or SystemCallFilter of the unit): %w", err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ESRCH):
		return errNone
	case err != nil:
		return fmt.Errorf("state of the project quotas of %s: %w", dir, err)
	case st.flags&counted == 0:
		return errNone
	case st.flags&enforced == 0:
		return errors.New("project quotas are counted but not enforced (mount option prjquota is missing)")
	}
	return nil
}

var errNone = errors.New("project quotas are off, or the file system has none")

// Remedy says how a file system comes to enforce project quotas.
const Remedy = "mount the file system of root with prjquota (XFS: in fstab, or rootflags=prjquota for the root file " +
	"system; ext4: unmount it and `tune2fs -O project,quota -Q prjquota DEVICE` first)"

// Look returns what is charged to a project on the file system of dir.
func Look(dir string, p Project) (Usage, error) {
	var q dqblk
	err := quotactl(dir, getQuota, p, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) { // XFS has never heard of it
		return Usage{}, nil
	}
	if err != nil {
		return Usage{}, fmt.Errorf("look at project %d of %s: %w", p, dir, err)
	}
	return Usage{Used: q.space, Inodes: q.inodes, Limit: q.blockHard * blockSize}, nil
}

// Limit sets how many bytes the files of a project may occupy on the file system of dir, rounded up to a KiB; 0 takes
// the limit away.
func Limit(dir string, p Project, bytes uint64) error {
	hard := Rounded(bytes) / blockSize
	q := dqblk{blockHard: hard, blockSoft: hard, valid: limitsOnly}
	if err := quotactl(dir, setQuota, p, unsafe.Pointer(&q)); err != nil {
		return fmt.Errorf("limit project %d of %s: %w", p, dir, err)
	}
	return nil
}

// Rounded is the limit that the kernel keeps.
func Rounded(bytes uint64) uint64 { return (bytes + blockSize - 1) / blockSize * blockSize }

// Of returns the project of a directory.
func Of(dir string) (Project, error) {
	a, err := attributesOf(dir)
	return Project(a.project), err
}

func attributesOf(dir string) (a attributes, err error) {
	err = with(dir, func(fd uintptr) error { return ioctl(fd, getAttributes, &a) })
	if err != nil {
		return a, &fs.PathError{Op: "read the project of", Path: dir, Err: err}
	}
	return a, nil
}

// Assign gives a directory a project, which all that is made in it from now on belongs to.
func Assign(dir string, p Project) error {
	err := with(dir, func(fd uintptr) error { return assign(fd, p, projInherit) })
	if err != nil {
		return &fs.PathError{Op: "set the project of", Path: dir, Err: err}
	}
	return nil
}

// AssignTree is Assign for a directory and all that it holds already: directories and regular files, which is what
// takes space. It begins with the directory, and follows no link out of it.
func AssignTree(dir string, p Project) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		f, err := root.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		var flags uint32
		if d.IsDir() {
			flags = projInherit
		}
		if err := assign(f.Fd(), p, flags); err != nil {
			return &fs.PathError{Op: "set the project of", Path: filepath.Join(dir, path), Err: err}
		}
		return nil
	})
}

// assign gives an open file a project, and flags beside those that it has.
func assign(fd uintptr, p Project, flags uint32) error {
	var a attributes
	if err := ioctl(fd, getAttributes, &a); err != nil {
		return err
	}
	a.project, a.flags = uint32(p), a.flags|flags
	return ioctl(fd, setAttributes, &a)
}

// Rename moves a directory to one beside it, or to another directory of the file system. Where that one passes on a
// project of its own (an operator limits root as a whole), the kernel takes in only what belongs to it.
func Rename(from, to string) error {
	err := os.Rename(from, to)
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	parent, perr := Of(filepath.Dir(to))
	if perr == nil {
		perr = Assign(from, parent)
	}
	if perr != nil {
		return errors.Join(err, perr)
	}
	return os.Rename(from, to)
}

func quotactl(dir string, command int, p Project, data unsafe.Pointer) error {
	return with(dir, func(fd uintptr) error {
		_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, fd, uintptr(command)<<8|prjQuota, uintptr(p), uintptr(data), 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	})
}

func ioctl(fd, request uintptr, a *attributes) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(a))); errno != 0 {
		return errno
	}
	return nil
}

// with opens a directory, and nothing else: what it holds comes from containers.
func with(dir string, do func(fd uintptr) error) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(uintptr(fd))
}
