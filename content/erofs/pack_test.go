package erofs

import (
	"bytes"
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
func writePack(t *testing.T, unit blocks, id content.PackID, sizes ...int) packed {
	t.Helper()
	data := make([][]byte, len(sizes))
	for i, size := range sizes {
		data[i] = pattern(fmt.Sprintf("%s %d", id, i), size)
	}
	return packOf(t, unit, id, data...)
}

// packOf writes a pack with these payloads.
func packOf(t *testing.T, unit blocks, id content.PackID, payloads ...[]byte) packed {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), id.String()+".erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, id, unit == dense)
	p := packed{path: f.Name(), data: payloads}
	for i, data := range payloads {
		if n, err := w.Append(idOf(data), data); err != nil || int(n) != i {
			t.Fatal(n, err)
		}
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

var packSizes = []int{1, 511, 512, 513, 639, 640, 641, 4095, 4096, 4097, 8192, 100_000, 3 << 20}

func TestPackSaysWhatItHolds(t *testing.T) { forEachUnit(t, testPackSaysWhatItHolds) }

func testPackSaysWhatItHolds(t *testing.T, unit blocks) {
	p := writePack(t, unit, 0x64f0a1b2c3, packSizes...)
	if diff := cmp.Diff(p.Pack, p.open(t)); diff != "" {
		t.Error(diff)
	}
	var sizes []int64
	next := int64(blockSize)
	for n, size := range packSizes {
		if s := p.Slots[n]; s.Offset != next || s.Size != int64(size) {
			t.Errorf("payload %d has %d bytes from %d on, want %d from %d on", n, s.Size, s.Offset, size, next)
		}
		next += Space(int64(size), unit == dense)
		sizes = append(sizes, int64(size))
	}
	if p.Dense != (unit == dense) || int64(p.Meta)*blockSize < next || int64(p.Meta)*blockSize >= next+blockSize {
		t.Errorf("%v, the payloads end at %d, want %d", p.Dense, int64(p.Meta)*blockSize, next)
	}
	if size, err := PackSize(sizes, p.Dense); err != nil || size != int64(p.Blocks)*blockSize {
		t.Errorf("PackSize says %d of a file of %d blocks: %v", size, p.Blocks, err)
	}
}

func TestPackExtents(t *testing.T) { forEachUnit(t, testPackExtents) }

func testPackExtents(t *testing.T, unit blocks) {
	f, err := os.Create(filepath.Join(t.TempDir(), "pack"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 7, unit == dense)
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
	want := []Slot{{idOf(whole), blockSize, 10_000}, {}}
	if diff := cmp.Diff(want, p.Slots); diff != "" {
		t.Error(diff)
	}
}

func TestPackManyWriters(t *testing.T) { forEachUnit(t, testPackManyWriters) }

func testPackManyWriters(t *testing.T, unit blocks) {
	f, err := os.Create(filepath.Join(t.TempDir(), "pack"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 9, unit == dense)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				data := pattern(fmt.Sprint(g, i), 641+(g*i)%9000)
				if err := putSomehow(w, data, i); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	p, err := w.Seal()
	if err != nil {
		t.Fatal(err)
	}
	if n := p.used(); n != 8*(500-100) {
		t.Errorf("%d payloads", n)
	}
	file, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	end := int64(blockSize)
	for n, s := range p.Slots {
		if s == (Slot{}) {
			continue
		}
		if rest := file[s.Offset+s.Size : s.Offset+unit.align(s.Size)]; len(bytes.Trim(rest, "\x00")) > 0 {
			t.Fatalf("slot %d ends with what is not its payload's", n)
		}
		if data, err := w.Read(uint32(n)); err != nil || idOf(data) != s.ID {
			t.Fatalf("slot %d: %v", n, err)
		}
		if s.Offset < end {
			t.Fatalf("slot %d begins at byte %d, where the one before it still is", n, s.Offset)
		}
		end = s.Offset + unit.align(s.Size)
	}
}

// TestSealTellsOfFailedWrites: small payloads are written with later ones, so Append may not know yet.
func TestSealTellsOfFailedWrites(t *testing.T) {
	f, err := os.Open(os.DevNull) // only for reading
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 9, false)
	data := pattern("small", 1000)
	if _, err := w.Append(idOf(data), data); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Seal(); err == nil || !strings.Contains(err.Error(), "write pack 0000000000009") {
		t.Errorf("Seal: %v", err)
	}
}

// TestReadTellsOfFailedWrites: who reads a payload back whose run could not be written gets that error, which says that
// the disk is full, and not the file's end or zeros.
func TestReadTellsOfFailedWrites(t *testing.T) {
	f, err := os.Open(os.DevNull) // only for reading
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, 9, false)
	data := pattern("small", runMost)
	n, err := w.Append(idOf(data), data)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = w.Append(idOf(data), data)
	}
	if _, got := w.Read(n); !errors.Is(got, unix.EBADF) {
		t.Errorf("Read: %v, and Append: %v", got, err)
	}
}

// putSomehow appends or streams a payload, and gives each fifth up.
func putSomehow(w *PackWriter, data []byte, i int) error {
	if i%5 > 1 {
		n, err := w.Append(idOf(data), data)
		if err != nil {
			return err
		}
		got, err := w.Read(n) // it may not be written yet
		if err == nil && !bytes.Equal(got, data) {
			err = fmt.Errorf("slot %d has other bytes than were put", n)
		}
		return err
	}
	e, err := w.Stream(int64(len(data)))
	if err == nil {
		_, err = e.Write(data)
	}
	if err == nil && i%5 == 0 {
		_, err = e.Commit(idOf(data))
	}
	return errors.Join(err, e.Abort()) // which does nothing after Commit
}

// Whatever is changed of a pack but a payload's byte is found.
func TestDamagedPack(t *testing.T) { forEachUnit(t, testDamagedPack) }

func testDamagedPack(t *testing.T, unit blocks) {
	p := writePack(t, unit, 5, packSizes...)
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
		"version":              func(b []byte) []byte { b[len(b)-trailerLen+8]++; return b },
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

// FuzzOpenPack changes packs, and makes their sum right again where that is asked for.
func FuzzOpenPack(f *testing.F) {
	packs := map[bool][]byte{}
	for _, unit := range []blocks{coarse, dense} {
		b := Slot{idOf([]byte("b")), blockSize + unit.align(700), 4096}
		p := Pack{ID: 3, Meta: 3, Dense: unit == dense, Slots: []Slot{{idOf([]byte("a")), blockSize, 700}, {}, b}}
		super, tail, err := p.encodeTail()
		if err != nil {
			f.Fatal(err)
		}
		whole := append(append(super, make([]byte, 2*blockSize)...), tail...)
		packs[p.Dense] = whole
		f.Add([]byte{}, uint16(len(whole)), false, p.Dense)
		for at := len(whole) - trailerLen; at < len(whole)-len(content.Sum{}); at += 4 {
			f.Add(append(le.AppendUint16(nil, uint16(at)), 1), uint16(len(whole)), true, p.Dense)
		}
	}
	f.Fuzz(func(t *testing.T, edits []byte, length uint16, summed, isDense bool) {
		whole := packs[isDense]
		b := patched(whole[:min(int(length), len(whole))], edits)
		if len(b) == len(whole) && summed {
			meta := min(int(le.Uint32(b[len(b)-trailerLen+24:])), len(b)/blockSize-1)
			sum := tailSum(b[:blockSize], b[meta*blockSize:])
			copy(b[len(b)-len(sum):], sum[:])
		}
		p, err := OpenPack(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		for _, s := range p.Slots {
			if s.Size < 0 || s.Size > 0 && s.Offset < blockSize || s.Offset+s.Size > int64(len(b)) {
				t.Errorf("slot outside of the file: %+v", s)
			}
		}
	})
}

func placeIn(places map[content.ObjectID]content.Place) func(content.ObjectID) (content.Place, bool) {
	return func(id content.ObjectID) (content.Place, bool) { p, ok := places[id]; return p, ok }
}

// chainOver is a tree with a file for each payload of packs, and the options of its image.
func chainOver(redirect bool, packs ...packed) (*tree.Node, Options, map[string][]byte) {
	root := &tree.Node{Entry: &content.Entry{Kind: content.Dir, Mode: 0o755}}
	places := map[content.ObjectID]content.Place{}
	want := map[string][]byte{}
	o := Options{Redirect: redirect, Place: placeIn(places)}
	for i, p := range packs {
		o.Dense = o.Dense || p.Dense
		o.Packs = append(o.Packs, p.Device())
		for n, data := range p.data {
			name := fmt.Sprintf("f-%02d-%03d", i, n)
			e := &content.Entry{Kind: content.Regular, Mode: 0o640, UID: 7, GID: 8, Size: int64(len(data))}
			e.Mtime.Sec = 1_600_000_000 + int64(n)
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

func written(t *testing.T, root *tree.Node, o Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := WriteChain(t.Context(), &b, root, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func writeChain(t *testing.T, root *tree.Node, o Options) string {
	t.Helper()
	b := written(t, root, o)
	path := filepath.Join(t.TempDir(), "chain.erofs")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	chain, err := ReadChain(bytes.NewReader(b), int64(len(b)))
	if err != nil || chain.Redirect != o.Redirect || chain.Dense != o.Dense {
		t.Error(err)
	}
	if diff := cmp.Diff(o.Packs, chain.Packs); diff != "" {
		t.Error(diff)
	}
	return path
}

func TestWriteChainRefuses(t *testing.T) {
	p := writePack(t, coarse, 3, 700, 800)
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
		"another size":  {func(root *tree.Node, _ *Options) { root.Children[0].Entry.Size++ }, "and its file 701"},
		"outside of it": {func(_ *tree.Node, o *Options) { o.Packs[0].Blocks = 1 }, "outside of pack"},
	} {
		root, o, _ := chainOver(true, p)
		c.change(root, &o)
		var b bytes.Buffer
		_, err := WriteChain(t.Context(), &b, root, o)
		if err == nil || !strings.Contains(err.Error(), c.want) || b.Len() > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
