package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// checkOver is CheckChain with these packs.
func checkOver(t testing.TB, img []byte, packs ...*Pack) error {
	t.Helper()
	_, err := placesOver(t, img, packs...)
	return err
}

func placesOver(t testing.TB, img []byte, packs ...*Pack) (map[content.ObjectID]content.Place, error) {
	t.Helper()
	return CheckChain(t.Context(), bytes.NewReader(img), int64(len(img)), func(id content.PackID) *Pack {
		if i := slices.IndexFunc(packs, func(p *Pack) bool { return p.ID == id }); i >= 0 {
			return packs[i]
		}
		return nil
	})
}

// nested puts a tree below directories, one of them of several blocks, with links and with xattrs on files and
// directories.
func nested(root *tree.Node) *tree.Node {
	for i, child := range root.Children {
		if i%3 == 0 {
			child.Entry.Xattrs = []content.Xattr{
				{Name: "user.shared", Value: []byte(strings.Repeat("x", 100))}, {Name: "user.own", Value: []byte(child.Name)},
			}
		}
	}
	var many []*tree.Node
	for _, child := range root.Children {
		many = append(many, &tree.Node{Name: child.Name + strings.Repeat("-link", 20), Entry: child.Entry})
	}
	return dir("", dir("a", dir("b", root.Children...), dir("empty")), dir("links", many...))
}

func TestCheckChain(t *testing.T) { forEachUnit(t, testCheckChain) }

func testCheckChain(t *testing.T, unit blocks) {
	sizes := make([]int, 300)
	for i := range sizes {
		sizes[i] = 641 + 37*i
	}
	a, b := writePack(t, coarse, 21, sizes...), writePack(t, unit, 22, packSizes...)
	for name, redirect := range map[string]bool{"private": false, "shared": true} {
		t.Run(name, func(t *testing.T) {
			root, o, _ := chainOver(redirect, a, b)
			img, err := os.ReadFile(writeChain(t, nested(root), o))
			if err != nil {
				t.Fatal(err)
			}
			places, err := placesOver(t, img, a.Pack, b.Pack)
			if err != nil {
				t.Error(err)
			}
			if again := (Options{Packs: o.Packs, Redirect: redirect, Dense: o.Dense, Place: placeIn(places)}); !bytes.Equal(img,
				written(t, nested(root), again)) {
				t.Error("an image over the places that were found is another")
			}
			other := func(change func(*Pack)) []*Pack { return []*Pack{a.Pack, changed(b.Pack, change)} }
			for _, c := range []struct {
				name  string
				packs []*Pack
				want  string
			}{
				{"a pack is missing", []*Pack{a.Pack}, "needs pack"},
				{"a pack has another length", other(func(p *Pack) { p.Blocks++ }), "blocks, which has"},
				{"a payload is elsewhere", other(func(p *Pack) { p.Slots[9].Offset += unit.size() }), "where no payload does"},
				{"a payload is gone", other(func(p *Pack) { p.Slots[9] = Slot{} }), "where no payload does"},
				{"a payload has another size", other(func(p *Pack) { p.Slots[9].Size-- }), "bytes, its payload 9"},
			} {
				err := checkOver(t, img, c.packs...)
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: %v", c.name, err)
				}
			}
			if redirect {
				swapped := other(func(p *Pack) { p.Slots[9], p.Slots[10] = p.Slots[10], p.Slots[9] })
				err := checkOver(t, img, swapped...)
				if err == nil || !strings.Contains(err.Error(), "sends overlayfs to") {
					t.Error("a number that is another payload's: ", err)
				}
			}
		})
	}
}

func changed(p *Pack, change func(*Pack)) *Pack {
	other := *p
	other.Slots = slices.Clone(p.Slots)
	change(&other)
	return &other
}

// Each flipped bit and each cut is found.
func TestCheckChainFindsDamage(t *testing.T) { forEachUnit(t, testCheckChainFindsDamage) }

func testCheckChainFindsDamage(t *testing.T, unit blocks) {
	p := writePack(t, unit, 21, packSizes...)
	root, o, _ := chainOver(true, p)
	whole, err := os.ReadFile(writeChain(t, nested(root), o))
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 3000 {
		b := bytes.Clone(whole)
		at := superOffset + rnd.IntN(len(b)-superOffset) // what lies before is nobody's
		b[at] ^= 1 << rnd.IntN(8)
		if err := checkOver(t, b, p.Pack); !errors.Is(err, ErrDamaged) {
			t.Fatalf("a bit of byte %d is another: %v", at, err)
		}
		cut := rnd.IntN(len(b))
		if err := checkOver(t, whole[:cut], p.Pack); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d bytes: %v", cut, err)
		}
	}
}

