package erofs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// sitePackages is a tree like that of a Python image: 39 % of the files are small
// enough to lie in the image, and rows of them have mtimes of their own.
func sitePackages(entries int) *tree.Node {
	rnd := rand.New(rand.NewPCG(1, 2))
	var packages []*tree.Node
	for n := 0; n < entries; {
		var files []*tree.Node
		for i := range 5 + rnd.IntN(30) {
			e := &content.Entry{Kind: content.Regular, Mode: 0o644, Mtime: content.Time{Sec: 315_532_800}}
			if rnd.IntN(5) == 0 {
				e.Mtime.Sec += int64(rnd.IntN(1000))
			}
			if e.Size = rnd.Int64N(100_000); rnd.IntN(100) < 39 {
				e.Data = text(rnd.IntN(600), i)
				e.Size = int64(len(e.Data))
			} else {
				e.Object = content.ObjectID{Sum: sha256.Sum256(fmt.Append(nil, n))}
			}
			files = append(files, leaf(fmt.Sprintf("module_%d.cpython-311.pyc", i), e))
			n++
		}
		packages = append(packages, dir(fmt.Sprintf("package_%d", n), files...))
		n++
	}
	return dir("", packages...)
}

func BenchmarkWrite(b *testing.B) {
	const entries = 60_000
	root := sitePackages(entries)
	var length int64
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if length, err = WriteChain(b.Context(), io.Discard, root, options(root, coarse)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(length)/entries, "image-B/entry")
}

// BenchmarkWriteChain makes images over 20 packs in both flavours. peak-MB is the most that the heap held at a time,
// tree included.
func BenchmarkWriteChain(b *testing.B) {
	const entries = 60_000
	root := sitePackages(entries)
	places, packs := placesOf(root, 20)
	for _, redirect := range []bool{false, true} {
		b.Run(fmt.Sprintf("redirect=%v", redirect), func(b *testing.B) {
			o := Options{Redirect: redirect, Place: placeIn(places)}
			for i := range packs {
				o.Packs = append(o.Packs, packs[i].Device())
			}
			var length int64
			b.ReportAllocs()
			runtime.GC()
			stop := watchHeap(b)
			for b.Loop() {
				var err error
				if length, err = WriteChain(b.Context(), io.Discard, root, o); err != nil {
					b.Fatal(err)
				}
			}
			stop()
			b.ReportMetric(float64(length)/entries, "image-B/entry")
		})
	}
}

// placesOf puts the payloads of a tree into packs, in turn.
func placesOf(root *tree.Node, n int) (places map[content.ObjectID]content.Place, packs []Pack) {
	packs = make([]Pack, n)
	for i := range packs {
		packs[i] = Pack{ID: content.PackID(1000 + i), Meta: 1}
	}
	places = map[content.ObjectID]content.Place{}
	var walk func(*tree.Node)
	walk = func(node *tree.Node) {
		if e := node.Entry; dataless(e) {
			p := &packs[len(places)%n]
			p.Slots = append(p.Slots, Slot{ID: e.Object, Offset: int64(p.Meta) * blockSize, Size: e.Size})
			p.Meta += uint32(coarse.count(e.Size))
			places[e.Object] = p.Place(uint32(len(p.Slots) - 1))
		}
		for _, child := range node.Children {
			walk(child)
		}
	}
	walk(root)
	for i := range packs {
		packs[i].Blocks = packs[i].Meta
	}
	return places, packs
}

// BenchmarkAppend fills packs with payloads of 12 KiB, and one in a hundred of 1 MiB, from two goroutines.
func BenchmarkAppend(b *testing.B) {
	small, large := pattern("small", 12<<10), pattern("large", 1<<20)
	const payloads = 20_000
	var length int64
	b.ReportAllocs()
	for b.Loop() {
		f, err := os.CreateTemp(b.TempDir(), "pack")
		if err != nil {
			b.Fatal(err)
		}
		w := NewPackWriter(f, 1, false)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for i := range payloads / 2 {
					data := small
					if i%100 == 0 {
						data = large
					}
					if _, err := w.Append(content.ObjectID{Sum: content.Sum{1}}, data); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		p, err := w.Seal()
		if err != nil {
			b.Fatal(err)
		}
		length = int64(p.Blocks) * blockSize
		if err := errors.Join(f.Close(), os.Remove(f.Name())); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(length)
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/payloads, "ns/payload")
}

// BenchmarkOpenPack reads a pack of 20,000 payloads.
func BenchmarkOpenPack(b *testing.B) {
	p := Pack{ID: 1, Meta: 1}
	for range 20_000 {
		at := int64(p.Meta) * blockSize
		p.Slots = append(p.Slots, Slot{ID: content.ObjectID{Sum: content.Sum{1}}, Offset: at, Size: 5000})
		p.Meta += 2
	}
	super, tail, err := p.encodeTail()
	if err != nil {
		b.Fatal(err)
	}
	img := append(append(super, make([]byte, int64(p.Meta-1)*blockSize)...), tail...)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := OpenPack(bytes.NewReader(img), int64(len(img))); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCheckChain looks at an image of 60,000 entries over 20 packs.
func BenchmarkCheckChain(b *testing.B) {
	root := sitePackages(60_000)
	places, packs := placesOf(root, 20)
	o := Options{Redirect: true, Place: placeIn(places)}
	byID := map[content.PackID]*Pack{}
	for i := range packs {
		byID[packs[i].ID] = &packs[i]
		o.Packs = append(o.Packs, packs[i].Device())
	}
	var img bytes.Buffer
	if _, err := WriteChain(b.Context(), &img, root, o); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		r := bytes.NewReader(img.Bytes())
		_, err := CheckChain(b.Context(), r, r.Size(), func(id content.PackID) *Pack { return byID[id] })
		if err != nil {
			b.Fatal(err)
		}
	}
}
