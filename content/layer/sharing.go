package layer

import (
	"context"
	"encoding/binary"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// reports tell what layers have in common and where it comes from, from their trees.
type reports struct {
	*packed
	*catalog
	distinct int // distinctMax, but for tests
}

// distinctMax bounds how many objects a report remembers at a time, at about 70 bytes each. A store with
// more is read in several passes.
const distinctMax = 1 << 20

// shortID tells objects apart: half a sha256 is enough for that.
type shortID [16]byte

func shorten(id content.ObjectID) shortID { return shortID(id.Sum[:16]) }

// Sharing tells which objects which layers have in common.
type Sharing struct {
	// Layers are those that were looked at, sorted by id.
	Layers []Listed
	sets   []layerSet
	next   map[[2]int32]int32 // (set, layer) -> the set with that layer in it as well
}

// layerSet is a set of layers: layer together with those of parent, all of which come before it.
type layerSet struct {
	parent, layer  int32
	objects, bytes int64 // of the objects that exactly these layers name
}

// Each calls fn for each set of layers that have objects to themselves: indexes into Layers, in ascending
// order, valid during the call, and what these objects occupy, rounded up to blocks of 4 KiB: they share inodes.
func (sh *Sharing) Each(fn func(layers []int, u Usage)) {
	var buf []int
	for _, s := range sh.sets {
		if s.objects == 0 {
			continue
		}
		n := 0
		for at := s; at.parent >= 0; at = sh.sets[at.parent] {
			n++
		}
		buf = append(buf[:0], make([]int, n)...)
		for at := s; at.parent >= 0; at = sh.sets[at.parent] {
			n--
			buf[n] = int(at.layer)
		}
		fn(buf, Usage{Bytes: s.bytes})
	}
}

// with returns the set that has a layer beside those of another set.
func (sh *Sharing) with(set, layer int32) int32 {
	key := [2]int32{set, layer}
	n, ok := sh.next[key]
	if !ok {
		n = int32(len(sh.sets))
		sh.sets = append(sh.sets, layerSet{parent: set, layer: layer})
		sh.next[key] = n
	}
	return n
}

// Sharing reads the tree of every layer. What comes or goes meanwhile may or may not be counted.
func (r *reports) Sharing(ctx context.Context) (*Sharing, error) {
	sh := &Sharing{Layers: r.List(), sets: []layerSet{{parent: -1}}, next: map[[2]int32]int32{}}
	err := r.inPasses(func(mine func(content.ObjectID) bool) error {
		type found struct {
			set  int32 // that it is in so far
			size int64 // a merge may give it another one meanwhile
		}
		seen := map[shortID]found{}
		return r.walkTrees(ctx, sh.Layers, func(i int, f *tree.File) error {
			if f.Object.IsZero() || !mine(f.Object) {
				return nil
			}
			o := seen[shorten(f.Object)]
			if o.set != 0 && sh.sets[o.set].layer == int32(i) {
				return nil
			}
			if o.set != 0 {
				sh.sets[o.set].objects--
				sh.sets[o.set].bytes -= o.size
			} else {
				o.size = r.objects.Space(f.Object, f.Size)
			}
			o.set = sh.with(o.set, int32(i))
			sh.sets[o.set].objects++
			sh.sets[o.set].bytes += o.size
			seen[shorten(f.Object)] = o
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	sh.next = nil
	return sh, nil
}

// inPasses calls pass once for each part of the objects, so that none has too many to remember.
func (r *reports) inPasses(pass func(mine func(content.ObjectID) bool) error) error {
	n := uint32(r.objects.Len()/r.distinct + 1)
	for part := range n {
		err := pass(func(id content.ObjectID) bool { return binary.BigEndian.Uint32(id.Sum[:])%n == part })
		if err != nil {
			return err
		}
	}
	return nil
}

// walkTrees calls fn for the regular files of each layer of list, one layer after the other, with the layer's index. A
// layer that was removed meanwhile, or whose tree is damaged, is left out.
func (r *reports) walkTrees(ctx context.Context, list []Listed, fn func(i int, f *tree.File) error) error {
	for i, l := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := tree.Files(r.treePath(l.ID), l.ID, func(f *tree.File) error { return fn(i, f) })
		if err != nil && !isDamage(err) {
			return err
		}
	}
	return nil
}
