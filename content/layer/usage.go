package layer

import "github.com/dedup-snapshotter/dedup-snapshotter/content"

// What a payload that many layers name costs cannot be said of one of them: whoever goes, it stays. But whoever adds uses up
// may have asked once and for all (CRI does, for committed snapshots), so what a use has must not change when others come. So one
// use of a layer, the first, claims all that is on the disk by then and that nobody has claimed: what the layer's ingest added, and what removed
// layers left behind that others need. What has come since, such as chain images, is divided among all uses in proportion to the layers'
// sizes, until the next one claims it. The sum over all uses is what the disk holds, at any time.

// weight is a layer's part in the division; an empty one still has a tree.
func (st *state) weight() int64 { return st.facts.Bytes + content.BlockSize }

// setFile notes the size of a layer's tree file, 0 for one that is gone. Under mu.
func (s *Store) setFile(st *state, size int64) {
	for _, sign := range []int64{-1, 1} {
		if sign > 0 {
			st.file = content.Blocks(size)
		}
		if st.file > 0 {
			s.trees.Bytes += sign * st.file
			s.trees.Inodes += sign
		}
	}
}

// Used returns what objects and trees occupy. It looks at no file: sizes are rounded up to blocks of 4 KiB.
func (s *Store) Used() Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.used()
}

func (s *Store) used() Usage {
	bytes, inodes := s.objects.Used()
	dirBytes, dirs := s.objects.Directories()
	old := s.old.usage()
	return Usage{Bytes: bytes + dirBytes + s.trees.Bytes + old.Bytes, Inodes: inodes + dirs + s.trees.Inodes + old.Inodes}
}

// Claim makes one use of a held layer stand for all that nobody has claimed; more is as in Share. ok is false when another use of the
// layer has a claim.
func (s *Store) Claim(id content.LayerID, more Usage) (u Usage, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u = s.unclaimed(more)
	return u, s.setClaim(id, u)
}

// Reclaim restores what Claim returned in an earlier process.
func (s *Store) Reclaim(id content.LayerID, u Usage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setClaim(id, u)
}

func (s *Store) setClaim(id content.LayerID, u Usage) bool {
	st := s.layers[id]
	if st == nil || st.claimed != nil {
		return false
	}
	s.countFresh(st, -1)
	st.claimed, st.fresh = &u, false
	s.claimed.Bytes += u.Bytes
	s.claimed.Inodes += u.Inodes
	return true
}

// unclaimed is called under mu.
func (s *Store) unclaimed(more Usage) Usage {
	all := s.used()
	return Usage{
		Bytes:  max(0, all.Bytes+more.Bytes-s.claimed.Bytes),
		Inodes: max(0, all.Inodes+more.Inodes-s.claimed.Inodes),
	}
}

// Unclaim gives a claim up.
func (s *Store) Unclaim(id content.LayerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.layers[id]; st != nil {
		s.unclaim(st)
	}
}

// unclaim is Unclaim under mu.
func (s *Store) unclaim(st *state) {
	if st.claimed != nil {
		s.claimed.Bytes -= st.claimed.Bytes
		s.claimed.Inodes -= st.claimed.Inodes
		st.claimed = nil
	}
}

// Share returns the part that one use of a layer has in all that is stored; claimed tells that Claim was called for it, and more is what the caller
// stores beside it for all of them.
func (s *Store) Share(id content.LayerID, claimed bool, more Usage) (u Usage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shrinkClaims(more)
	st := s.layers[id]
	if st == nil || st.holds == 0 {
		return Usage{}
	}
	if claimed && st.claimed != nil {
		u = *st.claimed
	}
	part := float64(st.weight()) / float64(s.weight) / float64(st.holds)
	rest := s.unclaimed(more)
	// What has just come in is for the snapshot to claim that it came in for, and not for others to share.
	rest.Bytes, rest.Inodes = max(0, rest.Bytes-s.fresh.Bytes), max(0, rest.Inodes-s.fresh.Inodes)
	u.Bytes += int64(float64(rest.Bytes)*part + 0.5)
	u.Inodes += int64(float64(rest.Inodes)*part + 0.5)
	return u
}

// countFresh counts a layer among the fresh ones, or takes it out, if it is one. Under mu.
func (s *Store) countFresh(st *state, sign int64) {
	if st.fresh {
		s.fresh.Bytes += sign * st.facts.UsedBytes
		s.fresh.Inodes += sign * st.facts.UsedInodes
	}
}

// shrinkClaims has the claims of all uses together be no more than what is there: merging packs gives back space that had been
// claimed. They shrink alike, and what is lost by rounding one is added to the next. Under mu.
func (s *Store) shrinkClaims(more Usage) {
	all := s.used()
	all.Bytes, all.Inodes = all.Bytes+more.Bytes, all.Inodes+more.Inodes
	if s.claimed.Bytes <= all.Bytes && s.claimed.Inodes <= all.Inodes {
		return
	}
	shrink := func(of func(*Usage) *int64) {
		have, want := *of(&s.claimed), *of(&all)
		if have <= want {
			return
		}
		rest := 0.0
		for _, st := range s.layers {
			if st.claimed == nil {
				continue
			}
			n := of(st.claimed)
			exact := float64(*n)*float64(want)/float64(have) + rest
			rest = exact - float64(int64(exact))
			*of(&s.claimed) += int64(exact) - *n
			*n = int64(exact)
		}
	}
	shrink(func(u *Usage) *int64 { return &u.Bytes })
	shrink(func(u *Usage) *int64 { return &u.Inodes })
}
