package tree

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// The canonical encoding is the protobuf message Tree of proto/dedup/v1/tree.proto,
// written by hand because protobuf itself promises no stable bytes: fields in
// order of their numbers, each once, zero values left out, objects sorted.
//
// It is hashed into layer ids and payload digests: changing anything here is a
// format break and needs a new formatVersion.
const formatVersion = 3

// Field numbers of message Tree.
const (
	treeObjects  protowire.Number = 1
	treeVersion  protowire.Number = 2
	treeFidelity protowire.Number = 3
	treeEntry    protowire.Number = 4
)

// Field numbers of message Entry.
const (
	entryPath protowire.Number = iota + 1
	entryKind
	entryFlags
	entryMode
	entryUID
	entryGID
	entrySec
	entryNsec
	entryXattr
	entryTarget
	entryMajor
	entryMinor
	entrySize
	entryData
	entryObject
	entryPycTime
	_ // until format 2: the payload of a .pyc whose source is in another layer, with the timestamp that all pairs had
)

// Encoded is a layer's canonical encoding in its two parts, whose concatenation
// is one Tree message and names the layer. It is made anew each time that it is
// written: only its objects are held in memory, beside the entries, which must not change.
type Encoded struct {
	ID       content.LayerID
	encoding encoding
	length   int64 // of the part that is not the objects
}

// encoding is a layer on its way to its encoding.
type encoding struct {
	fidelity content.Fidelity
	entries  []*content.Entry
	as       func(*content.Entry) *content.Entry // what an entry is encoded as
	ids      []content.ObjectID                  // sorted, each once
}

// Encode encodes a layer. entries are sorted by content.ComparePaths, paths unique.
func Encode(f content.Fidelity, entries []*content.Entry) Encoded {
	return encode(f, entries, func(e *content.Entry) *content.Entry { return e })
}

func encode(f content.Fidelity, entries []*content.Entry, as func(*content.Entry) *content.Entry) Encoded {
	enc := Encoded{encoding: encoding{f, entries, as, objectsOf(entries, as)}}
	h := sha256.New()
	h.Write(enc.encoding.objects())
	enc.length, _ = enc.encoding.writeEntries(h) // a hash takes everything
	h.Sum(enc.ID.Sum[:0])
	return enc
}

// objects is the field treeObjects.
func (c *encoding) objects() []byte {
	const l = len(content.Sum{})
	if len(c.ids) == 0 {
		return nil
	}
	b := make([]byte, 0, len(c.ids)*l+16)
	b = protowire.AppendTag(b, treeObjects, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(c.ids)*l))
	for _, id := range c.ids {
		b = append(b, id.Sum[:]...)
	}
	return b
}

// encodeBuffer is how much is encoded between two writes.
const encodeBuffer = 64 << 10

// writeEntries writes all other fields and returns their length.
func (c *encoding) writeEntries(w io.Writer) (length int64, err error) {
	b := make([]byte, 0, encodeBuffer)
	b = appendUint(b, treeVersion, formatVersion)
	b = appendString(b, treeFidelity, string(c.fidelity))
	flush := func() {
		if err == nil {
			_, err = w.Write(b)
		}
		length, b = length+int64(len(b)), b[:0]
	}
	var scratch []byte
	for _, e := range c.entries {
		scratch = c.appendEntry(scratch[:0], c.as(e))
		b = protowire.AppendTag(b, treeEntry, protowire.BytesType)
		b = protowire.AppendBytes(b, scratch)
		if len(b) > encodeBuffer/2 {
			flush()
		}
	}
	flush()
	return length, err
}

// place is where an object stands in the list, from 1 on.
func (c *encoding) place(id content.ObjectID) uint64 {
	i, _ := slices.BinarySearchFunc(c.ids, id, compareIDs)
	return uint64(i) + 1
}

func compareIDs(a, b content.ObjectID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) }

func objectsOf(entries []*content.Entry, as func(*content.Entry) *content.Entry) []content.ObjectID {
	var ids []content.ObjectID
	for _, e := range entries {
		e = as(e)
		if !e.Object.IsZero() {
			ids = append(ids, e.Object)
		}
	}
	slices.SortFunc(ids, compareIDs)
	return slices.Clip(slices.Compact(ids))
}

func appendUint(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	b = protowire.AppendTag(b, n, protowire.VarintType)
	return protowire.AppendVarint(b, v)
}

func appendString(b []byte, n protowire.Number, v string) []byte {
	if v == "" {
		return b
	}
	b = protowire.AppendTag(b, n, protowire.BytesType)
	return protowire.AppendString(b, v)
}

