// Package source serves layers' blobs that the store can make again, over containerd's content API, to read only. Who
// may connect is the socket's mode: root alone.
//
// A blob is made as a whole, compared with its digest, and only then read from: into a file without a name, so that a
// client may read it in any order and nothing stays after a crash. It is kept for a while after the last read, since a
// client reads a blob in many calls.
package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

const (
	// keptFor is how long a blob stays after its last reader.
	keptFor = 30 * time.Second
	// maxKept is how many blobs may be there at a time, read ones included.
	maxKept = 8
)

// Source is a content store of what can be made again. Safe for concurrent use.
type Source struct {
	layers *layer.Store
	kept   time.Duration // keptFor but in tests

	mu    sync.Mutex // guards what follows
	blobs map[digest.Digest]*blob
}

// blob is one that has been made, or is being made until ready is closed.
type blob struct {
	ready chan struct{}
	file  *os.File
	size  int64
	err   error

	readers int         // under mu of the Source
	idle    *time.Timer // runs while there are none
}

// New serves the blobs of a store. The caller closes it when nobody reads any more.
func New(layers *layer.Store) *Source {
	return &Source{layers: layers, kept: keptFor, blobs: map[digest.Digest]*blob{}}
}

// Server is the content service.
func (s *Source) Server() contentapi.ContentServer { return contentserver.New(readOnly{s}) }

// Close lets go of what is kept.
func (s *Source) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for d, b := range s.blobs {
		if b.readers == 0 {
			b.idle.Stop()
			errs = append(errs, b.file.Close())
			delete(s.blobs, d)
		}
	}
	return errors.Join(errs...)
}

// open returns a blob that is whole, with a reader counted.
func (s *Source) open(ctx context.Context, d digest.Digest) (*blob, error) {
	for {
		b, mine, err := s.take(d)
		if err != nil {
			return nil, err
		}
		if mine {
			b.file, b.size, b.err = layer.OpenBlob(ctx, s.layers, d)
			if b.err != nil {
				s.mu.Lock()
				delete(s.blobs, d)
				s.mu.Unlock()
			}
			close(b.ready)
			return b, b.err
		}
		select {
		case <-b.ready:
		case <-ctx.Done():
			s.release(b, d)
			return nil, context.Cause(ctx)
		}
		if b.err == nil {
			return b, nil
		}
		if !errors.Is(b.err, context.Canceled) && !errors.Is(b.err, context.DeadlineExceeded) {
			return nil, b.err
		} // whose client has gone: this one makes it
	}
}

// take counts a reader of a blob. mine: the caller makes it, and closes ready.
func (s *Source) take(d digest.Digest) (b *blob, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b = s.blobs[d]; b != nil {
		if b.readers++; b.idle != nil {
			b.idle.Stop()
			b.idle = nil
		}
		return b, false, nil
	}
	if len(s.blobs) >= maxKept && !s.evict() {
		return nil, false, fmt.Errorf("%d blobs are being read: try again when one is done: %w", maxKept,
			errdefs.ErrResourceExhausted)
	}
	b = &blob{ready: make(chan struct{}), readers: 1}
	s.blobs[d] = b
	return b, true, nil
}

// evict makes room by a blob that nobody reads. Under mu.
func (s *Source) evict() bool {
	for d, b := range s.blobs {
		if b.idle != nil {
			b.idle.Stop()
			_ = b.file.Close() // it was only read
			delete(s.blobs, d)
			return true
		}
	}
	return false
}

// release takes a reader away.
func (s *Source) release(b *blob, d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.readers--; b.readers > 0 || s.blobs[d] != b {
		return
	}
	b.idle = time.AfterFunc(s.kept, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.blobs[d] == b && b.readers == 0 && b.idle != nil {
			_ = b.file.Close() // it was only read
			delete(s.blobs, d)
		}
	})
}

// readOnly implements containerd's content.Store.
type readOnly struct{ s *Source }

func info(b layer.BlobInfo) ctdcontent.Info {
	return ctdcontent.Info{Digest: b.Digest, Size: b.Size, CreatedAt: b.Created, UpdatedAt: b.Created}
}

// Info tells the size of a blob.
func (r readOnly) Info(_ context.Context, d digest.Digest) (ctdcontent.Info, error) {
	b, err := r.s.layers.Recipe(d)
	return info(b), explain(err)
}

// Walk lists what can be made.
func (r readOnly) Walk(ctx context.Context, fn ctdcontent.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	for _, d := range r.s.layers.Recipes() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b, err := r.s.layers.Recipe(d)
		if err != nil { // it has gone meanwhile, or its encoder has changed
			continue
		}
		if i := info(b); filter.Match(ctdcontent.AdaptInfo(i)) {
			if err := fn(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// ReaderAt makes a blob, or waits until another client's call has.
func (r readOnly) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ctdcontent.ReaderAt, error) {
	b, err := r.s.open(ctx, desc.Digest)
	if err != nil {
		return nil, explain(err)
	}
	return &reader{b: b, close: sync.OnceFunc(func() { r.s.release(b, desc.Digest) })}, nil
}

type reader struct {
	b     *blob
	close func()
}

// ReadAt implements io.ReaderAt.
func (r *reader) ReadAt(p []byte, off int64) (int, error) { return r.b.file.ReadAt(p, off) }

// Size is the blob's.
func (r *reader) Size() int64 { return r.b.size }

// Close ends the reading.
func (r *reader) Close() error { r.close(); return nil }

// explain gives an error its class.
func explain(err error) error {
	for _, none := range []error{layer.ErrNoRecipe, layer.ErrDamaged, recipe.ErrOtherEncoder, recipe.ErrDamaged} {
		if errors.Is(err, none) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
	}
	return err
}

var errReadOnly = fmt.Errorf("blobs made from the store of dedup are read only: %w", errdefs.ErrNotImplemented)

// Update is not here.
func (readOnly) Update(context.Context, ctdcontent.Info, ...string) (ctdcontent.Info, error) {
	return ctdcontent.Info{}, errReadOnly
}

// Delete is not here.
func (readOnly) Delete(context.Context, digest.Digest) error { return errReadOnly }

// Status is not here.
func (readOnly) Status(context.Context, string) (ctdcontent.Status, error) {
	return ctdcontent.Status{}, errReadOnly
}

// ListStatuses is not here.
func (readOnly) ListStatuses(context.Context, ...string) ([]ctdcontent.Status, error) {
	return nil, errReadOnly
}

// Abort is not here.
func (readOnly) Abort(context.Context, string) error { return errReadOnly }

// Writer is not here.
func (readOnly) Writer(context.Context, ...ctdcontent.WriterOpt) (ctdcontent.Writer, error) {
	return nil, errReadOnly
}
