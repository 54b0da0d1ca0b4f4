package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is everything that can be seen of one path.
type Entry struct {
	Type  string // "file", "dir", "symlink", "char", "block", "fifo", "socket"
	Mode  uint32 // permission bits, setuid, setgid and sticky
	UID   uint32
	GID   uint32
	Size  int64 // files and symlinks only: a directory's is the file system's business
	MTime time.Time
	Nlink uint64 // 0 for directories, for the same reason
	// Group is the first path, in sorted order, of the hardlinks of a file with more
	// than one; else "".
	Group  string
	Xattrs map[string]string
	Target string // of a symlink
	Rdev   uint64
	SHA256 string // of a file's bytes
}

// Tree is a dump: entries by path, "." being the root itself.
type Tree map[string]Entry

// Dump reads everything below root. It does not follow symlinks, nor cross into other
// mounts that lie below root.
func Dump(root string) (Tree, error) {
	d := dumper{tree: Tree{}, groups: map[[2]uint64]string{}}
	mounts, err := mountPoints()
	if err != nil {
		return nil, err
	}
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if path != root && e.IsDir() && mounts[path] {
			return fs.SkipDir
		}
		return d.add(path, rel)
	})
	if err != nil {
		return nil, fmt.Errorf("dump %s: %w", root, err)
	}
	return d.tree, nil
}

type dumper struct {
	tree   Tree
	groups map[[2]uint64]string // dev, ino -> first path
}

func (d *dumper) add(path, rel string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("lstat %s: %w", rel, err)
	}
	e := Entry{
		Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Nlink: uint64(st.Nlink),
		MTime: time.Unix(st.Mtim.Unix()).UTC(),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type, e.Size = "file", st.Size
		e.SHA256, err = hashFile(path, st.Size)
	case unix.S_IFDIR:
		e.Type, e.Nlink = "dir", 0
	case unix.S_IFLNK:
		e.Type, e.Size = "symlink", st.Size
		e.Target, err = os.Readlink(path)
	case unix.S_IFCHR:
		e.Type, e.Rdev = "char", st.Rdev
	case unix.S_IFBLK:
		e.Type, e.Rdev = "block", st.Rdev
	case unix.S_IFIFO:
		e.Type = "fifo"
	case unix.S_IFSOCK:
		e.Type = "socket"
	}
	if err != nil {
		return err
	}
	if e.Nlink > 1 {
		id := [2]uint64{uint64(st.Dev), st.Ino}
		if _, ok := d.groups[id]; !ok {
			d.groups[id] = rel
		}
		e.Group = d.groups[id]
	}
	if e.Xattrs, err = xattrs(path); err != nil {
		return err
	}
	d.tree[rel] = e
	return nil
}

// hashFile also checks that a file has as many bytes as it says: reads of a truncated
// data layer come back short without an error.
func hashFile(path string, size int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	if n != size {
		return fmt.Sprintf("short: %d of %d bytes, ", n, size) + hex.EncodeToString(h.Sum(nil)), nil
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (map[string]string, error) {
	buf := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	m := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("read xattr %s of %s: %w", name, path, err)
		}
		m[name] = string(value[:n])
	}
	return m, nil
}

func mountPoints() (map[string]bool, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	points := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points[fields[4]] = true
		}
	}
	return points, nil
}
