package image

import (
	"archive/tar"
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

// DirOptions change a directory's members on their way into a tar.
type DirOptions struct {
	// Map may change a member's header; false leaves it out (for a directory: only
	// itself, not what is below). nil keeps all.
	Map func(h *tar.Header) bool
	// Nanoseconds keeps the full mtime. Docker and BuildKit round down to seconds.
	Nanoseconds bool
}

// WriteDir writes a tar of everything below root, sorted, with owners, xattrs, devices
// and hardlinks. Overlayfs's own xattrs and devices 0/0 become what OCI has for them.
func WriteDir(w io.Writer, root string, opts DirOptions) error {
	d := dirWriter{tw: tar.NewWriter(w), root: root, opts: opts, links: map[[2]uint64]string{}}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return d.add(path)
	})
	if err != nil {
		return fmt.Errorf("write tar of %s: %w", root, err)
	}
	return d.tw.Close()
}

type dirWriter struct {
	tw    *tar.Writer
	root  string
	opts  DirOptions
	links map[[2]uint64]string // dev, ino -> first name
}

func (d *dirWriter) add(path string) error {
	name, err := filepath.Rel(d.root, path)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	h, err := d.header(path, name, &st)
	if err != nil || h == nil {
		return err
	}
	if d.opts.Map != nil && !d.opts.Map(h) {
		return nil
	}
	if err := d.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("write tar header of %s: %w", name, err)
	}
	if h.Typeflag == tar.TypeReg {
		if err := copyFile(d.tw, path, h.Size); err != nil {
			return err
		}
	}
	return d.addOpaque(path, h)
}

// header is nil for what a tar cannot hold (a socket).
func (d *dirWriter) header(path, name string, st *unix.Stat_t) (*tar.Header, error) {
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec), Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	if !d.opts.Nanoseconds {
		h.ModTime = h.ModTime.Truncate(time.Second)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return nil, err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFBLK, unix.S_IFCHR:
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
			h.Typeflag, h.Name = tar.TypeReg, filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name))
			return h, nil
		}
		h.Typeflag = tar.TypeBlock
		if st.Mode&unix.S_IFMT == unix.S_IFCHR {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		if st.Nlink > 1 {
			id := [2]uint64{st.Dev, st.Ino}
			if first, ok := d.links[id]; ok {
				h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
				return h, nil
			}
			d.links[id] = name
		}
	default:
		return nil, nil
	}
	return h, addXattrs(h, path)
}

func addXattrs(h *tar.Header, path string) error {
	names, err := xattrNames(path)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value, err := xattr(path, name)
		if err != nil {
			return err
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
	return nil
}

func (d *dirWriter) addOpaque(path string, h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return nil
	}
	if value, err := xattr(path, "trusted.overlay.opaque"); err != nil || value != "y" {
		return nil
	}
	return d.tw.WriteHeader(&tar.Header{Name: h.Name + ".wh..wh..opq", Typeflag: tar.TypeReg, Mode: 0o600})
}

func xattrNames(path string) ([]string, error) {
	buf := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	return strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 }), nil
}

func xattr(path, name string) (string, error) {
	buf := make([]byte, 64<<10) // XATTR_SIZE_MAX
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil {
		return "", fmt.Errorf("read xattr %s of %s: %w", name, path, err)
	}
	return string(buf[:n]), nil
}

func copyFile(w io.Writer, path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyN(w, f, size); err != nil {
		return fmt.Errorf("copy %s: %w", path, err)
	}
	return nil
}
