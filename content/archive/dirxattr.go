package archive

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// xattrSource reads the attributes of one inode.
type xattrSource struct {
	list func(buf []byte) (int, error)
	get  func(name string, buf []byte) (int, error)
}

func fdXattrs(f *os.File) xattrSource {
	fd := int(f.Fd())
	return xattrSource{
		list: func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) },
		get:  func(name string, buf []byte) (int, error) { return unix.Fgetxattr(fd, name, buf) },
	}
}

// nameXattrs is for what cannot be opened. There is no lgetxattrat before Linux
// 6.13; a path through the parent's descriptor does the same.
func nameXattrs(parent *os.File, name string) xattrSource {
	path := fmt.Sprintf("/proc/self/fd/%d/%s", parent.Fd(), name)
	return xattrSource{
		list: func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) },
		get:  func(name string, buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) },
	}
}

// readXattrs fills e.Xattrs with what an image can carry, and returns what
// overlayfs has noted (the names without "trusted.overlay.").
func readXattrs(e *content.Entry, src xattrSource) (marks map[string]string, err error) {
	list, err := readSized(src.list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(list), "\x00"), "\x00") {
		mark, overlay := strings.CutPrefix(name, overlayPrefix)
		if name == "" || !overlay && !keepsXattr(e.Kind, name) {
			continue
		}
		value, err := readSized(func(buf []byte) (int, error) { return src.get(name, buf) })
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if overlay {
			if marks == nil {
				marks = map[string]string{}
			}
			marks[mark] = string(value)
			continue
		}
		e.Xattrs = append(e.Xattrs, content.Xattr{Name: name, Value: value})
	}
	slices.SortFunc(e.Xattrs, func(a, b content.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return marks, checkXattrs(e)
}

// readSized reads a value whose size the kernel tells and may change meanwhile.
func readSized(read func(buf []byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := read(buf)
		if err == nil {
			return buf[:n:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || len(buf) >= 1<<17 {
			return nil, err
		}
		buf = make([]byte, 2*len(buf))
	}
}
