package tree

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A tree file, layers/<layer id>:
//
//	zstd skippable frame   header: length of the object frame (u32), Facts
//	                       (protobuf), crc32c over both (u32)
//	zstd frame             the objects field of the Tree message
//	zstd frame             its other fields
//
// `zstd -dc FILE | sha256sum` prints the file's name. The header is outside
// of the name, since facts (another diffID of the same tree) come to be known later.
const (
	skippableMagic = 0x184D2A5D
	frameHeader    = 8 // magic and length of a skippable frame
	// A tree with its decompressed bytes must fit in memory; an image with more
	// metadata than this is no image.
	maxDecoded = 4 << 30
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// Facts are what is known of a layer beside its tree.
type Facts struct {
	// Layer is what the file should be named; zero in files of older builds.
	Layer    content.LayerID
	Fidelity content.Fidelity // that the tree was encoded with
	Payload  content.PayloadDigest
	Tars     []Tar
	Entries  int64
	Bytes    int64 // sum of the regular files' sizes
	// Usage is what the layer's ingest added to the disk.
	UsedBytes, UsedInodes int64
	// Below is nil in files of older builds.
	Below *Below
}

// Tar is one uncompressed tar that has the layer's tree.
type Tar struct {
	DiffID content.DiffID
	// Fidelity is the setting under which the diffID stands for this layer.
	Fidelity content.Fidelity
	Size     int64           // of the tar, in bytes
	Blobs    []digest.Digest // compressed forms of it that were ingested
}

// Field numbers of message Facts and Facts.Tar.
const (
	factsPayload    protowire.Number = 1
	factsTar        protowire.Number = 2
	factsEntries    protowire.Number = 3
	factsBytes      protowire.Number = 4
	factsUsedBytes  protowire.Number = 5
	factsUsedInodes protowire.Number = 6
	factsFidelity   protowire.Number = 7
	factsLayer      protowire.Number = 8
	factsBelow      protowire.Number = 9

	tarDiffID   protowire.Number = 1
	tarSize     protowire.Number = 2
	tarBlob     protowire.Number = 3
	tarFidelity protowire.Number = 4

	belowLinks  protowire.Number = 1
	belowXattrs protowire.Number = 2
)

// Marshal returns the bytes of a tree file.
func (enc Encoded) Marshal(f Facts) ([]byte, error) {
	var b inMemory
	if _, err := enc.Write(&b, func(int64) Facts { return f }); err != nil {
		return nil, err
	}
	return b, nil
}

// inMemory is a file in memory that is only ever written at its end, or over again.
type inMemory []byte

func (b *inMemory) WriteAt(p []byte, off int64) (int, error) {
	if more := int(off) + len(p) - len(*b); more > 0 {
		*b = append(*b, make([]byte, more)...)
	}
	return copy((*b)[off:], p), nil
}

// Write writes a tree file, from its beginning, and returns its length. facts may depend on that, which is 0 when it is
// first asked; what it returns may differ only in Layer and UsedBytes.
func (enc Encoded) Write(w io.WriterAt, facts func(length int64) Facts) (int64, error) {
	objects := enc.encoding.objects()
	if n := int64(len(objects)) + enc.length; n > maxDecoded {
		return 0, fmt.Errorf("a tree of %d bytes, and at most %d can be read again", n, int64(maxDecoded))
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(treeWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return 0, fmt.Errorf("zstd encoder: %w", err)
	}
	defer z.Close()
	if len(objects) > 0 {
		objects = z.EncodeAll(objects, nil)
	}
	head := func(length int64) []byte {
		f := facts(length)
		f.Layer = enc.ID
		return header(f, len(objects))
	}
	start := len(head(0))
	out := io.NewOffsetWriter(w, int64(start))
	if _, err := out.Write(objects); err != nil {
		return 0, err
	}
	z.ResetContentSize(out, enc.length)
	if _, err := enc.encoding.writeEntries(z); err != nil {
		return 0, err
	}
	if err := z.Close(); err != nil {
		return 0, err
	}
	written, err := out.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	length := int64(start) + written
	h := head(length)
	if len(h) != start {
		return 0, fmt.Errorf("header of layer %s: %d bytes, not %d", enc.ID, len(h), start)
	}
	_, err = w.WriteAt(h, 0)
	return length, err
}

// treeWindow is what a zstd decoder and encoder keep of a tree.
const treeWindow = 1 << 20

func header(f Facts, objectFrame int) []byte {
	body := binary.LittleEndian.AppendUint32(nil, uint32(objectFrame))
	body = appendFacts(body, f)
	body = binary.LittleEndian.AppendUint32(body, crc32.Checksum(body, crcTable))
	out := binary.LittleEndian.AppendUint32(nil, uint32(skippableMagic))
	out = binary.LittleEndian.AppendUint32(out, uint32(len(body)))
	return append(out, body...)
}

// WithFacts returns the bytes of a tree file with its facts replaced.
func WithFacts(file []byte, f Facts) ([]byte, error) {
	old, objectFrame, rest, err := splitHeader(file)
	if err == nil && !old.Layer.IsZero() && old.Layer != f.Layer {
		err = fmt.Errorf("%w: it is layer %s", ErrDamaged, old.Layer)
	}
	if err != nil {
		return nil, err
	}
	return append(header(f, objectFrame), rest...), nil
}

func splitHeader(file []byte) (f Facts, objectFrame int, rest []byte, err error) {
	if len(file) < frameHeader || binary.LittleEndian.Uint32(file) != skippableMagic {
		return f, 0, nil, fmt.Errorf("%w: no header", errMalformed)
	}
	n := int64(binary.LittleEndian.Uint32(file[4:]))
	if n < 8 || n > int64(len(file)-frameHeader) {
		return f, 0, nil, fmt.Errorf("%w: header is cut off", errMalformed)
	}
	body := file[frameHeader : frameHeader+n]
	rest = file[frameHeader+n:]
	crc := binary.LittleEndian.Uint32(body[n-4:])
	if crc32.Checksum(body[:n-4], crcTable) != crc {
		return f, 0, nil, fmt.Errorf("%w: header checksum does not match", errMalformed)
	}
	objectFrame = int(binary.LittleEndian.Uint32(body))
	f, err = decodeFacts(body[4 : n-4])
	return f, objectFrame, rest, err
}

// Read reads a whole tree file and verifies it against its id.
func Read(path string, id content.LayerID) (content.Fidelity, []*content.Entry, error) {
	file, err := os.ReadFile(path)
	if err != nil {
		return "", nil, err
	}
	return Decode(file, id)
}

// Decode is Read for the bytes of a tree file.
func Decode(file []byte, id content.LayerID) (content.Fidelity, []*content.Entry, error) {
	f, entries, err := decodeFile(file, id)
	if err != nil {
		return "", nil, fmt.Errorf("tree of layer %s: %w", id, err)
	}
	return f, entries, nil
}

// decodeFile decodes a tree while it is decompressed, so that its encoding is never held; it says nothing of it before
// all has been verified.
func decodeFile(file []byte, id content.LayerID) (content.Fidelity, []*content.Entry, error) {
	_, _, frames, err := splitHeader(file)
	if err != nil {
		return "", nil, err
	}
	z, err := zstd.NewReader(bytes.NewReader(frames), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxMemory(maxDecoded))
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	defer z.Close()
	h := sha256.New()
	src := io.TeeReader(z, h)
	f, entries, err := decodeTree(func(field func(protowire.Number, uint64, []byte) error) error {
		return readFields(src, field)
	})
	if err != nil {
		return "", nil, err
	}
	if sum := content.Sum(h.Sum(nil)); sum != id.Sum {
		return "", nil, fmt.Errorf("%w: its sha256 is %x", ErrDamaged, sum)
	}
	return f, entries, nil
}

// verified returns the canonical encoding in a tree file whose sha256 is id.
func verified(file []byte, id content.LayerID) ([]byte, error) {
	_, _, rest, err := splitHeader(file)
	if err != nil {
		return nil, fmt.Errorf("tree of layer %s: %w", id, err)
	}
	raw, err := decompress(rest)
	if err != nil {
		return nil, fmt.Errorf("tree of layer %s: %w: %w", id, ErrDamaged, err)
	}
	if sum := sha256.Sum256(raw); sum != id.Sum {
		return nil, fmt.Errorf("tree of layer %s: %w: its sha256 is %x", id, ErrDamaged, sum)
	}
	return raw, nil
}

// ReadFacts reads a tree file's facts and the ids of its objects, not its entries.
// The objects are covered by no checksum but zstd's own, and what the facts say of the id.
func ReadFacts(path string, id content.LayerID) (Facts, []content.ObjectID, error) {
	f, ids, err := readFacts(path)
	if err == nil && !f.Layer.IsZero() && f.Layer != id {
		err = fmt.Errorf("%s: %w: it is layer %s", path, ErrDamaged, f.Layer)
	}
	if err != nil {
		return Facts{}, nil, err
	}
	return f, ids, nil
}

func readFacts(path string) (Facts, []content.ObjectID, error) {
	file, err := os.Open(path)
	if err != nil {
		return Facts{}, nil, err
	}
	defer file.Close()
	f, objectFrame, at, err := readHeader(file)
	if err != nil || objectFrame == 0 {
		return f, nil, err
	}
	frame := make([]byte, objectFrame)
	if _, err := file.ReadAt(frame, at); errors.Is(err, io.EOF) {
		return Facts{}, nil, fmt.Errorf("objects of %s: %w: cut off", path, ErrDamaged)
	} else if err != nil {
		return Facts{}, nil, fmt.Errorf("read objects of %s: %w", path, err)
	}
	raw, err := decompress(frame)
	if err != nil {
		return Facts{}, nil, fmt.Errorf("objects of %s: %w: %w", path, ErrDamaged, err)
	}
	ids, err := decodeObjects(raw)
	if err != nil {
		return Facts{}, nil, fmt.Errorf("objects of %s: %w", path, err)
	}
	return f, ids, nil
}

// readHeader reads the facts, and how long the object frame is and where it begins.
func readHeader(file *os.File) (f Facts, objectFrame int, at int64, err error) {
	path := file.Name()
	head := make([]byte, 4096)
	n, err := file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Facts{}, 0, 0, err
	}
	head = head[:n]
	if n >= frameHeader {
		if want := int64(binary.LittleEndian.Uint32(head[4:])) + frameHeader; want > int64(n) && want < 64<<20 {
			head = make([]byte, want)
			if _, err := file.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
				return Facts{}, 0, 0, fmt.Errorf("read header of %s: %w", path, err)
			}
		}
	}
	f, objectFrame, rest, err := splitHeader(head)
	if err != nil {
		return Facts{}, 0, 0, fmt.Errorf("%s: %w", path, err)
	}
	if fi, err := file.Stat(); err == nil && int64(objectFrame) > fi.Size() {
		return Facts{}, 0, 0, fmt.Errorf("objects of %s: %w: cut off", path, ErrDamaged)
	}
	return f, objectFrame, int64(len(head) - len(rest)), nil
}