func (c *encoding) appendEntry(b []byte, e *content.Entry) []byte {
	b = appendString(b, entryPath, e.Path)
	b = appendUint(b, entryKind, uint64(e.Kind))
	b = appendUint(b, entryFlags, uint64(e.Flags))
	b = appendUint(b, entryMode, uint64(e.Mode))
	b = appendUint(b, entryUID, uint64(e.UID))
	b = appendUint(b, entryGID, uint64(e.GID))
	b = appendUint(b, entrySec, protowire.EncodeZigZag(e.Mtime.Sec))
	b = appendUint(b, entryNsec, uint64(e.Mtime.Nsec))
	for _, x := range e.Xattrs {
		b = protowire.AppendTag(b, entryXattr, protowire.BytesType)
		var m []byte
		m = appendString(m, 1, x.Name)
		m = appendString(m, 2, string(x.Value))
		b = protowire.AppendBytes(b, m)
	}
	b = appendString(b, entryTarget, e.Target)
	b = appendUint(b, entryMajor, uint64(e.Major))
	b = appendUint(b, entryMinor, uint64(e.Minor))
	b = appendUint(b, entrySize, uint64(e.Size))
	if len(e.Data) > 0 {
		b = protowire.AppendTag(b, entryData, protowire.BytesType)
		b = protowire.AppendBytes(b, e.Data)
	}
	if !e.Object.IsZero() {
		b = appendUint(b, entryObject, c.place(e.Object))
	}
	return appendUint(b, entryPycTime, uint64(e.PycTime))
}

// ErrDamaged is wrapped where a tree file is not what its name says, or nothing that can be read.
var ErrDamaged = errors.New("damaged tree")

var errMalformed = fmt.Errorf("%w: malformed", ErrDamaged)

// decodeBlock is how many entries share one allocation. An entry that lasts longer than the others of its layer, when
// a chain is merged, keeps the block alive.
const decodeBlock = 64

// fields calls its argument for each field of a message, as eachField does.
type fields func(func(n protowire.Number, v uint64, b []byte) error) error

// decodeTree parses a canonical encoding. The entries share nothing with it.
func decodeTree(each fields) (content.Fidelity, []*content.Entry, error) {
	fidelity, version, entries, err := decodeVersion(each)
	if err == nil && version != formatVersion {
		err = fmt.Errorf("%w: version %d, this build reads %d", errMalformed, version, formatVersion)
	}
	return fidelity, entries, err
}

// decodeVersion is decodeTree for trees of any version: what their fields mean is the caller's to know.
func decodeVersion(each fields) (content.Fidelity, uint64, []*content.Entry, error) {
	var (
		objects  []byte
		fidelity content.Fidelity
		version  uint64
		entries  []*content.Entry
		block    []content.Entry
		keep     arena
	)
	err := each(func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case treeObjects:
			objects = bytes.Clone(b)
		case treeVersion:
			version = v
		case treeFidelity:
			fidelity = content.Fidelity(b)
		case treeEntry:
			if len(block) == 0 {
				block = make([]content.Entry, decodeBlock)
			}
			e := &block[0]
			block = block[1:]
			if err := decodeEntry(e, b, objects, &keep); err != nil {
				return fmt.Errorf("entry %d: %w", len(entries), err)
			}
			entries = append(entries, e)
		}
		return nil
	})
	return fidelity, version, entries, err
}

// eachField walks the fields of one message: v holds varints, b the rest.
func eachField(raw []byte, field func(n protowire.Number, v uint64, b []byte) error) error {
	for len(raw) > 0 {
		n, typ, l := protowire.ConsumeTag(raw)
		if l < 0 {
			return fmt.Errorf("%w: %v", errMalformed, protowire.ParseError(l))
		}
		raw = raw[l:]
		var v uint64
		var b []byte
		switch typ {
		case protowire.VarintType:
			v, l = protowire.ConsumeVarint(raw)
		case protowire.BytesType:
			b, l = protowire.ConsumeBytes(raw)
		default:
			return fmt.Errorf("%w: field %d has wire type %d", errMalformed, n, typ)
		}
		if l < 0 {
			return fmt.Errorf("%w: %v", errMalformed, protowire.ParseError(l))
		}
		raw = raw[l:]
		if err := field(n, v, b); err != nil {
			return err
		}
	}
	return nil
}

// maxField is the longest field that is believed before its bytes are there.
const maxField = 1 << 20

