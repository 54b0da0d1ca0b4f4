// Package layer is the deep module: it turns blobs and directories into layers,
// keeps them durable, finds them again, and frees what nothing names any more.
//
// # How a layer comes to be
//
// An ingest puts payloads into a pack while the tar streams by, seals it, then
// encodes the tree into ingest/, syncs the file system once, and renames the
// tree into layers/. The rename is the commit: before it a crash leaves objects that no
// tree names, which the next Open sweeps; after it the layer is whole.
//
// # What is in memory
//
// diffID -> layer, blob -> layer, payload digest -> layers and the reference counts of objects are read from the
// trees' headers at Open. There is no index on disk that could be lost, or disagree with the trees.
//
// # How it ends
//
// Holds keep layers alive. Release of the last one removes the tree first and
// then the objects that no other layer names, in the background.
//
// # What is damaged
//
// A layer whose tree cannot be read, or that names an object which is missing or has other bytes, is out of service: it
// is found no more, and cannot be mounted. Whoever ingests it again, or another layer with the same payload,
// heals it, since an object that is known to be bad is written anew.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Options configure a Store.
type Options struct {
	// Root is the store's directory; it must exist.
	Root string
	// Fidelity under which new layers are ingested; "" is content.Python.
	Fidelity content.Fidelity
	// Durability of new layers; "" is Strict.
	Durability Durability
	// Verity gives packs fs-verity; the file system must have it (verity.Probe).
	Verity bool
	// Dense has packs take less of the disk. The kernel must mount them (lower.Kernel).
	Dense bool
	// PacksMoved is told which packs lost payloads to newer ones while chain images name them, and whether because
	// these were damaged; may be nil.
	PacksMoved func(packs []content.PackID, damaged bool)
	// HeldPacks are those that files of chain images name. They stay while the store opens; the caller gives them
	// back with Packs().Release when it has held what it needs.
	HeldPacks []content.PackID
	// KeepUnnamed keeps layers that nothing refers to until the next Open: it is not known whether nothing does.
	KeepUnnamed bool
	// Reserve is what ingests leave free on the file system.
	Reserve Reserve
	// MaxMemory bounds what ingests and chain builds keep in memory, in bytes; 0 is DefaultMaxMemory.
	MaxMemory int64
	// Pressure is called when the reserve is reached, to free what can be freed; may be nil.
	Pressure func(context.Context)
	// Mounted returns the layers below snapshots that clients may have mounted, and false where that cannot be told; may
	// be nil. It is asked while payloads of the layout before packs are left.
	Mounted func(context.Context) (layers []content.LayerID, ok bool, err error)
	// User tells whether a snapshot of this id is there, of those that Upgrade was told of; nil for none.
	User func(id string) bool
	// Step is called by name at every point where a crash would leave something else behind; nil but in tests.
	Step func(name string)

	moveBatch int64 // another one than the constant, for tests
	readOnly  bool  // Look has opened it
}

// Blob is a compressed (or plain) layer tar to be ingested.
type Blob struct {
	Digest    digest.Digest
	MediaType string
	Size      int64
	// Open is called at most once, and what it returns is closed by the store.
	Open func(context.Context) (io.ReadCloser, error)
	// Ahead: nobody has asked for the layer yet. TakeAhead tells whoever does first.
	Ahead bool
	// Arriving: it is not whole yet. What Open returns waits for more, and is a Verifier.
	Arriving bool
	// Late, of a blob that is being written, returns its digest once its tar has been read; an error ends the ingest.
	Late func() (digest.Digest, error)
}

// Verifier is what a Blob is read from whose bytes nobody has compared with its digest before.
type Verifier interface {
	// Verify reads the rest, and returns an error that wraps ErrUnverified when they differ.
	Verify() error
}

// ErrUnverified is wrapped where a blob that was on its way turned out to be another one, or did not arrive.
var ErrUnverified = errors.New("blob did not arrive")

// Dir is the upper directory of an overlay to be ingested.
type Dir struct {
	Upper string
	// View is the merged mount that shows Upper over its parents; needed only where
	// Upper holds data-less metacopy files. "" when there is none.
	View string
}

// Ingested is what an ingest found out.
type Ingested struct {
	Layer  content.LayerID
	DiffID content.DiffID // zero for a directory
	// TarSize is the length of the uncompressed tar in bytes, 0 for a directory.
	TarSize int64
	// Added is what the ingest really added to the disk.
	Added   Usage
	Outcome Outcome
}

// Usage is disk space as the file system accounts it.
type Usage struct {
	Bytes  int64 // allocated bytes
	Inodes int64
}

// Facts are what the store knows of a layer without reading its tree.
type Facts struct {
	ID       content.LayerID
	Fidelity content.Fidelity // exact or python
	Payload  content.PayloadDigest
	DiffIDs  []content.DiffID
	Entries  int64
	Bytes    int64 // sum of regular files' sizes
	Usage    Usage // what its ingest added to the disk
}

// Store holds layers. Every LayerID that a method returns carries one hold, which
// keeps the layer alive until Release; holds are counted, in memory. Safe for
// concurrent use.
//
// Its own methods ingest and remove layers. What it stands on are parts that know no more than they embed: the
// directory, the catalog of layers, durability, packs, and over these health, accounts, reports and the old layout.
type Store struct {
	*directory
	*catalog
	*durable
	*packed
	*oldLayout
	*health
	*accounts
	*reports
	*recipes

	parked   buffers // payloads that wait for something else of their layer
	budget   *budget
	flights  flights
	keeper   keeper
	gc       content.Tasks
	counters counters
	closed   sync.Once

	factsMu sync.Mutex // serialises changes of a tree file's header
}