// Length returns how long a tree's encoding is, but for its objects, as its file declares it: who reads it finds out
// whether that is so.
func Length(path string, id content.LayerID) (int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	_, objectFrame, at, err := readHeader(file)
	if err != nil {
		return 0, err
	}
	head := make([]byte, zstd.HeaderMaxSize)
	n, err := file.ReadAt(head, at+int64(objectFrame))
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read tree of layer %s: %w", id, err)
	}
	var h zstd.Header
	if err := h.Decode(head[:n]); err != nil || h.FrameContentSize > maxDecoded {
		return 0, fmt.Errorf("tree of layer %s: %w: no length", id, ErrDamaged)
	}
	if !h.HasFCS {
		return 255, nil // the encoder leaves lengths below 256 out
	}
	return int64(h.FrameContentSize), nil
}

// Objects returns the ids that a Tree names, sorted, each once.
func (enc Encoded) Objects() []content.ObjectID {
	return slices.Clone(enc.encoding.ids)
}

func decodeObjects(raw []byte) ([]content.ObjectID, error) {
	var ids []content.ObjectID
	err := eachField(raw, func(n protowire.Number, _ uint64, b []byte) error {
		const l = len(content.Sum{})
		if n != treeObjects || len(b)%l != 0 {
			return fmt.Errorf("%w: object list", errMalformed)
		}
		ids = make([]content.ObjectID, len(b)/l)
		for i := range ids {
			copy(ids[i].Sum[:], b[i*l:])
		}
		return nil
	})
	return ids, err
}

