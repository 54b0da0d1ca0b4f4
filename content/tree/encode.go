package tree

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
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
const formatVersion = 2

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
	entryPycCanonical
)

// Encoded is a layer's canonical encoding in its two parts, whose concatenation
// is one Tree message and names the layer.
type Encoded struct {
	ID      content.LayerID
	objects []byte // field treeObjects
	entries []byte // all other fields
	count   int    // objects
}

// Encode encodes a layer. entries are sorted by content.ComparePaths, paths unique.
func Encode(f content.Fidelity, entries []*content.Entry) Encoded {
	ids := objectsOf(entries)
	index := make(map[content.ObjectID]uint64, len(ids))
	raw := make([]byte, 0, len(ids)*len(content.Sum{}))
	for i, id := range ids {
		index[id] = uint64(i) + 1
		raw = append(raw, id.Sum[:]...)
	}
	enc := Encoded{count: len(ids)}
	if len(raw) > 0 {
		enc.objects = protowire.AppendTag(nil, treeObjects, protowire.BytesType)
		enc.objects = protowire.AppendBytes(enc.objects, raw)
	}
	b := make([]byte, 0, 128*len(entries)+64)
	b = appendUint(b, treeVersion, formatVersion)
	b = appendString(b, treeFidelity, string(f))
	var scratch []byte
	for _, e := range entries {
		scratch = appendEntry(scratch[:0], e, index)
		b = protowire.AppendTag(b, treeEntry, protowire.BytesType)
		b = protowire.AppendBytes(b, scratch)
	}
	enc.entries = b
	h := sha256.New()
	h.Write(enc.objects)
	h.Write(enc.entries)
	h.Sum(enc.ID.Sum[:0])
	return enc
}

func objectsOf(entries []*content.Entry) []content.ObjectID {
	var ids []content.ObjectID
	for _, e := range entries {
		if !e.Object.IsZero() {
			ids = append(ids, e.Object)
		}
		if !e.PycCanonical.IsZero() {
			ids = append(ids, e.PycCanonical)
		}
	}
	slices.SortFunc(ids, func(a, b content.ObjectID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) })
	return slices.Compact(ids)
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

func appendEntry(b []byte, e *content.Entry, index map[content.ObjectID]uint64) []byte {
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
		b = appendUint(b, entryObject, index[e.Object])
	}
	b = appendUint(b, entryPycTime, uint64(e.PycTime))
	if !e.PycCanonical.IsZero() {
		b = appendUint(b, entryPycCanonical, index[e.PycCanonical])
	}
	return b
}

// ErrDamaged is wrapped where a tree file is not what its name says, or nothing that can be read.
var ErrDamaged = errors.New("damaged tree")

var errMalformed = fmt.Errorf("%w: malformed", ErrDamaged)

// decodeBlock is how many entries share one allocation. An entry that lasts longer than the others of its layer, when
// a chain is merged, keeps the block alive.
const decodeBlock = 64

// decodeTree parses a canonical encoding. The entries share nothing with raw.
func decodeTree(raw []byte) (content.Fidelity, []*content.Entry, error) {
	var (
		objects  []byte
		fidelity content.Fidelity
		version  uint64
		entries  []*content.Entry
		block    []content.Entry
		keep     arena
	)
	err := eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case treeObjects:
			objects = b
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
	if err == nil && version != formatVersion {
		err = fmt.Errorf("%w: version %d, this build reads %d", errMalformed, version, formatVersion)
	}
	return fidelity, entries, err
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
		case entryPycCanonical:
			return objectAt(&e.PycCanonical, objects, v)
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
// timestamps of valid CPython pairs left out. canonical names the payload with the
// canonical timestamp of those paired .pyc entries that hold exact bytes.
func PayloadDigest(entries []*content.Entry, canonical map[*content.Entry]content.Entry) content.PayloadDigest {
	bare := make([]content.Entry, len(entries))
	ptrs := make([]*content.Entry, len(entries))
	for i, e := range entries {
		b := *e
		if c, ok := canonical[e]; ok {
			b.Object, b.Data = c.Object, c.Data
		}
		b.UID, b.GID, b.Mtime = 0, 0, content.Time{}
		b.Flags &^= content.PycPaired | content.PycLone
		b.PycTime, b.PycCanonical = 0, content.ObjectID{}
		bare[i], ptrs[i] = b, &bare[i]
	}
	return content.PayloadDigest(Encode("payload", ptrs).ID)
}
