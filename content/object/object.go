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
// A Writer puts the new payloads of one ingest into a pack of its own. Others see them once it is sealed, so two ingests
// at the same time may both store a payload; the second copy is dead from the beginning. Seal does not sync: the owner of a layer
// syncs the file system once before the layer becomes visible.
//
// An object without references leaves its slot dead. A pack without live slots and without holders is unlinked; Compact
// copies what lives in others into a new pack. The same payload in two packs is no contradiction: the newer pack counts, which
// makes merging safe at every step.
package object

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrDamaged is wrapped by errors about objects that are missing, or are not what their names say.
var ErrDamaged = errors.New("damaged")

// Options configure a Store.
type Options struct {
	// Verity gives packs fs-verity. The file system must have it (verity.Probe).
	Verity bool
	// Sync is called before a merge writes anything. The first function that it returns puts on the disk what has
	// been written by then, and tells of writes that failed since the call; stop ends that. Old copies go after it.
	// May be nil.
	Sync func() (sync func() error, stop func(), err error)
	// Moved is told which packs lost payloads to a newer one while chain images name them, and whether because these
	// were damaged; may be nil. It is called without locks.
	Moved func(packs []content.PackID, damaged bool)
	// Since is when the packs were last known to be on the disk, where that is in doubt; zero where it is not.
	// Payloads in younger packs are read at Open, and count only if they are whole: a pack may have come to the disk
	// in parts, its table among them.
	Since time.Time
	// Held are packs that chain images name. Each is held once from Open on, as HoldPacks does, if it is there:
	// Settle comes before others can do so.
	Held []content.PackID
	// ReadOnly: the directory is only looked at, and nothing in it changes.
	ReadOnly bool
	// Room is how many bytes merging may take now; nil for any.
	Room func() int64
	// Step is called by name where a crash would leave something else behind; may be nil.
	Step func(name string)
}

// Store is the packs of a store. Safe for concurrent use.
type Store struct {
	dir, staging string
	opts         Options

	// merging is held by who merges.
	merging sync.Mutex

	index
	// What follows is guarded by the index's mu.

	packs map[content.PackID]*pack
	// sealing packs have their names already, but are not among packs yet.
	sealing map[content.PackID]struct{}
	settled bool
	last    content.PackID // the newest that was given out
	// keepDead: it is not known what is named, so nothing is removed.
	keepDead bool
	used     Counts
	freed    Counts
	merged   int64
	dirBytes int64
	packMax  int64 // but for tests the constant
}

// Counts are bytes on the disk, rounded up to blocks, and files.
type Counts struct{ Bytes, Files int64 }

// Stats are what the packs hold.
type Stats struct {
	Packs int
	// Live are the bytes of objects, in whole blocks; Dead those of payloads that nothing names any more.
	Live, Dead int64
	// Merged are the bytes that merging has copied since Open.
	Merged int64
}

// Dir returns the directory of the packs.
func (s *Store) Dir() string { return s.dir }

// Stats counts.
func (s *Store) Stats() (st Stats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Packs, st.Merged = len(s.packs), s.merged
	for _, p := range s.packs {
		st.Live += p.live * content.BlockSize
		st.Dead += p.dead() * content.BlockSize
	}
	return st
}

// Used returns what the packs occupy.
func (s *Store) Used() (bytes, files int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used.Bytes, s.used.Files
}

// Freed returns what has been removed since Open: bytes and packs.
func (s *Store) Freed() (bytes, files int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freed.Bytes, s.freed.Files
}

// Directories returns what the directory of the packs occupies, as of the last MeasureDirectories.
func (s *Store) Directories() (bytes, inodes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dirBytes, 1
}

// MeasureDirectories looks at the directory.
func (s *Store) MeasureDirectories() {
	var st unix.Stat_t
	if unix.Stat(s.dir, &st) == nil {
		s.mu.Lock()
		s.dirBytes = st.Blocks * 512
		s.mu.Unlock()
	}
}

// Load adds references to objects of a durable layer, between Open and Settle. Later it is for a layer whose tree
// could not be read then; it reads the packs' tables again, since what nothing named was forgotten.
func (s *Store) Load(ids []content.ObjectID) {
	s.mu.Lock()
	defer s.mu.Unlock()
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

// Unref gives back n references to an object. Without any its slot is dead.
func (s *Store) Unref(id content.ObjectID, n uint32) error {
	s.mu.Lock()
	r := s.refs[id]
	if r.count > n {
		r.count -= n
		s.refs[id] = r
		s.mu.Unlock()
		return nil
	}
	delete(s.refs, id)
	delete(s.bad, id)
	if r.pack != nil && r.count > 0 {
		r.pack.die(r.n)
	}
	drop := s.droppable(r.pack)
	s.mu.Unlock()
	return s.remove(drop)
}

// Close closes the store; packs stay as they are.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, p := range s.packs {
		errs = append(errs, p.file.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) step(name string) {
	if s.opts.Step != nil {
		s.opts.Step(name)
	}
}

// Path returns the file of a pack.
func (s *Store) Path(id content.PackID) string { return filepath.Join(s.dir, id.String()+suffix) }

const suffix = ".erofs"

// newID returns the id of a new pack. Under mu.
func (s *Store) newID(now int64) content.PackID {
	s.last = max(s.last+1, content.PackID(now))
	return s.last
}

// stage creates the file of a new pack.
func (s *Store) stage(id content.PackID) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.staging, "pack-"+id.String()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, fmt.Errorf("begin pack: %w", err)
	}
	return f, nil
}
