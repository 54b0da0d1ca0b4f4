// Package layer is the deep module: it turns blobs and directories into layers,
// keeps them durable, finds them again, and frees what nothing names any more.
//
// # How a layer comes to be
//
// An ingest puts payloads into the object store while the tar streams by, then
// encodes the tree into ingest/, syncs the file system once, and renames the
// tree into layers/. The rename is the commit: before it a crash leaves objects that no
// tree names, which the next Open sweeps; after it the layer is whole.
//
// # What is in memory
//
// diffID -> layer, blob -> layer, payload digest -> layers and the reference counts
// of objects are read from the trees' headers at Open. There is no index on
// disk that could be lost, or disagree with the trees.
//
// # How it ends
//
// Holds keep layers alive. Release of the last one removes the tree first and
// then the objects that no other layer names, in the background.
package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

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
}

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
type Store struct {
	root     string
	rootFd   int
	fidelity content.Fidelity
	objects  *object.Store
	memory   *semaphore.Weighted // bytes of payloads on their way to the disk
	flights  flights
	gc       sync.WaitGroup
	distinct int // distinctMax, but for tests
	counters counters
	// leaked: an object could not be removed. The next Open looks for it, as after an unclean stop.
	leaked atomic.Bool
	closed sync.Once

	// factsMu serialises changes of a tree file's header.
	factsMu sync.Mutex

	mu       sync.RWMutex // guards what follows, and renames and unlinks in layers/
	layers   map[content.LayerID]*state
	diffs    map[diffKey]content.LayerID
	blobs    map[blobKey]tree.Tar
	payloads map[content.PayloadDigest][]content.LayerID
	// trees is what the tree files occupy, weight the sum of all layers'.
	trees  Usage
	weight int64
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
		taken int   // holds ever taken, those given back too
		file  int64 // what the tree file occupies
		ahead bool  // ingested ahead, and not yet taken up
	}
)

const (
	dirObjects = "objects"
	dirLayers  = "layers"
	dirIngest  = "ingest"
	// fileClean exists while no daemon is running and the last one stopped cleanly. It says what the
	// objects occupy, which nobody else knows without looking at each.
	fileClean   = "clean"
	cleanFormat = "objects: %d bytes, %d inodes\n"
	// memoryLimit bounds the payload bytes that wait for hashing and writing.
	memoryLimit = 64 << 20
)

// Open opens or creates the store below opts.Root. live names every layer that a
// snapshot refers to, once per reference: each gets one hold, every other layer is
// removed.
func Open(ctx context.Context, opts Options, live []content.LayerID) (_ *Store, err error) {
	switch opts.Fidelity {
	case "":
		opts.Fidelity = content.Python
	case content.Exact, content.Python, content.Normalized:
	default:
		return nil, fmt.Errorf("fidelity %q: want exact, python or normalized", opts.Fidelity)
	}
	s := &Store{
		root:     opts.Root,
		rootFd:   -1,
		fidelity: opts.Fidelity,
		memory:   semaphore.NewWeighted(memoryLimit),
		distinct: distinctMax,
		layers:   map[content.LayerID]*state{},
		diffs:    map[diffKey]content.LayerID{},
		blobs:    map[blobKey]tree.Tar{},
		payloads: map[content.PayloadDigest][]content.LayerID{},
	}
	s.flights.init()
	s.counters.init()
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if err := s.openDirs(); err != nil {
		return nil, err
	}
	clean, err := s.markRunning()
	if err != nil {
		return nil, err
	}
	holds := map[content.LayerID]int{}
	for _, id := range live {
		holds[id]++
	}
	complete, dropped, err := s.load(ctx, holds)
	if err != nil {
		return nil, err
	}
	switch {
	case !complete:
		log.G(ctx).Warn("layers are damaged: unreferenced objects are kept until they are repaired")
	case !clean || dropped:
		n, err := s.objects.Sweep()
		if err != nil {
			return nil, err
		}
		s.counters.change(func(st *Stats) { st.Swept = int64(n) })
		log.G(ctx).WithField("objects", n).Info("removed what no layer names")
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

func (s *Store) treePath(id content.LayerID) string { return s.path(dirLayers, id.Hex()) }

func (s *Store) openDirs() error {
	if err := os.RemoveAll(s.path(dirIngest)); err != nil {
		return fmt.Errorf("empty staging directory: %w", err)
	}
	for _, d := range []string{dirIngest, dirLayers, dirObjects} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return fmt.Errorf("create store: %w", err)
		}
	}
	fd, err := unix.Open(s.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open store %s: %w", s.root, err)
	}
	s.rootFd = fd
	s.objects, err = object.Open(s.path(dirObjects))
	return err
}

