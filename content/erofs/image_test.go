package erofs

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

const dataMax = 128 << 10

// somePack is the pack that all payloads of a test tree are said to lie in.
const somePack content.PackID = 0x64f0a1b2c3

// noPacks are the options of a tree without payloads.
var noPacks = Options{Place: func(content.ObjectID) (content.Place, bool) { return content.Place{}, false }}

// options have every payload of a tree in one pack, one behind the other by number. It is not there.
func options(root *tree.Node, unit blocks) Options {
	places := map[content.ObjectID]content.Place{}
	var walk func(n *tree.Node)
	walk = func(n *tree.Node) {
		if e := n.Entry; e != nil && e.Kind == content.Regular && !e.Object.IsZero() {
			if _, ok := places[e.Object]; !ok {
				places[e.Object] = content.Place{Pack: somePack, N: uint32(len(places)), Offset: blockSize, Size: e.Size}
			}
		}
		for _, c := range n.Children {
			walk(c)
		}
	}
	walk(root)
	o := Options{Redirect: true, Dense: unit == dense}
	o.Place = func(id content.ObjectID) (content.Place, bool) { p, ok := places[id]; return p, ok }
	if len(places) > 0 {
		o.Packs = []Device{{Pack: somePack, Tag: strings.Repeat("0", tagLen), Blocks: 1<<(20+unit) - 1}}
	}
	return o
}

// wanted lists what the image of root must show; with objects, what an overlay of
// it must show.
func wanted(root *tree.Node, o objects) []seen {
	var all []seen
	places := options(root, coarse)
	firsts := make(firstNames[*content.Entry])
	links := make(map[string]uint64) // by SameAs
	var walk func(path string, n *tree.Node)
	walk = func(path string, n *tree.Node) {
		s := wantedInode(path, n.Entry, o, places)
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
	if o == nil && len(places.Packs) > 0 { // the whiteout that hides the pack
		path := "/" + somePack.String()
		all, links[path] = append(all, seen{Path: path, Mode: unix.S_IFCHR, Xattrs: map[string]string{}, SameAs: path}), 1
	}
	for i := range all {
		all[i].Nlink = links[all[i].SameAs]
	}
	return sorted(all)
}

// wantedInode is what follows from an entry alone.
func wantedInode(path string, e *content.Entry, o objects, places Options) seen {
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
			place, _ := places.Place(e.Object)
			s.Xattrs["trusted.overlay.redirect"] = PackPath(place.Pack, place.N)
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

// openGo opens the image of a tree through go-erofs.
func openGo(t *testing.T, root *tree.Node, unit blocks) fs.FS {
	t.Helper()
	var packs []goerofs.OpenOpt
	for range options(root, unit).Packs {
		packs = append(packs, goerofs.WithExtraDevices(bytes.NewReader(nil)))
	}
	fsys, err := goerofs.Open(bytes.NewReader(build(t, root, unit)), packs...)
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

// readGo lists the image of a tree through go-erofs.
func readGo(t *testing.T, root *tree.Node, unit blocks) []seen {
	t.Helper()
	fsys := openGo(t, root, unit)
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
		want := []goerofs.DataRange{{Device: 1, Offset: blockSize, Size: st.Size}}
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
			data := make([]byte, min(s.Size, dataMax))
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

// build writes the image of root, in both ways.
func build(t testing.TB, root *tree.Node, unit blocks) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := WriteChain(t.Context(), &b, root, options(root, unit))
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(b.Len()) || n%blockSize != 0 {
		t.Fatalf("WriteChain says %d bytes, wrote %d", n, b.Len())
	}
	file := writeTemp(t, "once.erofs", nil)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := WriteChain(t.Context(), f, root, options(root, unit)); err != nil {
		t.Fatal(err)
	}
	once, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(once, b.Bytes()) {
		t.Fatalf("made once, the image has other bytes: %v", err)
	}
	return b.Bytes()
}

// mountImage mounts the image of a tree, with a file of a few zeros for its pack.
func mountImage(t *testing.T, way string, root *tree.Node, unit blocks) string {
	t.Helper()
	needRoot(t)
	var packs []packed
	for _, p := range options(root, unit).Packs {
		packs = append(packs, packed{path: writeTemp(t, p.Pack.String(), make([]byte, blockSize))})
	}
	return mountErofs(t, way, writeTemp(t, "image.erofs", build(t, root, unit)), packs...)
}

func writeTemp(t testing.TB, name string, data []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