func decompress(frames []byte) ([]byte, error) {
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxDecoded))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.DecodeAll(frames, nil)
}

func appendFacts(b []byte, f Facts) []byte {
	b = appendString(b, factsPayload, string(f.Payload.Sum[:]))
	for _, t := range f.Tars {
		var m []byte
		m = appendString(m, tarDiffID, string(t.DiffID.Sum[:]))
		m = appendUint(m, tarSize, uint64(t.Size))
		for _, d := range t.Blobs {
			m = appendString(m, tarBlob, d.String())
		}
		m = appendString(m, tarFidelity, string(t.Fidelity))
		b = protowire.AppendTag(b, factsTar, protowire.BytesType)
		b = protowire.AppendBytes(b, m)
	}
	b = appendUint(b, factsEntries, uint64(f.Entries))
	b = appendUint(b, factsBytes, uint64(f.Bytes))
	b = appendFixed(b, factsUsedBytes, uint64(f.UsedBytes))
	b = appendUint(b, factsUsedInodes, uint64(f.UsedInodes))
	b = appendString(b, factsFidelity, string(f.Fidelity))
	if !f.Layer.IsZero() {
		b = appendString(b, factsLayer, string(f.Layer.Sum[:]))
	}
	if f.Below != nil {
		m := appendUint(nil, belowLinks, uint64(f.Below.Links))
		m = appendUint(m, belowXattrs, uint64(f.Below.Xattrs))
		b = protowire.AppendTag(b, factsBelow, protowire.BytesType)
		b = protowire.AppendBytes(b, m)
	}
	return b
}

