package image

import (
	stdgzip "compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Compression of a layer's blob.
type Compression string

// Compressions.
const (
	Gzip Compression = "gzip" // level 6, as docker push
	// GoGzip is by Go's own compress/gzip, as BuildKit, crane and kaniko use it.
	GoGzip Compression = "go gzip"
	Zstd   Compression = "zstd"
	None   Compression = "none"
	// Gzips is many gzip members of odd sizes, empty ones among them, as pigz -i and
	// concatenation make.
	Gzips Compression = "gzips"
	// Estargz is gzip members ended by the footer of eStargz: an empty member whose
	// extra field points at the table of contents.
	Estargz Compression = "estargz"
	// Zstds is many frames with skippable ones at the start, between and at the end, as
	// zstd:chunked has them for its table of contents.
	Zstds Compression = "zstds"
)

func (c Compression) zstd() bool { return c == Zstd || c == Zstds }

// pieces are the sizes of the members and frames of a split blob, over and over.
var pieces = []int{1, 511, 512, 4096, 70_000, 0, 13}

func compressInto(w io.Writer, opts LayerOptions, write func(io.Writer) error) error {
	switch opts.Compression {
	case None:
		return write(w)
	case Zstd:
		z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
		if err != nil {
			return err
		}
		return errors.Join(write(z), z.Close())
	case Gzip:
		z, err := gzip.NewWriterLevel(w, opts.level())
		if err != nil {
			return err
		}
		return errors.Join(write(z), z.Close())
	case GoGzip:
		z, err := stdgzip.NewWriterLevel(w, opts.level())
		if err != nil {
			return err
		}
		return errors.Join(write(z), z.Close())
	case Gzips, Estargz:
		s := &splitter{next: func(p []byte) error { return gzipMember(w, p, opts.level(), nil) }}
		if err := errors.Join(write(s), s.flush()); err != nil || opts.Compression == Gzips {
			return err
		}
		return gzipMember(w, nil, gzip.NoCompression, []byte("SG\x16\x000000000000000400STARGZ"))
	case Zstds:
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true))
		if err != nil {
			return err
		}
		s := &splitter{next: func(p []byte) error {
			_, err := w.Write(append(skippable("before a frame"), z.EncodeAll(p, nil)...))
			return err
		}}
		if err := errors.Join(write(s), s.flush()); err != nil {
			return err
		}
		_, err = w.Write(append(skippable(`{"version":1,"entries":[]}`), skippable("GNUlInUx")...))
		return err
	default:
		return fmt.Errorf("unknown compression %q", opts.Compression)
	}
}

func (o LayerOptions) level() int {
	if o.Level == 0 {
		return 6
	}
	return o.Level
}

func gzipMember(w io.Writer, p []byte, level int, extra []byte) error {
	z, err := gzip.NewWriterLevel(w, level)
	if err != nil {
		return err
	}
	z.Extra = extra
	_, err = z.Write(p)
	return errors.Join(err, z.Close())
}

// skippable is a frame that a decoder passes over (RFC 8878, 3.1.2).
func skippable(text string) []byte {
	frame := binary.LittleEndian.AppendUint32(nil, 0x184D2A50)
	frame = binary.LittleEndian.AppendUint32(frame, uint32(len(text)))
	return append(frame, text...)
}

// splitter cuts what is written to it into pieces.
type splitter struct {
	next func(p []byte) error
	buf  []byte
	n    int
}

func (s *splitter) Write(p []byte) (int, error) {
	s.buf = append(s.buf, p...)
	for {
		size := pieces[s.n%len(pieces)]
		if len(s.buf) < max(size, 1) {
			return len(p), nil
		}
		if err := s.next(s.buf[:size]); err != nil {
			return 0, err
		}
		s.buf = s.buf[size:]
		s.n++
	}
}

func (s *splitter) flush() error { return s.next(s.buf) }
