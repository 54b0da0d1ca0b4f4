package erofs

import (
	"bytes"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// forEachUnit runs a test for coarse packs and dense ones, and for the images over them.
func forEachUnit(t *testing.T, f func(t *testing.T, unit blocks)) {
	for name, unit := range map[string]blocks{"coarse": coarse, "dense": dense} {
		t.Run(name, func(t *testing.T) { f(t, unit) })
	}
}

// Everything that an image can hold, over packs of both kinds with all its payloads: each byte, mode, xattr and link is
// the tree's, by the image alone where it is private, and else through an overlay.
func TestKernelReadsTortureOverPacks(t *testing.T) { forEachUnit(t, testKernelReadsTortureOverPacks) }

func testKernelReadsTortureOverPacks(t *testing.T, unit blocks) {
	needRoot(t)
	root, o := torture(unit)
	root = withoutHoles(root, o)
	payloads := [3][][]byte{}
	for _, data := range o {
		n := len(data) % len(payloads)
		payloads[n] = append(payloads[n], data)
	}
	var packs []packed
	places := map[content.ObjectID]content.Place{}
	opts := Options{Dense: unit == dense, Place: placeIn(places)}
	for i, kind := range []blocks{coarse, unit, unit} {
		p := packOf(t, kind, content.PackID(1<<40+i), payloads[i]...)
		for n, s := range p.Slots {
			places[s.ID] = p.Place(uint32(n))
		}
		packs, opts.Packs = append(packs, p), append(opts.Packs, p.Device())
	}
	want := wanted(root, o)
	hasData := map[string]bool{}
	for _, s := range want {
		hasData[s.Path] = s.Data != ""
	}
	for way := range waysToMount {
		for flavour, redirect := range map[string]bool{"private": false, "shared": true} {
			t.Run(flavour+" "+way, func(t *testing.T) {
				opts := opts
				opts.Redirect = redirect
				shown := mountErofs(t, way, writeChain(t, root, opts), packs...)
				if redirect {
					for _, p := range packs {
						shown += "::" + mountErofs(t, way, p.path)
					}
					shown = mountOverlay(t, shown)
				}
				compare(t, want, readKernel(t, shown, func(s seen) bool { return hasData[s.Path] }))
			})
		}
	}
}

// withoutHoles leaves out files whose payloads are not there.
func withoutHoles(n *tree.Node, o objects) *tree.Node {
	with := *n
	with.Children = nil
	for _, child := range n.Children {
		if _, ok := o[child.Entry.Object]; ok || !dataless(child.Entry) {
			with.Children = append(with.Children, withoutHoles(child, o))
		}
	}
	return &with
}

// A dense pack asks for an image with small blocks.
func TestCoarseImageOverDensePack(t *testing.T) {
	refused := func(p packed) error {
		root, o, _ := chainOver(true, p)
		o.Dense = false
		_, err := WriteChain(t.Context(), &bytes.Buffer{}, root, o)
		return err
	}
	err := refused(writePack(t, dense, 3, 700, 800))
	if err == nil || !strings.Contains(err.Error(), "begins at byte 5120 of pack") {
		t.Errorf("an image of large blocks over a payload that begins within one: %v", err)
	}
	// Where payloads begin at its blocks by chance, only the check knows.
	p := writePack(t, dense, 4, 4096, 8192)
	if err := refused(p); err != nil {
		t.Fatal(err)
	}
	root, o, _ := chainOver(true, p)
	o.Dense = false
	if err := checkOver(t, written(t, root, o), p.Pack); !errors.Is(err, ErrDamaged) ||
		!strings.Contains(err.Error(), "larger blocks") {
		t.Error(err)
	}
}

// A coarse pack of more than 2 TiB has more small blocks than EROFS can count: an image that named it would show other
// bytes.
func TestDenseImageOverHugePack(t *testing.T) {
	for name, c := range map[string]struct {
		blocks uint32
		want   string
	}{
		"as many as can be counted": {1<<29 - 1, ""},
		"one more":                  {1 << 29, "more than an image of such blocks can count"},
		"4 TiB":                     {1 << 30, "more than an image of such blocks can count"},
	} {
		e := &content.Entry{Kind: content.Regular, Size: 5000, Object: idOf([]byte("behind"))}
		d := Device{Pack: 7, Tag: strings.Repeat("0", tagLen), Blocks: c.blocks}
		at := content.Place{Pack: 7, Offset: int64(c.blocks-2) * blockSize, Size: 5000}
		o := Options{Dense: true, Packs: []Device{d}, Place: func(content.ObjectID) (content.Place, bool) { return at, true }}
		var img bytes.Buffer
		_, err := WriteChain(t.Context(), &img, dir("", leaf("f", e)), o)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		slot := Slot{ID: e.Object, Offset: at.Offset, Size: 5000}
		p := &Pack{ID: 7, Blocks: c.blocks, Slots: []Slot{slot}}
		if err := checkOver(t, img.Bytes(), p); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A pack takes as much as EROFS can count in its blocks, with room for what it says of itself, and no more.
func TestPackIsFull(t *testing.T) {
	forEachUnit(t, func(t *testing.T, unit blocks) {
		f, err := os.Create(filepath.Join(t.TempDir(), "pack"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		w := NewPackWriter(f, 7, unit == dense)
		most := math.MaxUint32*unit.size() - maxMeta - blockSize
		if _, _, err := w.take(Slot{Size: most + 1}); err == nil {
			t.Error("takes too much")
		}
		slot := Slot{ID: idOf(nil), Size: most - unit.size()}
		if _, _, err := w.take(slot); err != nil {
			t.Fatal(err)
		}
		last := Slot{ID: idOf([]byte("x")), Size: 1}
		if _, last.Offset, err = w.take(last); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Append(idOf([]byte("y")), []byte("y")); err == nil {
			t.Error("is never full")
		}
		p, err := w.Seal()
		if errors.Is(err, unix.EFBIG) {
			t.Skip("no files as large here")
		}
		if err != nil {
			t.Fatal(err)
		}
		slot.Offset = blockSize
		got := packed{Pack: p, path: f.Name()}.open(t)
		if diff := cmp.Diff([]Slot{slot, last}, got.Slots); diff != "" {
			t.Error(diff)
		}
	})
}
