package object

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Writer takes the payloads of one ingest. Put and PutStream may be called concurrently; Seal and End follow when they have
// returned. Every Put takes one reference, which End gives back.
type Writer struct {
	s *Store

	mu sync.Mutex // guards what follows
	// hits are references to sealed objects, own those to what lies in this writer's pack.
	hits map[content.ObjectID]uint32
	own  map[content.ObjectID]ownSlot
	pack *erofs.PackWriter // nil until something is new
	file *os.File
	size int64 // bytes on the disk, once sealed
}

type ownSlot struct{ n, count uint32 }

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

// begun returns the pack, which the first payload begins. Under mu.
func (w *Writer) begun() (*erofs.PackWriter, error) {
	if w.pack != nil {
		return w.pack, nil
	}
	w.s.mu.Lock()
	id := w.s.newID(time.Now().UnixMicro())
	w.s.mu.Unlock()
	f, err := w.s.stage(id)
	if err != nil {
		return nil, err
	}
	w.file, w.pack = f, erofs.NewPackWriter(f, id)
	return w.pack, nil
}

// Put takes one reference to an object, and writes it when it is the first, or when the object is known to be
// bad. It reports how many bytes it wrote, 0 when the object was there.
func (w *Writer) Put(id content.ObjectID, data []byte) (added int64, err error) {
	w.mu.Lock()
	if w.known(id) {
		w.mu.Unlock()
		return 0, nil
	}
	pack, err := w.begun()
	w.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := pack.Append(id, data)
	if err != nil {
		return 0, err
	}
	return w.keep(id, n, int64(len(data))), nil
}

// keep notes what has been written. Where another worker wrote the same payload meanwhile, one of the copies is dead.
func (w *Writer) keep(id content.ObjectID, n uint32, size int64) (added int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	own, ok := w.own[id]
	if !ok {
		own.n = n
	}
	own.count++
	w.own[id] = own
	return size
}

// PutStream is Put for a payload that is too large for memory. sum returns the id of what has been read from r by then, which has to be
// size bytes.
func (w *Writer) PutStream(r io.Reader, size int64, sum func() content.ObjectID) (id content.ObjectID, added int64, err error) {
	w.mu.Lock()
	pack, err := w.begun()
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
	return id, w.keep(id, n, size), nil
}

// Read returns the bytes of an object that was put.
func (w *Writer) Read(id content.ObjectID) ([]byte, error) {
	w.mu.Lock()
	own, ok := w.own[id]
	pack := w.pack
	w.mu.Unlock()
	if !ok {
		return w.s.Read(id)
	}
	return pack.Read(own.n)
}

// Wrote returns the objects that the writer has written.
func (w *Writer) Wrote() (ids []content.ObjectID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.own {
		ids = append(ids, id)
	}
	return ids
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

// Seal makes the pack, if there is one, the store's, so that others find what is in it, and returns what it takes of the disk. It does
// not sync. Of a payload that was sealed elsewhere meanwhile, that place counts. After an error the pack is gone.
func (w *Writer) Seal() (used Counts, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pack == nil {
		return Counts{Bytes: w.size, Files: min(w.size, 1)}, nil
	}
	if len(w.own) == 0 { // a large payload turned out to be known
		return used, w.discard()
	}
	p, err := w.s.seal(w.pack, w.file)
	if err != nil {
		return used, errors.Join(err, w.discard())
	}
	w.size, w.pack, w.file = p.occupies(), nil, nil
	w.s.mu.Lock()
	w.s.add(p)
	touched := map[*pack]bool{p: true} // all of it may have been sealed elsewhere
	for id, own := range w.own {
		if old := w.s.install(id, own.count, p, own.n); old != nil {
			touched[old] = true
		}
		w.hits[id] += own.count
	}
	clear(w.own)
	moved, drops := w.s.emptied(touched)
	w.s.mu.Unlock()
	w.s.tellMoved(moved, true)
	for _, d := range drops {
		err = errors.Join(err, w.s.remove(d))
	}
	return Counts{Bytes: w.size, Files: 1}, err
}

// emptied looks at packs that have lost objects: those that chain images still name, and those that go. Under mu.
func (s *Store) emptied(packs map[*pack]bool) (held []content.PackID, drops []*pack) {
	for p := range packs {
		if d := s.droppable(p); d != nil {
			drops = append(drops, d)
		} else if p.holders > 0 {
			held = append(held, p.id)
		}
	}
	return held, drops
}

// install gives an object a place, and references. A place that is not bad counts for more than the new one. It returns the pack
// that has lost a bad object. Under mu.
func (s *Store) install(id content.ObjectID, count uint32, p *pack, n uint32) (lost *pack) {
	r := s.refs[id]
	_, bad := s.bad[id]
	if r.pack == nil || bad || r.count == 0 {
		if lost = r.pack; lost != nil && r.count > 0 {
			lost.die(r.n)
		}
		r.pack, r.n = p, n
		p.revive(n)
		delete(s.bad, id)
	}
	r.count += count
	s.refs[id] = r
	return lost
}

func (s *Store) tellMoved(packs []content.PackID, damaged bool) {
	if len(packs) > 0 && s.opts.Moved != nil {
		s.opts.Moved(packs, damaged)
	}
}

// seal ends a pack's file and puts it among the others. The file is closed, or, without an error, becomes the pack's.
func (s *Store) seal(w *erofs.PackWriter, f *os.File) (_ *pack, err error) {
	sealed, err := w.Seal()
	if err != nil {
		return nil, err
	}
	s.step("pack.sealed")
	staged := f.Name()
	if s.opts.Verity { // it is for files that nobody writes to
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
		}
		if err := verity.EnablePath(staged); err != nil {
			return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
		}
		s.step("pack.verity")
	}
	if err := os.Rename(staged, s.Path(sealed.ID)); err != nil {
		return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
	}
	s.step("pack.renamed")
	r, err := os.Open(s.Path(sealed.ID))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("seal pack %s: %w", sealed.ID, err), os.Remove(s.Path(sealed.ID)))
	}
	if !s.opts.Verity {
		_ = f.Close() // what it could tell of the disk, the sync tells
	}
	p := newPack(r, sealed)
	if err := p.measure(); err != nil {
		return nil, errors.Join(fmt.Errorf("seal pack %s: %w", sealed.ID, err), r.Close(), os.Remove(s.Path(sealed.ID)))
	}
	return p, nil
}

// discard removes a pack that was not sealed. Under mu.
func (w *Writer) discard() error {
	if w.file == nil {
		return nil
	}
	name := w.file.Name()
	_ = w.file.Close()
	w.file, w.pack = nil, nil
	clear(w.own)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a pack that was given up: %w", err)
	}
	return nil
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
