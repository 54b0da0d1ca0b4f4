package layer

import (
	"crypto/sha256"
	"strings"
	"sync"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Compiled files mostly come before their sources (__pycache__ sorts before lower case), and carry a timestamp that
// follows from these. So their payloads wait in memory until the source has been hashed. There is room for few of
// them: the longest wait ends when it is used up, and at the end of the layer; such a payload is stored as it is, and
// settlePython has it stored once more if it turns out to be half of a pair.
const (
	// waitingEach is the largest that waits.
	waitingEach = 4 << 20
)

// bytecode is what a session knows of Python's files.
type bytecode struct {
	mu      sync.Mutex // guards what follows
	found   map[*content.Entry]pyc
	sources map[string]*source
	// waiting are compiled files by the path of their source, queue all of them in the order in which they came.
	waiting map[string][]*waiter
	queue   []*waiter
}

// source is a .py that has come by.
type source struct {
	mtime, size uint32
	hashed      bool
	time        uint32 // once hashed: its SourceTime
}

// waiter is a compiled file that waits.
type waiter struct {
	job
	gone bool // it does not wait any more
}

func newBytecode() *bytecode {
	return &bytecode{found: map[*content.Entry]pyc{}, sources: map[string]*source{}, waiting: map[string][]*waiter{}}
}

// python notes what Put can tell of a payload: only its caller may look at e, whose fields a later hard link may
// change.
func (ss *session) python(j *job) {
	b := ss.bytecode
	switch {
	case strings.HasSuffix(j.e.Path, ".py"):
		s := &source{mtime: uint32(j.e.Mtime.Sec), size: uint32(j.e.Size)}
		j.path, j.source = j.e.Path, s
		b.mu.Lock()
		b.sources[j.path] = s
		b.mu.Unlock()
	case strings.HasSuffix(j.e.Path, ".pyc") && j.e.Size <= bufferMax:
		j.header, j.isPyc = content.ParsePyc(j.buf.data)
		j.stamp = j.header.Mtime
		j.path, _ = content.PycSource(j.e.Path)
	}
}

// pythonStaged is python and the rest for a payload that went through a file.
func (ss *session) pythonStaged(e *content.Entry, head []byte) {
	j := job{e: e, buf: buffer{data: head}}
	ss.python(&j)
	if j.isPyc {
		ss.bytecode.note(e, pyc{header: j.header, stamp: j.stamp, canonical: e.Object})
	}
	if j.source != nil {
		ss.hashed(j)
	}
}

// park lets a compiled file wait for its source, and reports whether it does. What has waited for longest may have to
// go on for it.
func (ss *session) park(j *job) (parked bool, err error) {
	n := len(j.buf.data)
	if !j.isPyc || j.path == "" || ss.stamped(j) || n > waitingEach {
		return false, nil
	}
	// It waits apart from what waits for the disk: that must not be held up by what is still to come.
	buf, ok, err := ss.s.parked.try(n)
	for ; !ok && err == nil; buf, ok, err = ss.s.parked.try(n) {
		old := ss.bytecode.oldest()
		if old == nil { // others have taken all room
			return false, nil
		}
		ss.work(old.job)
	}
	if err != nil {
		j.buf.release()
		return false, err
	}
	copy(buf.data, j.buf.data)
	j.buf.release()
	j.buf = buf
	b := ss.bytecode
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.sources[j.path]; s != nil && s.hashed { // just now
		j.stamp = s.stamp(j.header)
		return false, nil
	}
	w := &waiter{job: *j}
	b.waiting[j.path] = append(b.waiting[j.path], w)
	b.queue = append(b.queue, w)
	return true, nil
}

// stamped sets the timestamp of a compiled file whose source is known, or has no bytes.
func (ss *session) stamped(j *job) bool {
	b := ss.bytecode
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.sources[j.path]
	switch {
	case s != nil && s.hashed:
		j.stamp = s.stamp(j.header)
	case j.header.Size == 0: // most likely it is an empty __init__.py, which no Put tells of
		j.stamp = content.SourceTime(sha256.Sum256(nil))
	default:
		return false
	}
	return true
}

// stamp is what a compiled file with this header is to carry.
func (s *source) stamp(h content.PycHeader) uint32 {
	if h.Mtime == s.mtime && h.Size == s.size {
		return s.time
	}
	return h.Mtime
}

// oldest takes the compiled file that has waited for longest out of the queue; nil when none waits.
func (b *bytecode) oldest() *waiter {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.queue) > 0 {
		w := b.queue[0]
		b.queue = b.queue[1:]
		if !w.gone {
			w.gone = true
			return w
		}
	}
	return nil
}

// hashed notes that a source has been stored, and stores what has waited for it.
func (ss *session) hashed(j job) {
	b := ss.bytecode
	b.mu.Lock()
	j.source.time, j.source.hashed = j.e.SourceTime(), true
	waiting := b.waiting[j.path]
	delete(b.waiting, j.path)
	var ready []job
	for _, w := range waiting {
		if !w.gone {
			w.gone = true
			w.stamp = j.source.stamp(w.header)
			ready = append(ready, w.job)
		}
	}
	b.mu.Unlock()
	for _, r := range ready {
		ss.work(r)
	}
}

// lonely has all stored that waits for a source that the layer does not have.
func (ss *session) lonely() error {
	b := ss.bytecode
	b.mu.Lock()
	var lonely []*waiter
	for path, waiting := range b.waiting {
		if b.sources[path] == nil {
			lonely = append(lonely, waiting...)
		}
	}
	b.mu.Unlock()
	for _, w := range lonely {
		if w.gone {
			continue
		}
		w.gone = true
		if err := ss.submit(w.job); err != nil {
			return err
		}
	}
	return nil
}

// abandon gives back the memory of what still waits, after an error.
func (ss *session) abandon() {
	for w := ss.bytecode.oldest(); w != nil; w = ss.bytecode.oldest() {
		w.job.buf.release()
	}
}

// note keeps what is known of a compiled file that has been stored.
func (b *bytecode) note(e *content.Entry, p pyc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.found[e] = p
}

// restamp implements the type restamp.
func (ss *session) restamp(e *content.Entry, _ pyc, stamp uint32) (id content.ObjectID, err error) {
	buf, err := ss.objects.Read(e.Object)
	if err != nil {
		return id, err
	}
	content.SetPycTime(buf, stamp)
	id.Sum = sha256.Sum256(buf)
	if ss.want.fidelity == content.Exact {
		return id, nil
	}
	added, err := ss.objects.Put(id, buf)
	if err != nil {
		return id, err
	}
	return id, ss.took(added)
}
