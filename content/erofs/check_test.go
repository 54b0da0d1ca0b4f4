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

func TestCheckChain(t *testing.T) {
	sizes := make([]int, 300)
	for i := range sizes {
		sizes[i] = 641 + 37*i
	}
	a, b := writePack(t, 21, sizes...), writePack(t, 22, packSizes...)
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
			if again := (Options{Packs: o.Packs, Redirect: redirect, Place: placeIn(places)}); !bytes.Equal(img,
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
				{"a payload is elsewhere", other(func(p *Pack) { p.Slots[7].Offset += blockSize }), "where no payload does"},
				{"a payload is gone", other(func(p *Pack) { p.Slots[7] = Slot{} }), "where no payload does"},
				{"a payload has another size", other(func(p *Pack) { p.Slots[7].Size-- }), "bytes, its payload 7"},
			} {
				err := checkOver(t, img, c.packs...)
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: %v", c.name, err)
				}
			}
			if redirect {
				swapped := other(func(p *Pack) { p.Slots[7], p.Slots[8] = p.Slots[8], p.Slots[7] })
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
func TestCheckChainFindsDamage(t *testing.T) {
	p := writePack(t, 21, packSizes...)
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
func smallChain(f *testing.F) ([]byte, *Pack) {
	id := func(name string) content.ObjectID { return idOf([]byte(name)) }
	p := &Pack{ID: 3, Meta: 9, Slots: []Slot{
		{id("a"), blockSize, 700}, {}, {id("b"), 2 * blockSize, 4096}, {id("c"), 3 * blockSize, 20_000},
	}}
	if _, _, err := p.encodeTail(); err != nil {
		f.Fatal(err)
	}
	root := dir("")
	o := Options{Redirect: true, Packs: []Device{p.Device()}, Place: func(id content.ObjectID) (content.Place, bool) {
		n := slices.IndexFunc(p.Slots, func(s Slot) bool { return s.ID == id })
		return p.Place(uint32(n)), true
	}}
	for n, s := range p.Slots {
		if s.Size > 0 {
			e := &content.Entry{Kind: content.Regular, Size: s.Size, Object: s.ID}
			root.Children = append(root.Children, leaf(slotName(uint32(n)), e))
		}
	}
	var b bytes.Buffer
	if _, err := WriteChain(f.Context(), &b, nested(root), o); err != nil {
		f.Fatal(err)
	}
	if err := checkOver(f, b.Bytes(), p); err != nil {
		f.Fatal(err)
	}
	return b.Bytes(), p
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
	img, p := smallChain(f)
	for at := superOffset; at < len(img); at += 4 { // all numbers once
		f.Add(append(le.AppendUint16(nil, uint16(at)), 1))
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		b := patched(img, edits)
		reseal(b)
		if err := checkOver(t, b, p); err != nil && !errors.Is(err, ErrDamaged) {
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
	img, _ := smallChain(f)
	f.Add([]byte{}, uint16(len(img)), true)
	f.Fuzz(func(t *testing.T, edits []byte, length uint16, whole bool) {
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
