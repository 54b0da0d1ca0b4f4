package object

import (
	"cmp"
	"slices"
	"sync"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// index says of each object how often it is named, where it lies, and whether it is bad.
type index struct {
	mu   sync.Mutex // guards what follows
	refs map[content.ObjectID]ref
	// bad are those of refs that have no place, or other bytes there.
	bad map[content.ObjectID]struct{}
	// settled: what nothing names has been forgotten.
	settled bool
}

// ref is an object: how often it is named, and its place.
type ref struct {
	count uint32
	n     uint32
	pack  *pack // nil: no pack has it
}

func newIndex() index {
	return index{refs: map[content.ObjectID]ref{}, bad: map[content.ObjectID]struct{}{}}
}

// Len returns how many objects there are.
func (x *index) Len() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.refs)
}

// take adds references. Under both locks.
func (x *index) take(id content.ObjectID, n uint32) {
	r, known := x.refs[id]
	if r.count == 0 && r.pack != nil {
		r.pack.revive(r.n)
	}
	r.count += n
	x.refs[id] = r
	if !known {
		x.bad[id] = struct{}{}
	}
}

// hit takes a reference to an object that is stored and not bad.
func (x *index) hit(id content.ObjectID) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	r := x.refs[id]
	if _, bad := x.bad[id]; bad || r.pack == nil || r.count == 0 {
		return false
	}
	r.count++
	x.refs[id] = r
	return true
}

// Place tells where an object lies.
func (x *index) Place(id content.ObjectID) (content.Place, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.place(id)
}

// Space is what an object of so many bytes takes in its pack.
func (x *index) Space(id content.ObjectID, size int64) int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	if r := x.refs[id]; r.pack != nil {
		return r.pack.space(r.n)
	}
	return content.Blocks(size)
}

func (x *index) place(id content.ObjectID) (content.Place, bool) {
	r := x.refs[id]
	if r.pack == nil || r.count == 0 {
		return content.Place{}, false
	}
	return r.pack.place(r.n), true
}

// SetBad notes that objects are bad, for as long as something names them and nobody puts the right bytes.
func (x *index) SetBad(ids ...content.ObjectID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, id := range ids {
		if x.refs[id].count > 0 {
			x.bad[id] = struct{}{}
		}
	}
}

// IsBad reports whether an object is known to be bad.
func (x *index) IsBad(id content.ObjectID) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, bad := x.bad[id]
	return bad
}

// Has reports whether anything names an object.
func (x *index) Has(id content.ObjectID) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.refs[id].count > 0
}

// Bad returns the objects that are known to be bad.
func (x *index) Bad() (ids []content.ObjectID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id := range x.bad {
		ids = append(ids, id)
	}
	return ids
}

// AnyBad reports whether any object is known to be bad.
func (x *index) AnyBad() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.bad) > 0
}

// IDs returns all objects, in the order in which they lie on the disk.
func (x *index) IDs() []content.ObjectID {
	type placed struct {
		id     content.ObjectID
		pack   content.PackID
		offset int64
	}
	x.mu.Lock()
	all := make([]placed, 0, len(x.refs))
	for id, r := range x.refs {
		p := placed{id: id}
		if r.pack != nil {
			p.pack, p.offset = r.pack.id, r.pack.slots[r.n].offset
		}
		all = append(all, p)
	}
	x.mu.Unlock()
	slices.SortFunc(all, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.offset, b.offset))
	})
	ids := make([]content.ObjectID, len(all))
	for i, p := range all {
		ids[i] = p.id
	}
	return ids
}

// install gives an object a place, and references. A place that is not bad counts for more than the new one. It
// returns the pack that has lost a bad object. Under both locks.
func (x *index) install(id content.ObjectID, count uint32, p *pack, n uint32) (lost *pack) {
	r := x.refs[id]
	_, bad := x.bad[id]
	if r.pack == nil || bad || r.count == 0 {
		if lost = r.pack; lost != nil && r.count > 0 {
			lost.die(r.n)
		}
		r.pack, r.n = p, n
		p.revive(n)
		delete(x.bad, id)
	}
	r.count += count
	x.refs[id] = r
	return lost
}

// objectsOf lists the objects of packs: in the order of ids, and in each as they lie.
func (x *index) objectsOf(ids []content.PackID) (list []copied) {
	x.mu.Lock()
	for id, r := range x.refs {
		if _, bad := x.bad[id]; r.pack != nil && r.count > 0 && !bad && slices.Contains(ids, r.pack.id) {
			list = append(list, copied{id: id, from: r.pack, old: r.n})
		}
	}
	x.mu.Unlock()
	slices.SortFunc(list, func(a, b copied) int {
		return cmp.Or(cmp.Compare(slices.Index(ids, a.from.id), slices.Index(ids, b.from.id)),
			cmp.Compare(a.from.slots[a.old].offset, b.from.slots[b.old].offset))
	})
	return list
}