func (s *Store) closeFiles() {
	if s.objects != nil {
		_ = s.objects.Close()
	}
	if s.rootFd >= 0 {
		_ = unix.Close(s.rootFd)
	}
}

// markRunning takes the mark of a clean stop away and reports whether it was there.
func (s *Store) markRunning() (clean bool, err error) {
	mark, err := os.ReadFile(s.path(fileClean))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = os.Remove(s.path(fileClean))
	}
	if err != nil {
		return false, fmt.Errorf("mark store as running: %w", err)
	}
	var bytes, inodes int64
	if _, err := fmt.Sscanf(string(mark), cleanFormat, &bytes, &inodes); err == nil {
		clean = true
		s.objects.SetUsed(bytes, inodes)
	}
	return clean, unix.Fsync(s.rootFd)
}

// load reads the headers of all trees. complete is false when the tree of a live layer
// cannot be read, dropped is true when a layer that nothing refers to was removed.
func (s *Store) load(ctx context.Context, holds map[content.LayerID]int) (complete, dropped bool, err error) {
	dir, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		return false, false, fmt.Errorf("list layers: %w", err)
	}
	complete = true
	for _, d := range dir {
		sum, err := content.ParseSum(d.Name())
		id := content.LayerID{Sum: sum}
		if err != nil || holds[id] == 0 {
			if err := os.RemoveAll(s.path(dirLayers, d.Name())); err != nil {
				return false, false, fmt.Errorf("remove unused layer: %w", err)
			}
			dropped = true
			continue
		}
		facts, objects, err := tree.ReadFacts(s.treePath(id))
		if err != nil {
			log.G(ctx).WithError(err).Errorf("layer %s is damaged", id)
			complete = false
			continue
		}
		fi, err := os.Stat(s.treePath(id))
		if err != nil {
			return false, false, fmt.Errorf("read layer: %w", err)
		}
		s.objects.Load(objects)
		s.insert(id, facts, holds[id], fi.Size())
		delete(holds, id)
	}
	for id, n := range holds {
		if n > 0 && s.layers[id] == nil {
			complete = false
			s.counters.change(func(st *Stats) { st.Damaged++ })
			log.G(ctx).Errorf("layer %s is missing or damaged: snapshots that use it cannot be mounted", id)
		}
	}
	return complete, dropped, nil
}

// insert makes a layer visible; size is its tree file's. Under mu, or before the store is shared.
func (s *Store) insert(id content.LayerID, facts tree.Facts, holds int, size int64) {
	st := &state{facts: facts, holds: holds, taken: holds}
	s.layers[id] = st
	s.weight += st.weight()
	s.setFile(st, size)
	s.payloads[facts.Payload] = append(s.payloads[facts.Payload], id)
	for _, t := range facts.Tars {
		s.insertTar(id, t)
	}
}

func (s *Store) insertTar(id content.LayerID, t tree.Tar) {
	s.diffs[diffKey{t.Fidelity, t.DiffID}] = id
	for _, b := range t.Blobs {
		s.blobs[blobKey{t.Fidelity, b}] = t
	}
}

// Close waits for background work. Holds end with it.
func (s *Store) Close() (err error) {
	s.closed.Do(func() {
		s.flights.wait()
		s.gc.Wait()
		if err = unix.Syncfs(s.rootFd); err == nil && !s.leaked.Load() {
			bytes, inodes := s.objects.Used()
			err = os.WriteFile(s.path(fileClean), fmt.Appendf(nil, cleanFormat, bytes, inodes), 0o600)
		}
		s.closeFiles()
	})
	return err
}

// Wait waits until what has been released by now is removed.
func (s *Store) Wait() { s.gc.Wait() }

// ObjectsDir is the data-only lower layer of every mount.
func (s *Store) ObjectsDir() string { return s.objects.Dir() }

// Lookup finds the layer of a diffID under the store's fidelity and holds it.
func (s *Store) Lookup(d content.DiffID) (content.LayerID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.diffs[diffKey{s.fidelity, d}]
	if ok {
		s.layers[id].hold()
	}
	return id, ok
}

