package archive

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// blobBuffer is how much of a blob is read at a time.
const blobBuffer = 256 << 10

// mediaTypes are the layer types whose blobs Decompress reads. How a blob is
// compressed is taken from its first bytes, not from here: registries hold
// layers whose type does not tell the truth.
var mediaTypes = map[string]struct{}{
	"application/vnd.oci.image.layer.v1.tar":                       {},
	"application/vnd.oci.image.layer.v1.tar+gzip":                  {},
	"application/vnd.oci.image.layer.v1.tar+zstd":                  {},
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      {},
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": {},
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": {},
	"application/vnd.docker.image.rootfs.diff.tar":                 {},
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            {},
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            {},
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         {},
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    {},
	"application/vnd.docker.image.rootfs.foreign.diff.tar.zstd":    {},
}

// KnownMediaType reports whether mt is a layer tar of OCI or Docker, plain or
// compressed with gzip or zstd, distributable or not.
func KnownMediaType(mt string) bool {
	_, ok := mediaTypes[mt]
	return ok
}

// Decompress returns the tar stream of a blob, which is gzip (any number of
// members, so estargz too), zstd (skippable frames ignored, so zstd:chunked too)
// or, with neither's magic in front, the tar itself. All work happens in the
// goroutine that reads, or in an igzip process where that is installed; Close
// frees the decoder and does not close r. A zstd frame that needs a window over
// 512 MiB is refused; memory is asked for one over 8 MiB.
func Decompress(r io.Reader, memory Memory) (io.ReadCloser, error) {
	return decompressWith(findIgzip(), r, memory)
}

// decompressWith uses the igzip at the given path for gzip; "" is the Go library.
func decompressWith(igzipPath string, r io.Reader, memory Memory) (io.ReadCloser, error) {
	src := &blobReader{r: r}
	src.file, src.start = regularFile(r)
	buf := bufio.NewReaderSize(src, blobBuffer)
	magic, err := buf.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b, 0x08}) && igzipPath != "":
		stdin, err := src.whole(buf)
		if err != nil {
			return nil, err
		}
		z, err := startIgzip(igzipPath, stdin)
		if err != nil {
			return nil, err
		}
		return &decoder{src: src, format: "gzip", r: z, close: func() { z.Close() }}, nil
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b, 0x08}):
		z, err := gzip.NewReader(buf)
		if err != nil {
			return nil, src.explain("gzip", 0, err)
		}
		return &decoder{src: src, format: "gzip", r: z, close: func() { z.Close() }}, nil
	case isZstd(magic):
		z, err := zstd.NewReader(&windows{r: buf, memory: memory},
			zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, src.explain("zstd", 0, err)
		}
		return &decoder{src: src, format: "zstd", r: z, close: z.Close}, nil
	}
	return &decoder{src: src, r: buf, close: func() {}}, nil
}

// isZstd knows a frame of data and, as zstd:chunked may start with one, the
// sixteen skippable frames (RFC 8878, 3.1).
func isZstd(magic []byte) bool {
	if len(magic) < 4 {
		return false
	}
	return bytes.HasPrefix(magic, zstdMagic) || binary.LittleEndian.Uint32(magic)&^0xf == 0x184d2a50
}

var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}

// blobReader remembers the source's own error, so that a failing disk or
// registry is not reported as a corrupt blob.
type blobReader struct {
	r   io.Reader
	err error

	// file is r where that is a regular file, at the offset start; else nil. A child process reads
	// it by itself: nothing is copied for it, and nothing of it is seen here.
	file  *os.File
	start int64
}

func regularFile(r io.Reader) (f *os.File, start int64) {
	f, ok := r.(*os.File)
	if !ok {
		return nil, 0
	}
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return nil, 0
	}
	if start, err = f.Seek(0, io.SeekCurrent); err != nil {
		return nil, 0
	}
	return f, start
}

// whole returns the source as it was before buf peeked into it, as a file if it is one.
func (b *blobReader) whole(buf *bufio.Reader) (io.Reader, error) {
	if b.file == nil {
		return buf, nil
	}
	if _, err := b.file.Seek(b.start, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read blob: %w", err)
	}
	return b.file, nil
}

// readable reads all of a file that a child process found bad, to tell a failing disk from a
// corrupt blob.
func (b *blobReader) readable() {
	if b.file != nil && b.err == nil {
		_, b.err = io.Copy(io.Discard, io.NewSectionReader(b.file, b.start, math.MaxInt64-b.start))
	}
}

func (b *blobReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}

// explain says what is wrong with a blob, n bytes into what it decompresses to.
func (b *blobReader) explain(format string, n int64, err error) error {
	switch {
	case b.err != nil:
		return fmt.Errorf("read blob: %w", b.err)
	case errors.Is(err, errNoVerdict):
		return fmt.Errorf("%s: after %d uncompressed bytes: %w", format, n, err)
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		return fmt.Errorf("%s: blob is truncated after %d uncompressed bytes: %w: %w", format, n, ErrInvalid,
			io.ErrUnexpectedEOF)
	case errors.Is(err, ErrMemory):
		return fmt.Errorf("%s: %w", format, err)
	case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("%s: blob needs a window over %d MiB: %w: %w", format, maxZstdWindow>>20, ErrInvalid, err)
	}
	return fmt.Errorf("%s: blob is corrupt after %d uncompressed bytes: %w: %w", format, n, ErrInvalid, err)
}

var errClosed = errors.New("read of a closed blob")

// decoder is what Decompress returns. format "" is a tar that was not compressed.
type decoder struct {
	src    *blobReader
	format string
	r      io.Reader
	n      int64
	close  func()
	err    error // what Read says from now on; one error must not look like the end later
}

func (d *decoder) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.r.Read(p)
	d.n += int64(n)
	switch {
	case err == nil || err == io.EOF:
	case d.format == "":
		err = fmt.Errorf("read blob: %w", err)
	default:
		d.src.readable()
		err = d.src.explain(d.format, d.n, err)
	}
	d.err = err
	return n, err
}

// Close always succeeds: an error of the blob is Read's to report.
func (d *decoder) Close() error {
	if d.err != errClosed {
		d.err = errClosed
		d.close()
	}
	return nil
}
