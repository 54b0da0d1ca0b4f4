package recipe

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const (
	magic = "dedup recipe\n"
	// version changes with the format. A recipe of another one is refused: blobs come from the registry then.
	version = 1
	// window is what a decoder and an encoder of zstd keep of a recipe.
	window = 1 << 20
	// maxHead bounds the gzip header that a recipe keeps, maxHeader the whole header.
	maxHead   = 4 << 10
	maxHeader = maxHead + 1<<10
	// maxLiteral is the longest literal of one step.
	maxLiteral = 64 << 10
)

// The kinds of steps.
const (
	stepLiteral = iota
	stepPayload
	stepStamped
	stepEnd
)

// The fields of the header.
const (
	fieldBlob        protowire.Number = 1
	fieldSize        protowire.Number = 2
	fieldTarSize     protowire.Number = 3
	fieldLayer       protowire.Number = 4
	fieldEncoder     protowire.Number = 5
	fieldFingerprint protowire.Number = 6
	fieldHead        protowire.Number = 7
)

// output writes the steps of a recipe, or anything in their place.
type output struct {
	z       *zstd.Encoder
	literal []byte
	last    int // the number of the payload before
	scratch [binary.MaxVarintLen64]byte
}

func newOutput(w io.Writer) (*output, error) {
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(window), zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, fmt.Errorf("zstd encoder: %w", err)
	}
	return &output{z: z, last: -1}, nil
}

func (o *output) header(h Header) error {
	if len(h.Head) > maxHead {
		return fmt.Errorf("%w: its gzip header has %d bytes", ErrTooLarge, len(h.Head))
	}
	var b []byte
	add := func(n protowire.Number, v []byte) {
		b = protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	number := func(n protowire.Number, v int64) {
		b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
	}
	add(fieldBlob, h.Blob[:])
	number(fieldSize, h.Size)
	number(fieldTarSize, h.TarSize)
	add(fieldLayer, h.Layer.Sum[:])
	add(fieldEncoder, []byte(h.Encoder))
	add(fieldFingerprint, h.Fingerprint[:])
	add(fieldHead, h.Head)
	head := append([]byte(magic), version)
	head = append(binary.AppendUvarint(head, uint64(len(b))), b...)
	_, err := o.z.Write(head)
	return err
}

// Write adds to the literal before the next step.
func (o *output) Write(p []byte) (n int, err error) {
	for n = len(p); len(p) > 0; {
		part := min(len(p), maxLiteral-len(o.literal))
		o.literal = append(o.literal, p[:part]...)
		p = p[part:]
		if len(o.literal) == maxLiteral {
			if err := o.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (o *output) flush() error {
	if len(o.literal) == 0 {
		return nil
	}
	err := o.step(stepLiteral, uint64(len(o.literal)))
	if err == nil {
		_, err = o.z.Write(o.literal)
	}
	o.literal = o.literal[:0]
	return err
}

func (o *output) step(kind, n uint64) error {
	_, err := o.z.Write(o.scratch[:binary.PutUvarint(o.scratch[:], n<<2|kind)])
	return err
}

// payload adds one by its number; stamp is nil, or what stands from byte 8 on.
func (o *output) payload(n int, stamp []byte) error {
	if err := o.flush(); err != nil {
		return err
	}
	delta := protowire.EncodeZigZag(int64(n - o.last - 1))
	o.last = n
	if stamp == nil {
		return o.step(stepPayload, delta)
	}
	if err := o.step(stepStamped, delta); err != nil {
		return err
	}
	_, err := o.z.Write(stamp)
	return err
}

func (o *output) end() error {
	return errors.Join(o.flush(), o.step(stepEnd, 0), o.z.Close())
}

// Recipe is a recipe that is being read.
type Recipe struct {
	Header

	z    *zstd.Decoder
	in   *bufio.Reader
	last int
}

// Read begins to read a recipe. The caller closes it.
func Read(r io.Reader) (*Recipe, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return nil, damaged("%w", err)
	}
	rec := &Recipe{z: z, in: bufio.NewReaderSize(z, maxLiteral), last: -1}
	if err := rec.readHeader(); err != nil {
		z.Close()
		return nil, err
	}
	return rec, nil
}

// Close frees the decoder.
func (r *Recipe) Close() { r.z.Close() }

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

func (r *Recipe) readHeader() error {
	head := make([]byte, len(magic)+1)
	if _, err := io.ReadFull(r.in, head); err != nil {
		return damaged("header: %w", err)
	}
	if string(head[:len(magic)]) != magic {
		return damaged("it is no recipe")
	}
	if v := head[len(magic)]; v != version {
		return fmt.Errorf("%w: version %d, this build reads %d", ErrDamaged, v, version)
	}
	n, err := binary.ReadUvarint(r.in)
	if err == nil && n > maxHeader {
		err = fmt.Errorf("%d bytes", n)
	}
	if err != nil {
		return damaged("header: %w", err)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r.in, b); err != nil {
		return damaged("header: %w", err)
	}
	return r.decodeHeader(b)
}

func (h *Header) decodeHeader(b []byte) error {
	for len(b) > 0 {
		n, typ, used := protowire.ConsumeTag(b)
		if used < 0 {
			return damaged("header: %w", protowire.ParseError(used))
		}
		b = b[used:]
		var v uint64
		var s []byte
		switch typ {
		case protowire.VarintType:
			v, used = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			s, used = protowire.ConsumeBytes(b)
		default:
			used = protowire.ConsumeFieldValue(n, typ, b)
		}
		if used < 0 {
			return damaged("header: %w", protowire.ParseError(used))
		}
		b = b[used:]
		switch n {
		case fieldBlob:
			copy(h.Blob[:], s)
		case fieldSize:
			h.Size = int64(v)
		case fieldTarSize:
			h.TarSize = int64(v)
		case fieldLayer:
			copy(h.Layer.Sum[:], s)
		case fieldEncoder:
			h.Encoder = string(s)
		case fieldFingerprint:
			copy(h.Fingerprint[:], s)
		case fieldHead:
			h.Head = s
		}
	}
	if h.Size < 0 || h.TarSize < 0 || h.Blob.IsZero() || h.Layer == (content.LayerID{}) || len(h.Head) > maxHead {
		return damaged("header makes no sense")
	}
	return nil
}

// step is one step as it was read.
type step struct {
	kind  uint64
	n     int64 // the length of a literal, which follows, or the number of a payload
	stamp [4]byte
}

func (r *Recipe) next() (s step, err error) {
	v, err := binary.ReadUvarint(r.in)
	if err != nil {
		return s, damaged("steps: %w", err)
	}
	s.kind, v = v&3, v>>2
	switch s.kind {
	case stepLiteral:
		if v > maxLiteral {
			return s, damaged("a literal of %d bytes", v)
		}
		s.n = int64(v)
	case stepPayload, stepStamped:
		delta := protowire.DecodeZigZag(v)
		if delta < -1<<31 || delta > 1<<31 {
			return s, damaged("a payload %d from the last", delta)
		}
		r.last += 1 + int(delta)
		s.n = int64(r.last)
		if s.kind == stepStamped {
			if _, err := io.ReadFull(r.in, s.stamp[:]); err != nil {
				return s, damaged("steps: %w", err)
			}
		}
	case stepEnd:
		if _, err := r.in.ReadByte(); !errors.Is(err, io.EOF) {
			return s, damaged("its end: %w", errors.Join(err, errors.New("more follows, or its checksum is another")))
		}
	}
	return s, nil
}
