package erofs

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	goerofs "github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// seen is what one name of a file system shows.
type seen struct {
	Path         string
	Mode         uint32 // with the type
	Nlink        uint64
	UID, GID     uint32
	Major, Minor uint32
	Size         int64 // 0 for directories: how they are stored is free
	Mtime        content.Time
	Xattrs       map[string]string
	Target       string
	Data         string // up to dataMax bytes; none where they are an object's
	SameAs       string // the first path of this inode
}

const dataMax = 8 << 10

// wanted lists what the image of root must show; with objects, what an overlay of
// it must show.
func wanted(root *tree.Node, o objects) []seen {
	var all []seen
	firsts := make(firstNames[*content.Entry])
	links := make(map[string]uint64) // by SameAs
	var walk func(path string, n *tree.Node)
	walk = func(path string, n *tree.Node) {
		s := wantedInode(path, n.Entry, o)
		if n.Entry.Kind == content.Dir {
			links[path] = 2
		} else {
			s.SameAs = firsts.of(n.Entry, path)
			links[s.SameAs]++
		}
		all = append(all, s)
		for _, child := range n.Children {
			if child.Entry.Kind == content.Dir {
				links[path]++
			}
			walk(path+"/"+child.Name, child)
		}
	}
	walk("", root)
	for i := range all {
		all[i].Nlink = links[all[i].SameAs]
	}
	return sorted(all)
}

// wantedInode is what follows from an entry alone.
func wantedInode(path string, e *content.Entry, o objects) seen {
	s := seen{
		Path: path, Mode: e.Mode | uint32(modeType(e.Kind)), UID: e.UID, GID: e.GID, Major: e.Major, Minor: e.Minor,
		Mtime: e.Mtime, Xattrs: make(map[string]string), Target: e.Target, Data: string(e.Data),
		Size: max(e.Size, int64(len(e.Target))), SameAs: path,
	}
	for _, x := range e.Xattrs {
		s.Xattrs[x.Name] = string(x.Value)
	}
	if e.Size > 0 && e.Data == nil {
		if o == nil {
			s.Xattrs["trusted.overlay.metacopy"] = ""
			s.Xattrs["trusted.overlay.redirect"] = "/" + e.Object.Path()
		}
		data := o[e.Object]
		s.Data = string(data[:min(len(data), dataMax)])
	}
	return s
}

func sorted(all []seen) []seen {
	slices.SortFunc(all, func(a, b seen) int { return content.ComparePaths(a.Path, b.Path) })
	return all
}

// firstNames tells the first path of each inode.
type firstNames[K comparable] map[K]string

func (f firstNames[K]) of(inode K, path string) string {
	if first, ok := f[inode]; ok {
		return first
	}
	f[inode] = path
	return path
}

// readGo lists an image through go-erofs.
func readGo(t *testing.T, img []byte) []seen {
	t.Helper()
	fsys, err := goerofs.Open(bytes.NewReader(img))
	if err != nil {
		t.Fatal(err)
	}
	var all []seen
	inodes := make(firstNames[int64])
	var walk func(path string)
	walk = func(path string) {
		s, err := statGo(fsys, path, inodes)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
		if s.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		children, err := fs.ReadDir(fsys, path)
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		for _, c := range children {
			walk(path + "/" + c.Name())
		}
	}
	walk("")
	return sorted(all)
}

func statGo(fsys fs.FS, path string, inodes firstNames[int64]) (seen, error) {
	info, err := fs.Lstat(fsys, path)
	if err != nil {
		return seen{}, fmt.Errorf("%q: %w", path, err)
	}
	st := info.Sys().(*goerofs.Stat)
	s := seen{
		Path: path, Mode: unixMode(st.Mode), Nlink: uint64(st.Nlink), UID: st.UID, GID: st.GID, Size: st.Size,
		Mtime: content.Time{Sec: int64(st.Mtime), Nsec: st.MtimeNs}, Xattrs: make(map[string]string),
		SameAs: inodes.of(st.Ino, path),
		Major:  st.Rdev >> 8 & 0xfff, Minor: st.Rdev&0xff | st.Rdev>>12&0xfff00,
	}
	for name, value := range st.Xattrs {
		// go-erofs puts a dot behind the names of ACLs, which have none.
		s.Xattrs[strings.TrimSuffix(name, ".")] = value
	}
	_, redirected := s.Xattrs["trusted.overlay.redirect"]
	switch {
	case st.Mode.IsDir():
		s.Size = 0
	case st.Mode&fs.ModeSymlink != 0:
		s.Target, err = fs.ReadLink(fsys, path)
	case st.Mode.IsRegular() && !redirected:
		var data []byte
		data, err = fs.ReadFile(fsys, path)
		s.Data = string(data)
	case redirected:
		want := []goerofs.DataRange{{Offset: -1, Size: st.Size}}
		if got := info.(interface{ DataRange() []goerofs.DataRange }).DataRange(); !slices.Equal(got, want) {
			err = fmt.Errorf("%q: data ranges %v, want %v", path, got, want)
		}
	}
	return s, err
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for _, bit := range []struct {
		is   fs.FileMode
		unix uint32
	}{{fs.ModeSetuid, unix.S_ISUID}, {fs.ModeSetgid, unix.S_ISGID}, {fs.ModeSticky, unix.S_ISVTX}} {
		if m&bit.is != 0 {
			mode |= bit.unix
		}
	}
	kinds := map[fs.FileMode]uint32{
		0: unix.S_IFREG, fs.ModeDir: unix.S_IFDIR, fs.ModeSymlink: unix.S_IFLNK, fs.ModeNamedPipe: unix.S_IFIFO,
		fs.ModeSocket: unix.S_IFSOCK, fs.ModeDevice: unix.S_IFBLK, fs.ModeDevice | fs.ModeCharDevice: unix.S_IFCHR,
	}
	return mode | kinds[m.Type()]
}

