package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/bits"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const (
	// bufferMax is the largest payload that is read whole into memory, so that it is
	// written only when the store does not have it. Larger ones are staged in a file.
	bufferMax = 16 << 20
	// bufferMaxArriving is the same for a blob on its way: a download that stands still must not hold
	// the memory that others wait for.
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
	// bufferMax is the largest payload that waits in memory.
	bufferMax int64
	// ahead is Blob.Ahead.
	ahead bool
	// root is open on the store's directory from before the first write, see sync; unsynced is what that said.
	root     int
	unsynced error

	mu    sync.Mutex // guards what follows
	refs  map[content.ObjectID]uint32
	added Usage
	pyc   map[*content.Entry]pyc
	// wrote are the objects that this session has written.
	wrote []content.ObjectID
}

// job is one payload in memory.
type job struct {
	e   *content.Entry
	buf []byte
	// maybePyc is decided by the member's own name: a later hard link may still change e's other fields.
	maybePyc bool
}

// pyc is what is known of an entry that looks like a timestamp .pyc.
type pyc struct {
	header content.PycHeader
	// canonical is the id of the payload with the canonical timestamp; zero for
	// one with inline Data.
	canonical content.ObjectID
}

func (s *Store) newSession(ctx context.Context, want goal) (*session, error) {
	root, err := s.openRoot()
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	ss := &session{
		s: s, want: want, ctx: ctx, stop: stop, bufferMax: bufferMax, root: root,
		jobs: make(chan job, 256),
		refs: map[content.ObjectID]uint32{},
		pyc:  map[*content.Entry]pyc{},
	}
	for range ingestWorkers(s.opts.Verity) {
		ss.wg.Go(func() {
			for j := range ss.jobs {
				if ss.ctx.Err() == nil {
					if err := safely(func() error { return ss.store(j) }); err != nil {
						ss.stop(err)
					}
				}
				putBuffer(j.buf)
				ss.giveBack(int64(len(j.buf)))
			}
		})
	}
	return ss, nil
}

// ingestWorkers is how many write payloads at a time.
func ingestWorkers(hashed bool) int {
	n := max(2, runtime.GOMAXPROCS(0))
	if hashed {
		n *= veritySpread
	}
	return n
}

// wait ends the workers; no Put may follow. It returns the first error.
func (ss *session) wait() error {
	close(ss.jobs)
	ss.wg.Wait()
	return context.Cause(ss.ctx)
}

// end gives back every reference of the session but those in keep.
func (ss *session) end(keep []content.ObjectID) error {
	ss.stop(nil)
	for _, id := range keep {
		if ss.refs[id]--; ss.refs[id] == 0 {
			delete(ss.refs, id)
		}
	}
	var errs []error
	for id, n := range ss.refs {
		errs = append(errs, ss.s.objects.Unref(id, n))
	}
	if ss.unsynced != nil {
		ss.s.distrust(context.WithoutCancel(ss.ctx), ss.wrote)
	}
	return errors.Join(append(errs, unix.Close(ss.root))...)
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
	if err := ss.s.memory.Acquire(ss.ctx, e.Size); err != nil {
		return context.Cause(ss.ctx)
	}
	ss.s.buffered.Add(e.Size)
	buf := getBuffer(int(e.Size))
	if _, err := io.ReadFull(r, buf); err != nil {
		putBuffer(buf)
		ss.giveBack(e.Size)
		return err
	}
	select {
	case ss.jobs <- job{e, buf, strings.HasSuffix(e.Path, ".pyc")}:
		return nil
	case <-ss.ctx.Done():
		putBuffer(buf)
		ss.giveBack(e.Size)
		return context.Cause(ss.ctx)
	}
}

// giveBack gives back memory that Put took.
func (ss *session) giveBack(n int64) {
	ss.s.buffered.Add(-n)
	ss.s.memory.Release(n)
}

// store names and stores one payload.
func (ss *session) store(j job) error {
	e, buf := j.e, j.buf
	header, isPyc := content.PycHeader{}, false
	if j.maybePyc {
		header, isPyc = content.ParsePyc(buf)
	}
	p := pyc{header: header}
	if isPyc && ss.want.fidelity != content.Exact {
		// Most of them turn out to be half of a valid pair. finish undoes it for the others.
		content.SetPycTime(buf, content.PycTime)
	}
	if e.Size <= content.InlineMax {
		e.Data = append([]byte(nil), buf...)
	} else {
		id := content.ObjectID{Sum: sha256.Sum256(buf)}
		added, err := ss.s.objects.Put(id, buf)
		if err != nil {
			return err
		}
		e.Object = id
		if err := ss.took(id, added); err != nil {
			return err
		}
		if p.canonical = id; isPyc && ss.want.fidelity == content.Exact {
			p.canonical = canonicalID(buf)
		}
	}
	if isPyc {
		ss.mu.Lock()
		ss.pyc[e] = p
		ss.mu.Unlock()
	}
	return nil
}

func canonicalID(buf []byte) (id content.ObjectID) {
	var head [content.PycHeaderLen]byte
	copy(head[:], buf)
	content.SetPycTime(head[:], content.PycTime)
	h := sha256.New()
	h.Write(head[:])
	h.Write(buf[len(head):])
	h.Sum(id.Sum[:0])
	return id
}

// took counts an object that was put; every so often it looks at how much room is left.
func (ss *session) took(id content.ObjectID, added int64) error {
	ss.mu.Lock()
	ss.refs[id]++
	if added == 0 {
		ss.mu.Unlock()
		return nil
	}
	before := ss.added
	ss.added.Bytes += ss.s.objects.Occupies(added)
	ss.added.Inodes++
	ss.wrote = append(ss.wrote, id)
	look := before.Inodes%roomInodes == 0 || before.Bytes/roomBytes != ss.added.Bytes/roomBytes
	ss.mu.Unlock()
	ss.s.step("ingest.object")
	if !look {
		return nil
	}
	return ss.s.checkRoom(ss.ctx, 0)
}

// stage writes a large payload to a file, hashing it beside.
func (ss *session) stage(e *content.Entry, r io.Reader) error {
	f, err := os.CreateTemp(ss.s.path(dirIngest), "object-")
	if err != nil {
		return fmt.Errorf("stage payload: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	h := newAsyncHash()
	_, err = io.CopyBuffer(io.MultiWriter(struct{ io.Writer }{f}, h), io.LimitReader(ctxReader{ss.ctx, r}, e.Size), make([]byte, chunkSize))
	id := content.ObjectID{Sum: h.sum()}
	if err == nil {
		var fi os.FileInfo
		if fi, err = f.Stat(); err == nil && fi.Size() != e.Size {
			err = io.ErrUnexpectedEOF
		}
	}
	if err == nil {
		err = errors.Join(f.Chmod(0o400), f.Close()) // fs-verity is for files that nobody writes to
	}
	if err != nil {
		return fmt.Errorf("stage payload: %w", err)
	}
	ss.s.step("ingest.staged")
	added, err := ss.s.objects.PutFile(id, f.Name(), e.Size)
	if err != nil {
		return err
	}
	e.Object = id
	return ss.took(id, added)
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

// Buffers are pooled by powers of two from 4 KiB to bufferMax.
const bufferMinBits = 12

var buffers [bits.UintSize]sync.Pool

func bufferClass(n int) int { return max(bufferMinBits, bits.Len(uint(n-1))) }

func getBuffer(n int) []byte {
	class := bufferClass(n)
	if b, ok := buffers[class].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<class)
}

func putBuffer(b []byte) {
	buffers[bufferClass(cap(b))].Put(&b)
}
