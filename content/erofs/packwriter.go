package erofs

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// writeOut is how much a PackWriter collects before it has the kernel begin to write it to the disk, so that the sync
// at the end finds little left.
const writeOut = 8 << 20

// PackWriter writes one pack. All methods but Seal may be called concurrently; Seal comes last, when all others have
// returned. A pack is not durable before its file system has been synced.
type PackWriter struct {
	f    *os.File
	id   content.PackID
	unit blocks

	mu    sync.Mutex // guards what follows
	slots []Slot
	next  int64  // the first free byte, at a whole block
	err   error  // the first that a write gave; the pack is lost then
	run   *run   // payloads that wait to be written together: the last of the pack
	cuts  []*run // those that are being written
	// What was written since the kernel was last asked to begin with it: where, and how much of that.
	from, to, dirty int64
	// asking: the kernel is being asked.
	asking bool
}

// NewPackWriter begins a pack in an empty file, which stays the caller's. Kernels before 6.4 do not mount a dense one,
// but for 6.1 from 6.1.115 on.
func NewPackWriter(f *os.File, id content.PackID, dense bool) *PackWriter {
	return &PackWriter{f: f, id: id, unit: blocksOf(dense), next: blockSize, from: math.MaxInt64}
}

// ID returns the pack's id.
func (w *PackWriter) ID() content.PackID { return w.id }

// Payloads returns how many bytes the payloads take by now, in whole blocks.
func (w *PackWriter) Payloads() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next - blockSize
}

// Append adds a payload, which is not empty, and returns the number of its slot. A small payload may be written with
// later ones: then a later call, Seal at the end, says what has failed.
func (w *PackWriter) Append(id content.ObjectID, data []byte) (n uint32, err error) {
	w.mu.Lock()
	n, at, err := w.take(Slot{ID: id, Size: int64(len(data))})
	if err != nil {
		w.mu.Unlock()
		return 0, err
	}
	small := len(data) <= runMost
	var full *run
	if small {
		full = w.collect(at, data)
	} else {
		full = w.cut()
	}
	w.mu.Unlock()
	if err := w.put(full); err != nil || small {
		return n, err
	}
	_, err = w.write(data, at)
	return n, err
}

// take gives a payload its slot and its blocks. Under mu.
func (w *PackWriter) take(s Slot) (n uint32, at int64, err error) {
	end := w.next + w.unit.align(s.Size)
	switch {
	case w.err != nil:
		return 0, 0, w.err
	case w.id > content.MaxPackID:
		return 0, 0, fmt.Errorf("%d is no pack's id", uint64(w.id))
	case s.Size <= 0:
		return 0, 0, fmt.Errorf("payload of %d bytes in a pack", s.Size)
	case len(w.slots) >= maxSlots || end > math.MaxUint32*w.unit.size()-maxMeta:
		return 0, 0, fmt.Errorf("pack %s is full: %d payloads, %d bytes", w.id, len(w.slots), w.next)
	}
	n, at = uint32(len(w.slots)), w.next
	s.Offset = at
	w.slots = append(w.slots, s)
	w.next = end
	return n, at, nil
}

// write puts bytes of payloads at an offset, and has the kernel begin to write to the disk what has collected.
func (w *PackWriter) write(p []byte, offset int64) (int, error) {
	n, err := w.f.WriteAt(p, offset)
	w.mu.Lock()
	if err != nil {
		if w.err == nil {
			w.err = fmt.Errorf("write pack %s: %w", w.id, err)
		}
		err = w.err
		w.mu.Unlock()
		return n, err
	}
	w.from, w.to, w.dirty = min(w.from, offset), max(w.to, offset+int64(n)), w.dirty+int64(n)
	if w.dirty >= writeOut && !w.asking {
		go w.begin(w.from, w.to-w.from)
		w.asking, w.from, w.to, w.dirty = true, math.MaxInt64, 0, 0
	}
	w.mu.Unlock()
	return n, nil
}

// begin has the kernel begin to write a range. It blocks while the disk has more to do than it takes. It is a hint:
// where it does not work, the sync has more to do.
func (w *PackWriter) begin(from, length int64) {
	if c, err := w.f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), from, length, unix.SYNC_FILE_RANGE_WRITE) })
	}
	w.mu.Lock()
	w.asking = false
	w.mu.Unlock()
}