// readKernel lists what is mounted at dir; readData says which files to read.
func readKernel(t *testing.T, dir string, readData func(seen) bool) []seen {
	t.Helper()
	var all []seen
	inodes := make(firstNames[[2]uint64])
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		s, err := statKernel(path, strings.TrimPrefix(path, dir), inodes)
		if err != nil {
			return err
		}
		if listed := unixMode(d.Type()) & unix.S_IFMT; listed != s.Mode&unix.S_IFMT {
			t.Errorf("%q: listed with type %#o, is %#o", path, listed, s.Mode&unix.S_IFMT)
		}
		if s.Mode&unix.S_IFMT == unix.S_IFREG && readData(s) {
			data := make([]byte, dataMax)
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			n, _ := f.ReadAt(data, 0)
			s.Data = string(data[:n])
			if err := f.Close(); err != nil {
				return err
			}
		}
		all = append(all, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sorted(all)
}

func statKernel(file, path string, inodes firstNames[[2]uint64]) (seen, error) {
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		return seen{}, fmt.Errorf("lstat %q: %w", file, err)
	}
	s := seen{
		Path: path, Mode: st.Mode, Nlink: uint64(st.Nlink), UID: st.Uid, GID: st.Gid, Size: st.Size,
		Major: unix.Major(uint64(st.Rdev)), Minor: unix.Minor(uint64(st.Rdev)),
		Mtime:  content.Time{Sec: int64(st.Mtim.Sec), Nsec: uint32(st.Mtim.Nsec)},
		SameAs: inodes.of([2]uint64{uint64(st.Dev), st.Ino}, path),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		s.Size = 0
	case unix.S_IFLNK:
		if s.Target, err = os.Readlink(file); err != nil {
			return seen{}, err
		}
	}
	s.Xattrs, err = xattrsKernel(file)
	return s, err
}

func xattrsKernel(file string) (map[string]string, error) {
	xattrs := make(map[string]string)
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(file, buf)
	if err != nil {
		return nil, fmt.Errorf("listxattr %q: %w", file, err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(file, name, buf)
		if err != nil {
			return nil, fmt.Errorf("getxattr %q %s: %w", file, name, err)
		}
		xattrs[name] = string(buf[:n])
	}
	return xattrs, nil
}

// compare reports the first few differences; a whole diff of torture is of no use.
func compare(t *testing.T, want, got []seen) {
	t.Helper()
	const few = 5
	shown := 0
	for i := range max(len(want), len(got)) {
		var w, g seen
		if i < len(want) {
			w = want[i]
		}
		if i < len(got) {
			g = got[i]
		}
		if diff := cmp.Diff(w, g); diff != "" {
			t.Errorf("entry %d, %q (-want +got):\n%s", i, w.Path, diff)
			if shown++; shown == few || w.Path != g.Path {
				t.Fatalf("and perhaps more: %d entries wanted, %d found", len(want), len(got))
			}
		}
	}
}

// build writes the image of root.
func build(t testing.TB, root *tree.Node) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := Write(t.Context(), &b, root)
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(b.Len()) || n%blockSize != 0 {
		t.Fatalf("Write says %d bytes, wrote %d", n, b.Len())
	}
	return b.Bytes()
}

// mountImage mounts an image straight from a file, as the snapshotter does.
func mountImage(t *testing.T, img []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.erofs")
	if err := os.WriteFile(file, img, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, "")
	if err == syscall.ENOTBLK {
		t.Skipf("cannot mount a file on the file system of %s: set TMPDIR to one on ext4 or XFS, with Linux 6.12 or newer", file)
	}
	if err != nil {
		t.Fatalf("mount erofs: %v", err)
	}
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

func unmount(t *testing.T, dir string) {
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount %s: %v", dir, err)
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}