type (
	diffKey struct {
		fidelity content.Fidelity
		diffID   content.DiffID
	}
	blobKey struct {
		fidelity content.Fidelity
		blob     digest.Digest
	}
	// state is one durable layer.
	state struct {
		facts tree.Facts
		holds int
		taken int // holds ever taken, those given back too
		// claimed is what a use of the layer has claimed; nil when none has.
		claimed *Usage
		file    int64 // what the tree file occupies
		ahead   bool  // ingested ahead, and not yet taken up
		fresh   bool  // it has just come in, and no use of it has claimed anything yet
		// counted: the layer's objects are counted as referenced. Those of a tree that could not be read are not.
		counted bool
		// damage is why the layer is out of service; nil for one that serves.
		damage *Damage
	}
)

const (
	dirPacks  = "packs"
	dirLayers = "layers"
	dirIngest = "ingest"
	// fileDamaged lists what is known to be damaged, for the next start.
	fileDamaged = "damaged"
	// fileRunning was written by the daemon that runs or was killed. What came in up to its mtime is on the disk.
	fileRunning = "running"
	// fileClean exists while no daemon is running and the last one stopped cleanly.
	fileClean = "clean"
)

func (d *directory) path(elem ...string) string {
	return filepath.Join(append([]string{d.root}, elem...)...)
}

func (d *directory) treePath(id content.LayerID) string { return d.path(dirLayers, id.Hex()) }

// insert adds a layer; size is its tree file's. Under mu, or before the store is shared.
func (c *catalog) insert(id content.LayerID, st *state, size int64) {
	c.layers[id] = st
	c.countFresh(st, 1)
	c.weight += st.weight()
	c.setFile(st, size)
	if st.damage != nil {
		c.damaged++
		return
	}
	c.show(id, st)
}

// Wait waits until what has been released by now is removed, and the file system has freed it.
func (s *Store) Wait() {
	s.gc.Wait()
	s.objects.Packs().Wait()
}

// Places finds where the objects of a chain image lie, and keeps their packs until the result's Release. The caller
// holds the layers. An object that no pack has takes its layers out of service, and the error wraps ErrDamaged.
func (h *health) Places(ctx context.Context, ids []content.ObjectID) (*object.Placed, error) {
	placed, err := h.objects.Places(ids)
	if errors.Is(err, object.ErrTooDense) {
		// The store has come from another kernel. It is all copied in the background; what somebody waits for, now.
		h.wakeKeeper()
		err = h.compactor.Coarsen(ctx, ids, h.hasRoom)
		if err == nil {
			placed, err = h.objects.Places(ids)
		}
	}
	if errors.Is(err, object.ErrDamaged) {
		h.blame(ctx)
		h.saveDamaged(ctx)
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return placed, err
}

// Packs are the files that hold payloads. Chain images hold those that they name.
func (p *packed) Packs() *object.Packs { return p.objects.Packs() }

func (st *state) hold() { st.holds, st.taken = st.holds+1, st.taken+1 }

// Release gives a hold back. A layer without holds is removed in the background,
// with every object that no other layer names.
func (s *Store) Release(id content.LayerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.layers[id]
	if st == nil {
		return
	}
	if st.holds--; st.holds > 0 {
		return
	}
	s.gc.Go(func() {
		if err := s.remove(id); err != nil {
			s.counters.change(func(st *Stats) { st.RemoveErrors++ })
			log.L.WithError(err).Errorf("remove layer %s", id)
		}
	})
}

// removeMost is how many objects of a layer go while who looks for others waits.
const removeMost = 1024

// remove removes a layer that still has no holds.
func (s *Store) remove(id content.LayerID) error {
	objects, err := s.unlink(id)
	if err != nil {
		return err
	}
	s.step("remove.tree")
	var errs []error
	for some := range slices.Chunk(objects, removeMost) {
		errs = append(errs, s.objects.UnrefAll(some))
		s.step("remove.object")
	}
	s.objects.Packs().MeasureDirectories()
	s.wakeKeeper()
	s.step("remove.done")
	return s.noteLeak(errors.Join(errs...))
}

// noteLeak remembers that objects stay which nothing names.
func (h *health) noteLeak(err error) error {
	if err != nil {
		h.leaked.Store(true)
	}
	return err
}

// unlink takes a layer that still has no holds out of the store and returns the objects that it named.
func (s *Store) unlink(id content.LayerID) ([]content.ObjectID, error) {
	_, objects, err := tree.ReadFacts(s.treePath(id), id) // not under the lock: a large tree takes its time
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.layers[id]
	if st == nil || st.holds > 0 {
		return nil, nil // somebody else was faster
	}
	if err != nil && !isDamage(err) {
		return nil, err
	}
	s.removeRecipes(id)
	if err := os.RemoveAll(s.treePath(id)); err != nil {
		return nil, err
	}
	s.forget(id, st)
	s.unclaim(st)
	s.counters.change(func(c *Stats) { c.RemovedLayers++ })
	if err != nil || !st.counted {
		s.leaked.Store(true) // nobody can tell what it named
		return nil, nil
	}
	return objects, nil
}