// smallChain is an image of a few blocks for fuzzing, over one pack.
func smallChain(f *testing.F, unit blocks) ([]byte, *Pack) {
	id := func(name string) content.ObjectID { return idOf([]byte(name)) }
	b, c := blockSize+unit.align(700), blockSize+unit.align(700)+4096
	p := &Pack{ID: 3, Meta: 9, Dense: unit == dense, Slots: []Slot{
		{id("a"), blockSize, 700}, {}, {id("b"), b, 4096}, {id("c"), c, 20_000},
	}}
	if _, _, err := p.encodeTail(); err != nil {
		f.Fatal(err)
	}
	root := dir("")
	o := Options{Redirect: true, Packs: []Device{p.Device()}, Dense: p.Dense}
	o.Place = func(id content.ObjectID) (content.Place, bool) {
		n := slices.IndexFunc(p.Slots, func(s Slot) bool { return s.ID == id })
		return p.Place(uint32(n)), true
	}
	for n, s := range p.Slots {
		if s.Size > 0 {
			e := &content.Entry{Kind: content.Regular, Size: s.Size, Object: s.ID}
			root.Children = append(root.Children, leaf(slotName(uint32(n)), e))
		}
	}
	var img bytes.Buffer
	if _, err := WriteChain(f.Context(), &img, nested(root), o); err != nil {
		f.Fatal(err)
	}
	if err := checkOver(f, img.Bytes(), p); err != nil {
		f.Fatal(err)
	}
	return img.Bytes(), p
}

// patched returns b with the bytes changed that edits name: offset (2), what to add (1). Editing an image reaches
// more than making one up.
func patched(b, edits []byte) []byte {
	b = bytes.Clone(b)
	for ; len(edits) >= 3 && len(b) > 0; edits = edits[3:] {
		b[int(le.Uint16(edits))%len(b)] += edits[2]
	}
	return b
}

// FuzzCheckChain changes images and makes their checksums right again, so that what is behind them is reached.
func FuzzCheckChain(f *testing.F) {
	images, packs := map[bool][]byte{}, map[bool]*Pack{}
	for _, unit := range []blocks{coarse, dense} {
		img, p := smallChain(f, unit)
		images[p.Dense], packs[p.Dense] = img, p
		for at := superOffset; at < len(img); at += 4 { // all numbers once
			f.Add(append(le.AppendUint16(nil, uint16(at)), 1), p.Dense)
		}
		other := byte(coarse) + byte(dense) - byte(unit) // and the blocks of the other kind
		f.Add(append(le.AppendUint16(nil, superOffset+12), other-byte(unit)), p.Dense)
	}
	f.Fuzz(func(t *testing.T, edits []byte, isDense bool) {
		b := patched(images[isDense], edits)
		reseal(b)
		if err := checkOver(t, b, packs[isDense]); err != nil && !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	})
}

// reseal gives a changed image the checksums that its writer would have given it.
func reseal(b []byte) {
	sb := b[superOffset:]
	unit := blocksOf(blocks(sb[12]) == dense)
	le.PutUint32(sb[superBlocksOff:], uint32(unit.count(int64(len(b)))))
	n := int(le.Uint16(sb[superDevicesOff:]))
	if end := deviceTable + n*deviceSlot + packListLen + 8*n; end <= len(b) {
		list := b[deviceTable+n*deviceSlot:]
		clear(list[packListSum:][:4])
		le.PutUint32(list[packListSum:], packListChecksum(b[deviceTable:end]))
	}
	clear(sb[superUUIDOff:][:16])
	clear(sb[superChecksumOff:][:4])
	sum := sha256.Sum256(b)
	seal(b[:blockSize], unit, sum[:])
}

func FuzzReadChain(f *testing.F) {
	images := map[bool][]byte{}
	for _, unit := range []blocks{coarse, dense} {
		img, p := smallChain(f, unit)
		images[p.Dense] = img
		f.Add([]byte{}, uint16(len(img)), true, p.Dense)
		f.Add(append(le.AppendUint16(nil, superOffset+12), 1), uint16(len(img)), true, p.Dense)
	}
	f.Fuzz(func(t *testing.T, edits []byte, length uint16, whole, isDense bool) {
		img := images[isDense]
		b := patched(img[:min(int(length), len(img))], edits)
		if whole && len(b) >= blockSize {
			reseal(b[:len(b)&^(blockSize-1)])
		}
		chain, err := ReadChain(bytes.NewReader(b), int64(len(b)))
		if err != nil && !errors.Is(err, ErrDamaged) || err == nil && len(chain.Packs)*deviceSlot > len(b) {
			t.Error(len(chain.Packs), err)
		}
	})
}