// Read returns the payload of a slot that Append or Commit returned, as it was written.
func (w *PackWriter) Read(n uint32) ([]byte, error) {
	w.mu.Lock()
	if int(n) >= len(w.slots) {
		w.mu.Unlock()
		return nil, fmt.Errorf("pack %s has no slot %d", w.id, n)
	}
	if w.err != nil { // the file may lack what was put
		w.mu.Unlock()
		return nil, w.err
	}
	s := w.slots[n]
	b := make([]byte, s.Size)
	at := s.Offset
	rest := w.copyRuns(b, at)
	w.mu.Unlock()
	for _, p := range rest {
		if _, err := w.f.ReadAt(b[p.from:p.to], at+p.from); err != nil {
			return nil, fmt.Errorf("read from pack %s: %w", w.id, err)
		}
	}
	return b, nil
}

// Extent is room for a payload whose id is known only at its end. One goroutine uses it, and ends it with Commit or
// Abort.
type Extent struct {
	w       *PackWriter
	n       uint32
	slot    Slot
	written int64
	ended   bool
}

// Stream takes room for a payload of this many bytes.
func (w *PackWriter) Stream(size int64) (*Extent, error) {
	w.mu.Lock()
	n, at, err := w.take(Slot{Size: size})
	full := w.cut()
	w.mu.Unlock()
	if err := errors.Join(err, w.put(full)); err != nil {
		return nil, err
	}
	return &Extent{w: w, n: n, slot: Slot{Offset: at, Size: size}}, nil
}

// Write adds bytes to the payload.
func (e *Extent) Write(p []byte) (int, error) {
	if int64(len(p)) > e.slot.Size-e.written {
		return 0, fmt.Errorf("payload of %d bytes has more than these: %w", e.slot.Size, io.ErrShortWrite)
	}
	n, err := e.w.write(p, e.slot.Offset+e.written)
	e.written += int64(n)
	return n, err
}

// Commit names a payload that is complete, and returns the number of its slot.
func (e *Extent) Commit(id content.ObjectID) (n uint32, err error) {
	if e.written != e.slot.Size {
		return 0, fmt.Errorf("payload of %d bytes ends after %d: %w", e.slot.Size, e.written, io.ErrUnexpectedEOF)
	}
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.slots[e.n].ID = id
	e.ended = true
	return e.n, nil
}

// Abort gives the room back. The last payload's blocks are used again, others become a hole. After Commit it does
// nothing.
func (e *Extent) Abort() error {
	if e.ended {
		return nil
	}
	e.ended = true
	w := e.w
	w.mu.Lock()
	defer w.mu.Unlock()
	length := w.unit.align(e.slot.Size)
	w.slots[e.n] = Slot{}
	if int(e.n) == len(w.slots)-1 && w.next == e.slot.Offset+length {
		w.slots, w.next = w.slots[:e.n], e.slot.Offset
		if err := w.f.Truncate(w.next); err != nil {
			return fmt.Errorf("shorten pack %s: %w", w.id, err)
		}
		return nil
	}
	err := unix.Fallocate(int(w.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
		e.slot.Offset, length)
	if errors.Is(err, unix.ENOTSUP) {
		return nil // the blocks stay until the pack is merged
	}
	if err != nil {
		return fmt.Errorf("give room in pack %s back: %w", w.id, err)
	}
	return nil
}

// Seal writes what makes the payloads a pack, the superblock last. It does not sync.
func (w *PackWriter) Seal() (*Pack, error) {
	w.mu.Lock()
	last := w.cut()
	w.mu.Unlock()
	_ = w.put(last) // what it gives is the pack's error
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, w.err
	}
	p := &Pack{ID: w.id, Dense: w.unit == dense, Slots: w.slots, Meta: uint32(coarse.count(w.next))}
	for n, s := range p.Slots {
		if s.ID.IsZero() && s.Size > 0 {
			return nil, fmt.Errorf("seal pack %s: the payload of slot %d was never committed", w.id, n)
		}
	}
	super, tail, err := p.encodeTail()
	if err != nil {
		return nil, err
	}
	if _, err = w.f.WriteAt(tail, int64(p.Meta)*blockSize); err == nil {
		_, err = w.f.WriteAt(super, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("seal pack %s: %w", w.id, err)
	}
	return p, nil
}
