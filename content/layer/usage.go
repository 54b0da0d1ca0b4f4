package layer

import "github.com/dedup-snapshotter/dedup-snapshotter/content"

// What a payload that many layers name costs cannot be said of one of them: whoever goes, it stays. So the
// whole of what the store occupies, which is known exactly, is divided among the uses of its layers, in
// proportion to the layers' sizes. The sum over all uses is what the disk holds, at any time.

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
	return Usage{Bytes: bytes + dirBytes + s.trees.Bytes, Inodes: inodes + dirs + s.trees.Inodes}
}

// Share returns the part that one use of a layer has in all that is stored; more is what the caller
// stores beside it for all of them.
func (s *Store) Share(id content.LayerID, more Usage) Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := s.layers[id]
	if st == nil || st.holds == 0 {
		return Usage{}
	}
	part := float64(st.weight()) / float64(s.weight) / float64(st.holds)
	all := s.used()
	return Usage{
		Bytes:  int64(float64(all.Bytes+more.Bytes)*part + 0.5),
		Inodes: int64(float64(all.Inodes+more.Inodes)*part + 0.5),
	}
}
