package layer

import (
	"crypto/sha256"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A tar stream is decompressed, hashed and parsed at the same time:
//
//	decompressor --chunks--> diffID hash
//	                   \---> tar reader --payloads--> workers (hash, store)
//
// Chunks are shared, so that each byte of the tar is copied once out of them.
const (
	chunkSize  = 256 << 10
	chunkQueue = 16 // chunks that one consumer may lag behind the other
)

type chunk struct {
	buf  []byte
	refs atomic.Int32
}

var chunkPool = sync.Pool{New: func() any { return &chunk{buf: make([]byte, 0, chunkSize)} }}

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 {
		chunkPool.Put(c)
	}
}

// stream is a tar on its way from the decompressor to its two consumers.
type stream struct {
	toHash, toTar chan *chunk
	stop          chan struct{} // closed when the tar reader gives up
	stopOnce      sync.Once
	wg            sync.WaitGroup
	err           error // of the source; read after toTar is closed
	size          int64
	diffID        content.DiffID

	cur *chunk // of the tar reader
	off int
}

// newStream starts to read src. The caller reads the tar from the stream, and calls finish.
func newStream(src io.Reader) *stream {
	s := &stream{
		toHash: make(chan *chunk, chunkQueue),
		toTar:  make(chan *chunk, chunkQueue),
		stop:   make(chan struct{}),
	}
	s.wg.Go(func() { s.produce(src) })
	s.wg.Go(func() {
		h := sha256.New()
		for c := range s.toHash {
			h.Write(c.buf)
			c.release()
		}
		h.Sum(s.diffID.Sum[:0])
	})
	return s
}

func (s *stream) produce(src io.Reader) {
	defer close(s.toTar)
	defer close(s.toHash)
	for {
		c := chunkPool.Get().(*chunk)
		err := safely(func() (err error) {
			c.buf, err = fill(src, c.buf[:0])
			return err
		})
		s.size += int64(len(c.buf))
		if len(c.buf) > 0 {
			c.refs.Store(2)
			s.toHash <- c
			select {
			case s.toTar <- c:
			case <-s.stop:
				c.release()
				return
			}
		}
		if err != nil {
			if err != io.EOF {
				s.err = err
			}
			return
		}
	}
}

// fill reads until buf's capacity is used. Unlike io.ReadFull it tells a source that ends
// early (io.ErrUnexpectedEOF from a decompressor) from a short last chunk.
func fill(src io.Reader, buf []byte) ([]byte, error) {
	for len(buf) < cap(buf) {
		n, err := src.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			return buf, err
		}
	}
	return buf, nil
}

// Read is the tar reader's side.
func (s *stream) Read(p []byte) (int, error) {
	for s.cur == nil || s.off == len(s.cur.buf) {
		if s.cur != nil {
			s.cur.release()
			s.cur = nil
		}
		c, ok := <-s.toTar
		if !ok {
			if s.err != nil {
				return 0, s.err
			}
			return 0, io.EOF
		}
		s.cur, s.off = c, 0
	}
	n := copy(p, s.cur.buf[s.off:])
	s.off += n
	return n, nil
}

// finish reads what follows the tar's end, since it counts for the diffID, and waits. With
// an error from the tar reader it stops the source instead.
func (s *stream) finish(tarErr error) error {
	if tarErr != nil {
		s.stopOnce.Do(func() { close(s.stop) })
	}
	for c := range s.toTar {
		c.release()
	}
	s.wg.Wait()
	if tarErr != nil {
		return tarErr
	}
	if s.err != nil {
		return fmt.Errorf("read layer: %w", s.err)
	}
	return nil
}
