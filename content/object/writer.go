package object

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// Writer takes the payloads of one ingest. Put and PutStream may be called concurrently; Seal and End follow when they
// have returned. Every Put takes one reference, which End gives back.
type Writer struct {
	s *Store

	mu sync.Mutex // guards what follows
	// hits are references to sealed objects, own those to what lies in this writer's pack.
	hits map[content.ObjectID]uint32
	own  map[content.ObjectID]ownSlot
	// packs are those being written: a new one is begun when the last is large enough.
	packs  []*filling
	sealed Counts
	// wrote are the objects that have been written, sealed ones too.
	wrote []content.ObjectID
}

type ownSlot struct {
	pack     *filling
	n, count uint32
}

// filling is a pack that is being written.
type filling struct {
	*erofs.PackWriter
	file *os.File
}

// packMax is how large a pack gets, unless a single payload is larger: a merge copies what lives in it at once.
const packMax = 4 << 30

// Begin starts to take payloads.
func (s *Store) Begin() *Writer {
	return &Writer{s: s, hits: map[content.ObjectID]uint32{}, own: map[content.ObjectID]ownSlot{}}
}

// known takes a reference to an object that needs no writing. Under mu.
func (w *Writer) known(id content.ObjectID) bool {
	if own, ok := w.own[id]; ok {
		own.count++
		w.own[id] = own
		return true
	}
	if !w.s.hit(id) {
		return false
	}
	w.hits[id]++
	return true
}

// begun returns the pack for a payload of this many bytes. Under mu.
func (w *Writer) begun(size int64) (*filling, error) {
	if n := len(w.packs); n > 0 {
		last := w.packs[n-1]
		if taken := last.Payloads(); taken == 0 || content.BlockSize+taken+size <= w.s.packMax {
			return last, nil
		}
	}
	f, err := w.s.packs.begin()
	if err == nil {
		w.packs = append(w.packs, f)
	}
	return f, err
}

// discard gives a pack up that was not sealed.
func (f *filling) discard() error {
	_ = f.file.Close()
	if err := os.Remove(f.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a pack that was given up: %w", err)
	}
	return nil
}

// Put takes one reference to an object, and writes it when it is the first, or when the object is known to be
// bad. It reports how many bytes it wrote, 0 when the object was there.
func (w *Writer) Put(id content.ObjectID, data []byte) (added int64, err error) {
	w.mu.Lock()
	if w.known(id) {
		w.mu.Unlock()
		return 0, nil
	}
	pack, err := w.begun(int64(len(data)))
	w.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := pack.Append(id, data)
	if err != nil {
		return 0, err
	}
	return w.keep(id, pack, n, int64(len(data))), nil
}

// keep notes what has been written. Where another worker wrote the same payload meanwhile, one of the copies is dead.
func (w *Writer) keep(id content.ObjectID, pack *filling, n uint32, size int64) (added int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	own, ok := w.own[id]
	if !ok {
		own.pack, own.n = pack, n
		w.wrote = append(w.wrote, id)
	}
	own.count++
	w.own[id] = own
	return size
}

func (w *Writer) PutStream(r io.Reader, size int64, sum func() content.ObjectID) (id content.ObjectID, added int64,
	err error) {
	w.mu.Lock()
	pack, err := w.begun(size)
	w.mu.Unlock()
	if err != nil {
		return id, 0, err
	}
	x, err := pack.Stream(size)
	if err != nil {
		return id, 0, err
	}
	copied, err := io.CopyBuffer(struct{ io.Writer }{x}, io.LimitReader(r, size), make([]byte, 256<<10))
	if err == nil && copied < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return id, 0, errors.Join(err, x.Abort())
	}
	id = sum()
	w.mu.Lock()
	known := w.known(id)
	w.mu.Unlock()
	if known {
		return id, 0, x.Abort()
	}
	n, err := x.Commit(id)
	if err != nil {
		return id, 0, errors.Join(err, x.Abort())
	}
	return id, w.keep(id, pack, n, size), nil
}

// Read returns the bytes of an object that was put.
func (w *Writer) Read(id content.ObjectID) ([]byte, error) {
	w.mu.Lock()
	own, ok := w.own[id]
	w.mu.Unlock()
	if !ok {
		return w.s.Read(id)
	}
	return own.pack.Read(own.n)
}

// Wrote returns the objects that the writer has written.
func (w *Writer) Wrote() []content.ObjectID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.wrote)
}

// Heals reports whether something was written that the store has, but bad.
func (w *Writer) Heals() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	for id := range w.own {
		if _, bad := w.s.bad[id]; bad {
			return true
		}
	}
	return false
}

// Seal makes the packs, if there are any, the store's, so that others find what is in them, and returns what they
// take of the disk. It does not sync. Of a payload that was sealed elsewhere meanwhile, that place counts. After an
// error they are gone.
func (w *Writer) Seal() (used Counts, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	packs := map[*filling]*pack{}
	for ; len(w.packs) > 0 && err == nil; w.packs = w.packs[1:] {
		f := w.packs[0]
		if f.Payloads() == 0 { // a large payload turned out to be known
			err = f.discard()
		} else if packs[f], err = w.s.packs.seal(f); err != nil {
			err = errors.Join(err, f.discard())
			delete(packs, f)
		}
	}
	if err != nil {
		for _, p := range packs {
			err = errors.Join(err, w.s.packs.remove(p))
		}
		return used, errors.Join(err, w.discard())
	}
	touched := map[*pack]bool{}
	w.s.lock()
	for _, p := range packs {
		w.s.packs.add(p)
		touched[p] = true // all of it may have been sealed elsewhere
	}
	for id, own := range w.own {
		if old := w.s.install(id, own.count, packs[own.pack], own.n); old != nil {
			touched[old] = true
		}
		w.hits[id] += own.count
	}
	clear(w.own)
	moved, drops := w.s.packs.emptied(touched)
	w.s.unlock()
	for _, p := range packs {
		if !slices.Contains(drops, p) {
			w.sealed.Bytes += p.occupies()
			w.sealed.Files++
		}
	}
	w.s.packs.tellMoved(moved, true)
	for _, d := range drops {
		err = errors.Join(err, w.s.packs.remove(d))
	}
	return w.sealed, err
}

// discard gives up what was not sealed. Under mu.
func (w *Writer) discard() (err error) {
	for _, f := range w.packs {
		err = errors.Join(err, f.discard())
	}
	w.packs = nil
	clear(w.own)
	return err
}

// End gives back every reference but one for each of keep. A pack that was not sealed goes.
func (w *Writer) End(keep []content.ObjectID) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	errs := []error{w.discard()}
	for _, id := range keep {
		if w.hits[id]--; w.hits[id] == 0 {
			delete(w.hits, id)
		}
	}
	for id, n := range w.hits {
		errs = append(errs, w.s.Unref(id, n))
	}
	clear(w.hits)
	return errors.Join(errs...)
}