// Infer finds the known diffID for which parent.Chain(diffID) == chain.
func (s *Store) Infer(parent, chain content.ChainID) (content.DiffID, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if parent.IsZero() {
		d := content.DiffID(chain)
		_, ok := s.diffs[diffKey{s.fidelity, d}]
		return d, ok
	}
	leads := parent.Leads(chain)
	for k := range s.diffs {
		if k.fidelity == s.fidelity && leads(k.diffID) {
			return k.diffID, true
		}
	}
	return content.DiffID{}, false
}

// Hold adds a hold to a layer that the caller already holds.
func (s *Store) Hold(id content.LayerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.layers[id]; st != nil {
		st.hold()
	}
}

func (st *state) hold() { st.holds, st.taken = st.holds+1, st.taken+1 }

// Release gives a hold back. A layer without holds is removed in the background,
// with every object that no other layer names.
func (s *Store) Release(id content.LayerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.layers[id]
	if st == nil {
		return // a damaged layer has no holds
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

// remove removes a layer that still has no holds.
func (s *Store) remove(id content.LayerID) error {
	objects, err := s.unlink(id)
	if err != nil {
		return err
	}
	var errs []error
	for _, o := range objects {
		errs = append(errs, s.objects.Unref(o, 1))
	}
	s.objects.MeasureDirectories()
	return s.noteLeak(errors.Join(errs...))
}

// noteLeak remembers that objects stay which nothing names.
func (s *Store) noteLeak(err error) error {
	if err != nil {
		s.leaked.Store(true)
	}
	return err
}

// unlink takes a layer that still has no holds out of the store and returns the objects that it named.
func (s *Store) unlink(id content.LayerID) ([]content.ObjectID, error) {
	_, objects, err := tree.ReadFacts(s.treePath(id)) // not under the lock: a large tree takes its time
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // somebody else was faster
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.layers[id]
	if st == nil || st.holds > 0 {
		return nil, nil
	}
	if err := os.Remove(s.treePath(id)); err != nil {
		return nil, err
	}
	delete(s.layers, id)
	s.counters.change(func(c *Stats) { c.RemovedLayers++ })
	s.weight -= st.weight()
	s.setFile(st, 0)
	for _, t := range st.facts.Tars {
		delete(s.diffs, diffKey{t.Fidelity, t.DiffID})
		for _, b := range t.Blobs {
			delete(s.blobs, blobKey{t.Fidelity, b})
		}
	}
	same := s.payloads[st.facts.Payload]
	for i := range same {
		if same[i] == id {
			same = append(same[:i:i], same[i+1:]...)
			break
		}
	}
	if s.payloads[st.facts.Payload] = same; len(same) == 0 {
		delete(s.payloads, st.facts.Payload)
	}
	return objects, nil
}

// Taken returns how often a layer has been held since it came in or the store was opened, 0 for one
// that is not there. Who has held it from the start learns that somebody else has taken it up.
func (s *Store) Taken(id content.LayerID) int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if st := s.layers[id]; st != nil {
		return st.taken
	}
	return 0
}

// Facts returns what is known of a layer.
func (s *Store) Facts(id content.LayerID) (Facts, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := s.layers[id]
	if st == nil {
		return Facts{}, fmt.Errorf("layer %s: %w", id, fs.ErrNotExist)
	}
	f := Facts{
		ID:       id,
		Fidelity: st.facts.Fidelity,
		Payload:  st.facts.Payload,
		Entries:  st.facts.Entries,
		Bytes:    st.facts.Bytes,
		Usage:    Usage{Bytes: st.facts.UsedBytes, Inodes: st.facts.UsedInodes},
	}
	for _, t := range st.facts.Tars {
		f.DiffIDs = append(f.DiffIDs, t.DiffID)
	}
	return f, nil
}

// Merge reads the trees of a chain, base first, and merges them. The empty
// chain is an empty root directory.
func (s *Store) Merge(ctx context.Context, chain []content.LayerID) (*tree.Node, error) {
	trees := make([][]*content.Entry, len(chain))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i, id := range chain {
		g.Go(func() (err error) {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, trees[i], err = tree.Read(s.treePath(id), id)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("read chain: %w", err)
	}
	n, err := tree.Merge(trees...)
	if err != nil {
		return nil, fmt.Errorf("merge chain: %w", err)
	}
	return n, nil
}
