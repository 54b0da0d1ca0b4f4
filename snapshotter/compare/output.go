package compare

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// output is the layer that a comparison gives, on its way to two places: to the content store, compressed, and to the
// layer store. What goes wrong in the second does not harm the first.
type output struct {
	ctx  context.Context
	stop context.CancelFunc // ends the ingest
	blob *bufio.Writer
	size int64 // of the blob, as far as it is written
	as   compression.Compression
	sum  digest.Digester

	layers *layer.Store
	out    *bufio.Writer // to the ingest
	pipe   *io.PipeWriter
	named  chan digest.Digest // of the blob, once it is written
	done   chan struct{}      // closed when what follows is set
	in     layer.Ingested
	err    error
}

// How much goes to the ingest, and to containerd, at a time.
const (
	pipeSize = 32 << 10
	blobSize = 256 << 10
)

// Exports have many small layers: buffers are used again.
var (
	blobBuffers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, blobSize) }}
	gzipWriters = sync.Pool{New: func() any { return gzip.NewWriter(nil) }}
	pipeBuffers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, pipeSize) }}
)

func newOutput(ctx context.Context, layers *layer.Store, blob io.Writer, as compression.Compression) *output {
	t := &output{
		ctx: ctx, as: as, sum: digest.SHA256.Digester(),
		layers: layers, named: make(chan digest.Digest, 1), done: make(chan struct{}),
	}
	t.blob, _ = blobBuffers.Get().(*bufio.Writer)
	t.blob.Reset(writerFunc(func(p []byte) (int, error) {
		n, err := blob.Write(p)
		t.size += int64(n)
		return n, err
	}))
	var from *io.PipeReader
	from, t.pipe = io.Pipe()
	t.out, _ = pipeBuffers.Get().(*bufio.Writer)
	t.out.Reset(t.pipe)
	// It goes on when the caller has its answer.
	ctx, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(t.done)
		t.in, t.err = layers.IngestBlob(ctx, layer.Blob{
			Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(from), nil },
			Late: func() (digest.Digest, error) {
				if d := <-t.named; d != "" {
					return d, nil
				}
				return "", errors.New("the blob was not written")
			},
		})
		_, _ = io.Copy(io.Discard, from) // the blob has to go on
	}()
	return t
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// write writes the changes.
func (t *output) write(pair *snapshotter.Pair, where *names, epoch *time.Time) (err error) {
	defer func() {
		if ferr := t.blob.Flush(); err == nil && ferr != nil {
			err = fmt.Errorf("write blob: %w", ferr)
		}
	}()
	to := io.MultiWriter(t.sum.Hash(), t.out)
	if t.as == compression.Uncompressed {
		to = io.MultiWriter(t.blob, to)
	} else {
		compressed, err := compressTo(t.blob, t.as)
		if err != nil {
			return fmt.Errorf("compress layer: %w", err)
		}
		defer func() {
			if cerr := compressed.Close(); err == nil && cerr != nil {
				err = fmt.Errorf("compress layer: %w", cerr)
			}
		}()
		to = io.MultiWriter(compressed, to)
	}
	var opts []archive.ChangeWriterOpt
	if epoch != nil {
		opts = append(opts, archive.WithModTimeUpperBound(*epoch))
	}
	w := archive.NewChangeWriter(to, pair.Upper, opts...)
	c := &changes{ctx: t.ctx, lower: pair.Lower, upper: pair.Upper, tell: w.HandleChange}
	if err := c.find("", true, where); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if err := t.out.Flush(); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return t.pipe.Close()
}

// compressTo compresses as containerd's walking differ does. An encoder of gzip takes 800 kB, and is used again.
func compressTo(w io.Writer, as compression.Compression) (io.WriteCloser, error) {
	if as != compression.Gzip {
		return compression.CompressStream(w, as)
	}
	z, _ := gzipWriters.Get().(*gzip.Writer)
	z.Reset(w)
	return &pooledGzip{z}, nil
}

type pooledGzip struct{ *gzip.Writer }

func (p *pooledGzip) Close() error {
	err := p.Writer.Close()
	p.Reset(io.Discard)
	gzipWriters.Put(p.Writer)
	return err
}

func (t *output) diffID() digest.Digest { return t.sum.Digest() }

// abandon ends the ingest.
func (t *output) abandon(why error) error {
	t.stop()
	err := t.pipe.CloseWithError(why)
	t.named <- ""
	<-t.done
	if t.err == nil {
		t.layers.Release(t.in.Layer)
	}
	t.recycle()
	return err
}

// keep has the upper side's snapshot hold the layer, once it is stored. Without it a pull reads the blob. Who exports a
// build does not wait for that; who commits a container unpacks the layer right after.
func (t *output) keep(pair *snapshotter.Pair, blob digest.Digest) {
	t.named <- blob
	t.recycle()
	if !pair.Committed() || !pair.Later(func(stop context.Context) {
		defer context.AfterFunc(stop, t.stop)()
		t.known(pair, blob)
	}) {
		t.known(pair, blob)
	}
}

func (t *output) known(pair *snapshotter.Pair, blob digest.Digest) {
	defer t.stop()
	<-t.done
	err := t.err
	if err == nil {
		err = pair.Keep(context.WithoutCancel(t.ctx), t.in.Layer)
	}
	if err != nil {
		log.G(t.ctx).WithError(err).Warnf("the layer of blob %s could not be stored: a pull of it reads the blob", blob)
	}
}

// recycle gives the buffers back, which nothing is written to any more.
func (t *output) recycle() {
	t.blob.Reset(nil)
	blobBuffers.Put(t.blob)
	t.out.Reset(nil)
	pipeBuffers.Put(t.out)
}
