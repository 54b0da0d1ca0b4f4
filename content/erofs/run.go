package erofs

import (
	"slices"
	"sync"
)

const (
	// runSize is how many bytes of payloads a PackWriter writes with one call, from one multiple of it to the next. The
	// kernel keeps what comes with one call in large pieces, if they begin where a piece of their size may. A page at a
	// time, to write a pack takes four times as much of a processor, and so does to unlink it.
	runSize = 256 << 10
	// runMost is the largest payload that is copied into a run.
	runMost = runSize / 4
)

// run is payloads that lie one behind the other, and are written together. It ends at a multiple of runSize.
type run struct {
	at   int64  // where in the pack
	data []byte // whole blocks
}

var runPool = sync.Pool{New: func() any { return &run{data: make([]byte, 0, runSize)} }}

// collect adds a payload, which has just taken its blocks, to the run that is being filled. It returns the run that is
// to be written now, if there is one. Under mu.
func (w *PackWriter) collect(at int64, data []byte) (full *run) {
	for left := w.unit.align(int64(len(data))); left > 0; {
		if w.run == nil {
			w.run = runPool.Get().(*run)
			w.run.at, w.run.data = at, w.run.data[:0]
		}
		begin := len(w.run.data)
		size := min(left, runSize-at%runSize)
		w.run.data = w.run.data[:begin+int(size)]
		n := copy(w.run.data[begin:], data)
		clear(w.run.data[begin+n:])
		data, left, at = data[n:], left-size, at+size
		if at%runSize == 0 {
			full = w.cut()
		}
	}
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

// part of a payload, in bytes from its begin.
type part struct{ from, to int64 }

// copyRuns copies to b what runs have of the bytes from at on, and returns the parts that the file has. Under mu.
func (w *PackWriter) copyRuns(b []byte, at int64) (rest []part) {
	runs := append(w.cuts[:len(w.cuts):len(w.cuts)], w.run)
	size := int64(len(b))
	for done := int64(0); done < size; {
		next := size // where a run begins
		n := int64(0)
		for _, r := range runs {
			if r == nil {
				continue
			}
			switch in := at + done - r.at; {
			case in >= 0 && in < int64(len(r.data)):
				n = int64(copy(b[done:], r.data[in:]))
			case in < 0:
				next = min(next, r.at-at)
			}
		}
		if n == 0 {
			rest, n = append(rest, part{done, next}), next-done
		}
		done += n
	}
	return rest
}