// readField appends n bytes of r to buf.
func readField(r io.Reader, buf []byte, n uint64) ([]byte, error) {
	for n > 0 {
		part := int(min(n, maxField))
		buf = slices.Grow(buf, part)
		if _, err := io.ReadFull(r, buf[len(buf):len(buf)+part]); err != nil {
			return nil, err
		}
		buf, n = buf[:len(buf)+part], n-uint64(part)
	}
	return buf, nil
}

// readFields is eachField for a message that is read as it is decoded: b is valid during a call only.
func readFields(src io.Reader, field func(n protowire.Number, v uint64, b []byte) error) error {
	r := bufio.NewReaderSize(src, encodeBuffer)
	var buf []byte
	for {
		tag, err := binary.ReadUvarint(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		var v uint64
		if err == nil {
			v, err = binary.ReadUvarint(r)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errMalformed, err)
		}
		n, typ := protowire.DecodeTag(tag)
		var b []byte
		switch {
		case n < 1 || typ != protowire.VarintType && typ != protowire.BytesType:
			return fmt.Errorf("%w: field %d has wire type %d", errMalformed, n, typ)
		case typ == protowire.BytesType:
			if b, err = readField(r, buf[:0], min(v, maxDecoded)); err != nil {
				return fmt.Errorf("%w: %w", errMalformed, err)
			}
			v, buf = 0, b
		}
		if err := field(n, v, b); err != nil {
			return err
		}
	}
}

func decodeEntry(e *content.Entry, raw, objects []byte, keep *arena) error {
	return eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case entryPath:
			e.Path = string(b)
		case entryKind:
			e.Kind = content.Kind(v)
		case entryFlags:
			e.Flags = content.Flags(v)
		case entryMode:
			e.Mode = uint32(v)
		case entryUID:
			e.UID = uint32(v)
		case entryGID:
			e.GID = uint32(v)
		case entrySec:
			e.Mtime.Sec = protowire.DecodeZigZag(v)
		case entryNsec:
			e.Mtime.Nsec = uint32(v)
		case entryXattr:
			var x content.Xattr
			err := eachField(b, func(n protowire.Number, _ uint64, b []byte) error {
				switch n {
				case 1:
					x.Name = string(b)
				case 2:
					x.Value = keep.clone(b)
				}
				return nil
			})
			e.Xattrs = append(e.Xattrs, x)
			return err
		case entryTarget:
			e.Target = string(b)
		case entryMajor:
			e.Major = uint32(v)
		case entryMinor:
			e.Minor = uint32(v)
		case entrySize:
			e.Size = int64(v)
		case entryData:
			e.Data = keep.clone(b)
		case entryObject:
			return objectAt(&e.Object, objects, v)
		case entryPycTime:
			e.PycTime = uint32(v)
		}
		return nil
	})
}

// arena holds many short byte strings in a few allocations, none so large that one string that lasts keeps much alive.
type arena struct{ room []byte }

const arenaSize = 16 << 10

func (a *arena) clone(b []byte) []byte {
	if len(b) > arenaSize/4 {
		return bytes.Clone(b)
	}
	if len(b) > cap(a.room)-len(a.room) {
		a.room = make([]byte, 0, arenaSize)
	}
	start := len(a.room)
	a.room = append(a.room, b...)
	return a.room[start:len(a.room):len(a.room)]
}

func objectAt(id *content.ObjectID, objects []byte, i uint64) error {
	const l = uint64(len(id.Sum))
	if i == 0 || i > uint64(len(objects))/l {
		return fmt.Errorf("%w: object %d of %d", errMalformed, i, uint64(len(objects))/l)
	}
	copy(id.Sum[:], objects[(i-1)*l:])
	return nil
}

// PayloadDigest returns the normalised identity of a layer: the digest of
// its canonical encoding with mtime, uid and gid of every entry and the recorded
// timestamps of valid CPython pairs left out. canonical has the payload with the
// source's SourceTime of those paired .pyc entries that hold exact bytes.
func PayloadDigest(entries []*content.Entry, canonical map[*content.Entry]content.Entry) content.PayloadDigest {
	var b content.Entry
	enc := encode("payload", entries, func(e *content.Entry) *content.Entry {
		b = *e
		if c, ok := canonical[e]; ok {
			b.Object, b.Data = c.Object, c.Data
		}
		b.UID, b.GID, b.Mtime = 0, 0, content.Time{}
		b.Flags &^= content.PycPaired | content.PySource
		b.PycTime = 0
		return &b
	})
	return content.PayloadDigest(enc.ID)
}
