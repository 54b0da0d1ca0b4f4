// Package object keeps the payloads of regular files, each stored once and named by its sha256.
//
// # Words
//
//   - object: a payload that something names.
//   - pack: a file that holds the payloads of one ingest, or of a merge; package erofs has its format.
//   - place: the pack, and the slot there, where an object lies. A slot that is no object's place is dead.
//   - holder: a chain image that names a pack. It keeps the file, even when all its slots are dead.
//
// # On disk
//
//	packs/<13 hex>.erofs   written once, in sequence, never changed
//
// # References
//
// The store counts references to each object, in memory only: every layer that names an object holds one, and so
// does every ingest that has put it and is not finished. The counts are loaded from the trees at start (Load), the
// places from the packs' own tables (Open). So looking an object up costs no system call.
//
// # How a payload comes in, moves and goes
//
// A Writer puts the new payloads of one ingest into a pack of its own. Others see them once it is sealed, so two
// ingests at the same time may both store a payload; the second copy is dead from the beginning. Seal does not sync:
// the owner of a layer syncs the file system once before the layer becomes visible.
//
// An object without references leaves its slot dead. A pack without live slots and without holders is unlinked; a
// Compactor copies what lives in others into a new pack. The same payload in two packs is no contradiction: the newer
// pack counts, which makes merging safe at every step.
package object

import (
	"errors"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrDamaged is wrapped by errors about objects that are missing, or are not what their names say.
var ErrDamaged = errors.New("damaged")

// ErrTooDense is wrapped where objects lie in dense packs, over which no chain image can be made here.
var ErrTooDense = errors.New("the kernel does not mount packs with blocks of 512 bytes")

// Options configure a Store.
type Options struct {
	// Verity gives packs fs-verity. The file system must have it (verity.Probe).
	Verity bool
	// Dense has new packs be dense, as the kernel has to allow (erofs.NewPackWriter). Without it no chain image can be
	// made over dense packs: Compact makes others of them.
	Dense bool
	// Moved is told which packs lost payloads to a newer one while chain images name them, and whether because these
	// were damaged; may be nil. It is called without locks.
	Moved func(packs []content.PackID, damaged bool)
	// Since is when the packs were last known to be on the disk, where that is in doubt; zero where it is not.
	// Payloads in younger packs are read at Open, and count only if they are whole: a pack may have come to the disk
	// in parts, its table among them.
	Since time.Time
	// Held are packs that chain images name. Each is held once from Open on, as Packs.Hold does, if it is there:
	// Settle comes before others can do so.
	Held []content.PackID
	// ReadOnly: the directory is only looked at, and nothing in it changes.
	ReadOnly bool
	// Step is called by name where a crash would leave something else behind; may be nil.
	Step func(name string)
}

// Store is the objects of a store, in its packs. Safe for concurrent use.
//
// The index has a lock, and the packs have another. What changes both, a place and what lives in a pack, holds both
// from the first change to the last, so that neither ever shows half of it. The index's is taken first.
type Store struct {
	index
	packs   *Packs
	packMax int64 // but for tests the constant
}

// Counts are bytes on the disk, rounded up to blocks, and files.
type Counts struct{ Bytes, Files int64 }

// Stats are what the packs hold.
type Stats struct {
	Packs int
	// Live are the bytes of objects, in whole blocks; Dead those of payloads that nothing names any more.
	Live, Dead int64
	// Plain are the packs without fs-verity.
	Plain int
	// TooDense are those that wait to be copied, since no chain image can be made over them here.
	TooDense int
	// Merged are the bytes that merging has copied since Open.
	Merged int64
}

// Packs returns the files that hold the objects.
func (s *Store) Packs() *Packs { return s.packs }

// lock takes the index's lock, then the packs'.
func (s *Store) lock() {
	s.mu.Lock()
	s.packs.mu.Lock()
}

func (s *Store) unlock() {
	s.packs.mu.Unlock()
	s.mu.Unlock()
}

// Load adds references to objects of a durable layer, between Open and Settle. Later it is for a layer whose tree
// could not be read then; it reads the packs' tables again, since what nothing named was forgotten.
func (s *Store) Load(ids []content.ObjectID) {
	s.lock()
	defer s.unlock()
	var unknown bool
	for _, id := range ids {
		_, known := s.refs[id]
		unknown = unknown || !known
		s.take(id, 1)
	}
	if unknown && s.settled {
		s.find(ids)
	}
}

// UnrefAll gives back one reference to each of some objects, at one moment. Packs that hold nothing any more go.
func (s *Store) UnrefAll(ids []content.ObjectID) error { return s.unref(ids, 1) }

// Unref gives back n references to an object. Without any its slot is dead.
func (s *Store) Unref(id content.ObjectID, n uint32) error { return s.unref([]content.ObjectID{id}, n) }

func (s *Store) unref(ids []content.ObjectID, n uint32) error {
	packs := map[*pack]bool{}
	s.lock()
	for _, id := range ids {
		r := s.refs[id]
		if r.count > n {
			r.count -= n
			s.refs[id] = r
			continue
		}
		delete(s.refs, id)
		delete(s.bad, id)
		if r.pack == nil {
			continue
		}
		if r.count > 0 {
			r.pack.die(r.n)
		}
		packs[r.pack] = true
	}
	_, drops := s.packs.emptied(packs)
	var last []*pack // a chain image still names them, and is likely to go next
	for p := range packs {
		if p.objects == 0 && p.holders > 0 {
			last = append(last, p)
		}
	}
	s.unlock()
	for _, p := range last {
		s.packs.free(func() { dropCache(p.file, 0) })
	}
	var errs []error
	for _, p := range drops {
		errs = append(errs, s.packs.remove(p))
	}
	return errors.Join(errs...)
}

// Close closes the store; packs stay as they are.
func (s *Store) Close() error { return s.packs.close() }
