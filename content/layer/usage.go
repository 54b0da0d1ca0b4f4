package layer

import "github.com/dedup-snapshotter/dedup-snapshotter/content"

// What a payload that many layers name costs cannot be said of one of them: whoever goes, it stays. But whoever adds
// uses up may have asked once and for all (CRI does, for committed snapshots), so what a use has must not change when
// others come. So one use of a layer, the first, claims all that is on the disk by then and that nobody has claimed:
// what the layer's ingest added, and what removed layers left behind that others need. What has come since, such as
// chain images, is divided among all uses in proportion to the layers' sizes, until the next one claims it. The sum
// over all uses is what the disk holds, at any time.

// accounts divide what the disk holds among the uses of layers.
type accounts struct{ *oldLayout }

// weight is a layer's part in the division; an empty one still has a tree.
func (st *state) weight() int64 { return st.facts.Bytes + content.BlockSize }

// Used returns what objects, trees and recipes occupy. It looks at no file: sizes are rounded up to blocks of 4 KiB.
func (a *accounts) Used() Usage {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.used()
}

func (a *accounts) used() Usage {
	bytes, inodes := a.objects.Packs().Used()
	dirBytes, dirs := a.objects.Packs().Directories()
	old := a.old.usage()
	return Usage{
		Bytes:  bytes + dirBytes + a.trees.Bytes + old.Bytes + a.recipes.used.Bytes,
		Inodes: inodes + dirs + a.trees.Inodes + old.Inodes + a.recipes.used.Inodes,
	}
}

// Claim makes one use of a held layer stand for all that nobody has claimed; more is as in Share. ok is false when
// another use of the layer has a claim.
func (a *accounts) Claim(id content.LayerID, more Usage) (u Usage, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	u = a.unclaimed(more)
	return u, a.setClaim(id, u)
}

// unclaimed is called under mu.
func (a *accounts) unclaimed(more Usage) Usage {
	all := a.used()
	return Usage{
		Bytes:  max(0, all.Bytes+more.Bytes-a.claimed.Bytes),
		Inodes: max(0, all.Inodes+more.Inodes-a.claimed.Inodes),
	}
}

// Share returns the part that one use of a layer has in all that is stored; claimed tells that Claim was called for it,
// and more is what the caller stores beside it for all of them.
func (a *accounts) Share(id content.LayerID, claimed bool, more Usage) (u Usage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shrinkClaims(more)
	st := a.layers[id]
	if st == nil || st.holds == 0 {
		return Usage{}
	}
	if claimed && st.claimed != nil {
		u = *st.claimed
	}
	part := float64(st.weight()) / float64(a.weight) / float64(st.holds)
	rest := a.unclaimed(more)
	// What has just come in is for the snapshot to claim that it came in for, and not for others to share.
	rest.Bytes, rest.Inodes = max(0, rest.Bytes-a.fresh.Bytes), max(0, rest.Inodes-a.fresh.Inodes)
	u.Bytes += int64(float64(rest.Bytes)*part + 0.5)
	u.Inodes += int64(float64(rest.Inodes)*part + 0.5)
	return u
}

// shrinkClaims has the claims of all uses together be no more than what is there: merging packs gives back space that
// had been claimed. They shrink alike, and what is lost by rounding one is added to the next. Under mu.
func (a *accounts) shrinkClaims(more Usage) {
	all := a.used()
	all.Bytes, all.Inodes = all.Bytes+more.Bytes, all.Inodes+more.Inodes
	if a.claimed.Bytes <= all.Bytes && a.claimed.Inodes <= all.Inodes {
		return
	}
	shrink := func(of func(*Usage) *int64) {
		have, want := *of(&a.claimed), *of(&all)
		if have <= want {
			return
		}
		rest := 0.0
		for _, st := range a.layers {
			if st.claimed == nil {
				continue
			}
			n := of(st.claimed)
			exact := float64(*n)*float64(want)/float64(have) + rest
			rest = exact - float64(int64(exact))
			*of(&a.claimed) += int64(exact) - *n
			*n = int64(exact)
		}
	}
	shrink(func(u *Usage) *int64 { return &u.Bytes })
	shrink(func(u *Usage) *int64 { return &u.Inodes })
}
