package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
)

const (
	// bufferMax is the largest payload that is read whole into memory, so that it is
	// written only when the store does not have it. Larger ones are staged in a file.
	bufferMax = 16 << 20
	// bufferMaxArriving is the same for a blob on its way. A download that stands still must not hold
	// what others wait for, so a payload has to be there before it gets one of the shared buffers.
	bufferMaxArriving = 512 << 10
	// claimMin is the smallest declared size that is checked against the free space.
	claimMin = 64 << 20
)

// session takes the payloads of one ingest. It implements archive.Payloads.
type session struct {
	s    *Store
	want goal
	ctx  context.Context
	stop context.CancelCauseFunc
	jobs chan job
	wg   sync.WaitGroup
	// queued are the jobs that no worker is done with.
	queued sync.WaitGroup
	// bufferMax is the largest payload that waits in memory.
	bufferMax int64
	// arrived takes the payloads of a blob that is on its way; nil for one that is whole.
	arrived []byte
	// ahead is Blob.Ahead.
	ahead bool
	// root is open on the store's directory from before the first write, see sync; unsynced is what that said.
	root     int
	unsynced error
	bytecode *bytecode

	// objects takes the payloads.
	objects *object.Writer

	mu    sync.Mutex // guards what follows
	added Usage      // objects that were new, as if each was a file
}

// job is one payload in memory.
type job struct {
	e   *content.Entry
	buf buffer
	// path is that of a Python source, or of the one that a compiled file belongs to.
	path   string
	source *source
	// isPyc: it is a timestamp .pyc with this header, to be stored with this timestamp.
	isPyc  bool
	header content.PycHeader
	stamp  uint32
}

func (s *Store) newSession(ctx context.Context, want goal) (*session, error) {
	root, err := s.openRoot()
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	ss := &session{
		s: s, want: want, ctx: ctx, stop: stop, bufferMax: bufferMax, root: root,
		jobs:     make(chan job, 256),
		objects:  s.objects.Begin(),
		bytecode: newBytecode(),
	}
	for range ingestWorkers() {
		ss.wg.Go(func() {
			for j := range ss.jobs {
				ss.work(j)
				ss.queued.Done()
			}
		})
	}
	return ss, nil
}

// work stores one payload, and gives its memory back.
func (ss *session) work(j job) {
	if ss.ctx.Err() == nil {
		if err := safely(func() error { return ss.store(j) }); err != nil {
			ss.stop(err)
		}
	}
	j.buf.release()
}

// ingestWorkers is how many write payloads at a time.
func ingestWorkers() int { return max(2, runtime.GOMAXPROCS(0)) }

// wait ends the workers; no Put may follow. It returns the first error.
func (ss *session) wait() error {
	if err := ss.lonely(); err != nil {
		ss.stop(err)
	}
	close(ss.jobs)
	ss.wg.Wait()
	ss.abandon()
	return context.Cause(ss.ctx)
}

// end gives back every reference of the session but one for each of keep.
func (ss *session) end(keep []content.ObjectID) error {
	ss.stop(nil)
	wrote := ss.objects.Wrote()
	err := ss.objects.End(keep)
	if ss.unsynced != nil {
		ss.s.distrust(context.WithoutCancel(ss.ctx), wrote)
	}
	return errors.Join(err, unix.Close(ss.root))
}

// Put reads one payload and hands it to a worker.
func (ss *session) Put(e *content.Entry, r io.Reader) error {
	if e.Size > claimMin {
		if err := ss.s.checkRoom(ss.ctx, e.Size); err != nil {
			return err
		}
	}
	if e.Size > ss.bufferMax {
		return ss.stage(e, r)
	}
	if ss.arrived != nil {
		arrived := ss.arrived[:e.Size]
		if _, err := io.ReadFull(r, arrived); err != nil {
			return err
		}
		r = bytes.NewReader(arrived)
	}
	buf, err := ss.s.buffers.get(ss.ctx, int(e.Size))
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(r, buf.data); err != nil {
		buf.release()
		return err
	}
	j := job{e: e, buf: buf}
	ss.python(&j)
	if parked, err := ss.park(&j); parked || err != nil {
		return err
	}
	return ss.submit(j)
}

