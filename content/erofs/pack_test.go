package erofs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// packed is a sealed pack with what was put into it.
type packed struct {
	*Pack
	path string
	data [][]byte // by slot
}

// writePack writes a pack with payloads of these sizes, each of other bytes.
func writePack(t *testing.T, id content.PackID, sizes ...int) packed {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), id.String()+".erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, id)
	p := packed{path: f.Name(), data: make([][]byte, len(sizes))}
	for i, size := range sizes {
		data := pattern(fmt.Sprintf("%s %d", id, i), size)
		n, err := w.Append(idOf(data), data)
		if err != nil || int(n) != i {
			t.Fatal(n, err)
		}
		p.data[i] = data
	}
	if p.Pack, err = w.Seal(); err != nil {
		t.Fatal(err)
	}
	return p
}

func pattern(seed string, size int) []byte {
	b := make([]byte, 0, size+64)
	for i := 0; len(b) < size; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", seed, i))
		b = append(b, sum[:]...)
	}
	return b[:size]
}

func idOf(data []byte) content.ObjectID { return content.ObjectID{Sum: sha256.Sum256(data)} }

func (p packed) open(t *testing.T) *Pack {
	t.Helper()
	f, err := os.Open(p.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenPack(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

var packSizes = []int{1, 640, 641, 4095, 4096, 4097, 8192, 100_000, 3 << 20}

func TestPackSaysWhatItHolds(t *testing.T) {
	p := writePack(t, 0x64f0a1b2c3, packSizes...)
	if diff := cmp.Diff(p.Pack, p.open(t)); diff != "" {
		t.Error(diff)
	}
	if p.Slots[0].Block != 1 || p.Slots[1].Block != 2 || p.Slots[5].Block != 6 || p.Slots[6].Block != 8 {
		t.Errorf("payloads do not follow one another: %+v", p.Slots)
	}
}

func TestPackExtents(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "pack"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 7)
	whole, aborted, last := pattern("whole", 10_000), pattern("aborted", 9_000), pattern("last", 5_000)
	stream := func(data []byte) *Extent {
		e, err := w.Stream(int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(data); i += 3000 {
			if _, err := e.Write(data[i:min(i+3000, len(data))]); err != nil {
				t.Fatal(err)
			}
		}
		return e
	}
	a, b, c := stream(whole), stream(aborted), stream(last)
	if _, err := a.Write([]byte{1}); err == nil {
		t.Error("more bytes than were announced are taken")
	}
	n, err := a.Commit(idOf(whole))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := w.Read(n); err != nil || !bytes.Equal(got, whole) {
		t.Error("a committed payload does not read back", err)
	}
	if err := errors.Join(b.Abort(), c.Abort()); err != nil {
		t.Fatal(err)
	}
	short, err := w.Stream(100)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := short.Commit(idOf(nil)); err == nil {
		t.Error("a payload that is cut is committed")
	}
	if _, err := w.Seal(); err == nil {
		t.Error("a pack with an open extent is sealed")
	}
	if err := short.Abort(); err != nil {
		t.Fatal(err)
	}
	p, err := w.Seal()
	if err != nil {
		t.Fatal(err)
	}
	want := []Slot{{idOf(whole), 1, 10_000}, {}}
	if diff := cmp.Diff(want, p.Slots); diff != "" {
		t.Error(diff)
	}
}

func TestPackManyWriters(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "pack"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 9)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				data := pattern(fmt.Sprint(g, i), 641+(g*i)%9000)
				if _, err := w.Append(idOf(data), data); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	p, err := w.Seal()
	if err != nil || len(p.Slots) != 4000 {
		t.Fatal(err, len(p.Slots))
	}
	for n, s := range p.Slots {
		data, err := w.Read(uint32(n))
		if err != nil || idOf(data) != s.ID {
			t.Fatalf("slot %d: %v", n, err)
		}
	}
}

// Whatever is changed of a pack but a payload's byte is found.
func TestDamagedPack(t *testing.T) {
	p := writePack(t, 5, packSizes...)
	whole, err := os.ReadFile(p.path)
	if err != nil {
		t.Fatal(err)
	}
	meta := int(p.Meta) * blockSize
	for name, change := range map[string]func([]byte) []byte{
		"cut by a block":       func(b []byte) []byte { return b[:len(b)-blockSize] },
		"cut by a byte":        func(b []byte) []byte { return b[:len(b)-1] },
		"longer":               func(b []byte) []byte { return append(b, make([]byte, blockSize)...) },
		"empty":                func([]byte) []byte { return nil },
		"superblock":           func(b []byte) []byte { b[1024+40]++; return b },
		"inode":                func(b []byte) []byte { b[meta+160]++; return b },
		"table":                func(b []byte) []byte { b[len(b)-trailerLen-700]++; return b },
		"trailer":              func(b []byte) []byte { b[len(b)-trailerLen+20]++; return b },
		"sum":                  func(b []byte) []byte { b[len(b)-1]++; return b },
		"no superblock":        func(b []byte) []byte { clear(b[:blockSize]); return b },
		"the end is all zeros": func(b []byte) []byte { clear(b[meta:]); return b },
	} {
		b := change(bytes.Clone(whole))
		if _, err := OpenPack(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzOpenPack(f *testing.F) {
	var t testing.T
	p := Pack{ID: 3, Meta: 3, Slots: []Slot{{idOf([]byte("a")), 1, 700}, {}, {idOf([]byte("b")), 2, 4096}}}
	super, tail, err := p.encodeTail()
	if err != nil {
		t.Fatal(err)
	}
	f.Add(append(append(super, make([]byte, 2*blockSize)...), tail...))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := OpenPack(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		for _, s := range p.Slots {
			if s.Size < 0 || int64(s.Block)*blockSize+s.Size > int64(len(b)) {
				t.Errorf("slot outside of the file: %+v", s)
			}
		}
	})
}

// chainOver is a tree with a file for each payload of packs, and the options of its image.
func chainOver(redirect bool, packs ...packed) (*tree.Node, Options, map[string][]byte) {
	root := &tree.Node{Entry: &content.Entry{Kind: content.Dir, Mode: 0o755}}
	places := map[content.ObjectID]content.Place{}
	want := map[string][]byte{}
	o := Options{Redirect: redirect, Place: func(id content.ObjectID) (content.Place, bool) { p, ok := places[id]; return p, ok }}
	for i, p := range packs {
		o.Packs = append(o.Packs, p.Device())
		for n, data := range p.data {
			name := fmt.Sprintf("f-%02d-%03d", i, n)
			e := &content.Entry{Kind: content.Regular, Mode: 0o640, UID: 7, GID: 8, Mtime: content.Time{Sec: 1_600_000_000 + int64(n)}, Size: int64(len(data))}
			if len(data) <= content.InlineMax {
				e.Data = data
			} else {
				e.Object = p.Slots[n].ID
			}
			places[p.Slots[n].ID] = p.Place(uint32(n))
			want[name] = data
			root.Children = append(root.Children, &tree.Node{Name: name, Entry: e})
		}
	}
	return root, o, want
}

func writeChain(t *testing.T, root *tree.Node, o Options) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := WriteChain(context.Background(), &b, root, o); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "chain.erofs")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	devices, redirect, err := ReadChain(bytes.NewReader(b.Bytes()), int64(b.Len()))
	if err != nil || redirect != o.Redirect {
		t.Error(err)
	}
	if diff := cmp.Diff(o.Packs, devices); diff != "" {
		t.Error(diff)
	}
	return path
}

// mountAt mounts for the time of the test, and skips where the kernel cannot.
func mountAt(t *testing.T, source, kind, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	at := t.TempDir()
	flags := uintptr(unix.MS_RDONLY)
	if err := unix.Mount(source, at, kind, flags, options); errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV) {
		t.Skipf("this kernel does not mount %s from files: %v", kind, err)
	} else if err != nil {
		t.Fatalf("mount %s: %v", options, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return at
}

func compareFiles(t *testing.T, root string, want map[string][]byte) {
	t.Helper()
	files, err := os.ReadDir(root)
	if err != nil || len(files) != len(want) {
		t.Errorf("%d files, want %d: %v", len(files), len(want), err)
	}
	for name, data := range want {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(got), len(data), err)
		}
	}
}

func TestKernelReadsPack(t *testing.T) {
	p := writePack(t, 0x64f0a1b2c3, packSizes...)
	at := mountAt(t, p.path, "erofs", "")
	want := map[string][]byte{}
	for n, data := range p.data {
		want[slotName(uint32(n))] = data
	}
	compareFiles(t, filepath.Join(at, p.ID.String()), want)
	many := writePack(t, 1, make([]int, 0)...)
	if len(many.open(t).Slots) != 0 {
		t.Error("an empty pack has slots")
	}
}

// An image over packs shows every byte by itself in both flavours, and through an overlay over the packs in the shared one.
func TestKernelReadsChainOverPacks(t *testing.T) {
	big := make([]int, 700) // a directory of several blocks
	for i := range big {
		big[i] = 641 + i
	}
	packs := []packed{writePack(t, 0x64f0a1b2c3, packSizes...), writePack(t, 0x64f0a1b2c4, big...)}
	for name, redirect := range map[string]bool{"private": false, "shared": true} {
		t.Run(name, func(t *testing.T) {
			root, o, want := chainOver(redirect, packs...)
			var devices []string
			for _, p := range packs {
				devices = append(devices, "device="+p.path)
			}
			at := mountAt(t, writeChain(t, root, o), "erofs", strings.Join(devices, ","))
			compareFiles(t, at, want)
			lower := "lowerdir=" + at
			if redirect {
				for _, p := range packs {
					lower += "::" + mountAt(t, p.path, "erofs", "")
				}
			} else {
				lower += ":" + t.TempDir() // the kernel wants two
			}
			compareFiles(t, mountAt(t, "overlay", "overlay", lower), want)
		})
	}
}

func TestWriteChainRefuses(t *testing.T) {
	p := writePack(t, 3, 700, 800)
	for name, c := range map[string]struct {
		change func(root *tree.Node, o *Options)
		want   string
	}{
		"no place": {func(_ *tree.Node, o *Options) {
			o.Place = func(content.ObjectID) (content.Place, bool) { return content.Place{}, false }
		}, "no pack has the payload"},
		"no such pack":  {func(_ *tree.Node, o *Options) { o.Packs = nil }, "not among the image's"},
		"twice":         {func(_ *tree.Node, o *Options) { o.Packs = append(o.Packs, o.Packs[0]) }, "there twice"},
		"short tag":     {func(_ *tree.Node, o *Options) { o.Packs[0].Tag = "x" }, "tag of 1 bytes"},
		"another size":  {func(root *tree.Node, _ *Options) { root.Children[0].Entry.Size++ }, "has 700 bytes, and its file 701"},
		"outside of it": {func(_ *tree.Node, o *Options) { o.Packs[0].Blocks = 1 }, "outside of pack"},
	} {
		root, o, _ := chainOver(true, p)
		c.change(root, &o)
		var b bytes.Buffer
		if _, err := WriteChain(context.Background(), &b, root, o); err == nil || !strings.Contains(err.Error(), c.want) || b.Len() > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