// appendFixed writes a varint that takes as many bytes whatever it is, so that it can be written over. Decoders know no
// difference.
func appendFixed(b []byte, n protowire.Number, v uint64) []byte {
	b = protowire.AppendTag(b, n, protowire.VarintType)
	for range 9 {
		b = append(b, byte(v)|0x80)
		v >>= 7
	}
	return append(b, byte(v))
}

func decodeFacts(raw []byte) (f Facts, err error) {
	err = eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case factsPayload:
			copy(f.Payload.Sum[:], b)
		case factsTar:
			t, err := decodeTar(b)
			f.Tars = append(f.Tars, t)
			return err
		case factsEntries:
			f.Entries = int64(v)
		case factsBytes:
			f.Bytes = int64(v)
		case factsUsedBytes:
			f.UsedBytes = int64(v)
		case factsUsedInodes:
			f.UsedInodes = int64(v)
		case factsFidelity:
			f.Fidelity = content.Fidelity(b)
		case factsLayer:
			copy(f.Layer.Sum[:], b)
		case factsBelow:
			f.Below = &Below{}
			return eachField(b, func(n protowire.Number, v uint64, _ []byte) error {
				switch n {
				case belowLinks:
					f.Below.Links = int64(v)
				case belowXattrs:
					f.Below.Xattrs = int64(v)
				}
				return nil
			})
		}
		return nil
	})
	return f, err
}

func decodeTar(raw []byte) (t Tar, err error) {
	err = eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case tarDiffID:
			copy(t.DiffID.Sum[:], b)
		case tarSize:
			t.Size = int64(v)
		case tarBlob:
			d, err := digest.Parse(string(b))
			if err != nil {
				return fmt.Errorf("%w: blob digest: %v", errMalformed, err)
			}
			t.Blobs = append(t.Blobs, d)
		case tarFidelity:
			t.Fidelity = content.Fidelity(b)
		}
		return nil
	})
	return t, err
}