// submit hands a payload to a worker.
func (ss *session) submit(j job) error {
	ss.queued.Add(1)
	select {
	case ss.jobs <- j:
		return nil
	case <-ss.ctx.Done():
		ss.queued.Done()
		j.buf.release()
		return context.Cause(ss.ctx)
	}
}

// store names and stores one payload.
func (ss *session) store(j job) error {
	e, buf := j.e, j.buf.data
	p := pyc{header: j.header, stamp: j.stamp}
	if j.isPyc && ss.want.fidelity != content.Exact {
		content.SetPycTime(buf, j.stamp)
	}
	if e.Size <= content.InlineMax {
		e.Data = append([]byte(nil), buf...)
	} else {
		id := content.ObjectID{Sum: sha256.Sum256(buf)}
		added, err := ss.objects.Put(id, buf)
		if err != nil {
			return err
		}
		e.Object = id
		if err := ss.took(added); err != nil {
			return err
		}
		if p.canonical = id; j.isPyc && ss.want.fidelity == content.Exact && j.stamp != j.header.Mtime {
			p.canonical = canonicalID(buf, j.stamp)
		}
	}
	if j.isPyc {
		ss.bytecode.note(e, p)
	}
	if j.source != nil {
		ss.hashed(j)
	}
	return nil
}

func canonicalID(buf []byte, stamp uint32) (id content.ObjectID) {
	var head [content.PycHeaderLen]byte
	copy(head[:], buf)
	content.SetPycTime(head[:], stamp)
	h := sha256.New()
	h.Write(head[:])
	h.Write(buf[len(head):])
	h.Sum(id.Sum[:0])
	return id
}

// took counts an object that was put; every so often it looks at how much room is left.
func (ss *session) took(added int64) error {
	if added == 0 {
		return nil
	}
	ss.mu.Lock()
	before := ss.added
	ss.added.Bytes += erofs.Space(added, ss.s.opts.Dense)
	ss.added.Inodes++
	look := before.Inodes%roomInodes == 0 || before.Bytes/roomBytes != ss.added.Bytes/roomBytes
	ss.mu.Unlock()
	ss.s.step("ingest.object")
	if !look {
		return nil
	}
	return ss.s.checkRoom(ss.ctx, 0)
}

// stage stores a large payload, hashing it beside. It comes last in the pack by then, so that one that turns out to
// be known leaves no hole.
func (ss *session) stage(e *content.Entry, r io.Reader) error {
	ss.queued.Wait()
	h := newAsyncHash()
	var sum *content.ObjectID
	total := func() content.ObjectID {
		if sum == nil {
			sum = &content.ObjectID{Sum: h.sum()}
		}
		return *sum
	}
	defer total() // it has a goroutine
	head := &headReader{r: ctxReader{ss.ctx, r}}
	id, added, err := ss.objects.PutStream(io.TeeReader(head, h), e.Size, total)
	if err != nil {
		return fmt.Errorf("store payload: %w", err)
	}
	e.Object = id
	if err := ss.took(added); err != nil {
		return err
	}
	ss.pythonStaged(e, head.head)
	return nil
}

// headReader keeps as much as a header of bytecode has of what is read.
type headReader struct {
	r    io.Reader
	head []byte
}

func (h *headReader) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.head = append(h.head, p[:min(n, content.PycHeaderLen-len(h.head))]...)
	return n, err
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// asyncHash hashes on another core than its writer.
type asyncHash struct {
	ch   chan []byte
	free chan []byte
	done chan struct{}
	h    hash.Hash
}

func newAsyncHash() *asyncHash {
	a := &asyncHash{ch: make(chan []byte, 4), free: make(chan []byte, 4), done: make(chan struct{}), h: sha256.New()}
	for range cap(a.free) {
		a.free <- nil
	}
	go func() {
		defer close(a.done)
		for b := range a.ch {
			a.h.Write(b)
			a.free <- b
		}
	}()
	return a
}

func (a *asyncHash) Write(p []byte) (int, error) {
	a.ch <- append((<-a.free)[:0], p...)
	return len(p), nil
}

// sum ends the hash.
func (a *asyncHash) sum() (s content.Sum) {
	close(a.ch)
	<-a.done
	a.h.Sum(s[:0])
	return s
}
