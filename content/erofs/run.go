package erofs

import (
	"slices"
	"sync"
)

const (
	// runSize is how many bytes of payloads a PackWriter writes with one call. The kernel keeps what comes with one call
	// in large pieces: a page at a time, to write a pack takes four times as much of a processor, and so does to unlink
	// it.
	runSize = 256 << 10
	// runMost is the largest payload that is copied into a run.
	runMost = runSize / 4
)

// run is payloads that lie one behind the other, and are written together.
type run struct {
	at   int64  // where in the pack
	data []byte // whole blocks
}

var runPool = sync.Pool{New: func() any { return &run{data: make([]byte, 0, runSize)} }}

// collect adds a payload, which has just taken its blocks, to the run that is being filled. It returns the run that is
// to be written now, if there is one. Under mu.
func (w *PackWriter) collect(at int64, data []byte) (full *run) {
	size := blocksOf(int64(len(data))) * blockSize
	if w.run != nil && len(w.run.data)+int(size) > runSize {
		full = w.cut()
	}
	if w.run == nil {
		w.run = runPool.Get().(*run)
		w.run.at, w.run.data = at, w.run.data[:0]
	}
	begin := len(w.run.data)
	w.run.data = w.run.data[:begin+int(size)]
	n := copy(w.run.data[begin:], data)
	clear(w.run.data[begin+n:])
	return full
}

// cut ends the run that is being filled, and returns it, nil if there is none. Under mu. The caller writes it.
func (w *PackWriter) cut() *run {
	r := w.run
	if w.run = nil; r != nil {
		w.cuts = append(w.cuts, r)
	}
	return r
}

// put writes a run that was cut.
func (w *PackWriter) put(r *run) error {
	if r == nil {
		return nil
	}
	_, err := w.write(r.data, r.at)
	w.mu.Lock()
	w.cuts = slices.DeleteFunc(w.cuts, func(other *run) bool { return other == r })
	w.mu.Unlock()
	runPool.Put(r)
	return err
}

// waiting returns a copy of a payload that is in no file yet, nil for any other. Under mu.
func (w *PackWriter) waiting(s Slot) []byte {
	at := int64(s.Block) * blockSize
	for _, r := range append(w.cuts[:len(w.cuts):len(w.cuts)], w.run) {
		if r != nil && at >= r.at && at+s.Size <= r.at+int64(len(r.data)) {
			return slices.Clone(r.data[at-r.at:][:s.Size])
		}
	}
	return nil
}
