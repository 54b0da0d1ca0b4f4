// Package recipe makes a layer's blob again from the files of the layer, bit for bit.
//
// # Words
//
//   - recipe: all that it takes to make one blob again, but for what the layer holds.
//   - payload: the content of a regular file of the layer's tree. Payloads are counted in the order of the tree.
//   - literal: bytes of the tar that are no payload: headers, padding, what follows the archive's end.
//   - encoder: a compressor with its setting, compiled into this program. Its name stands in recipes, so a name never
//     comes to mean another one.
//   - fingerprint: the sha256 of what an encoder makes of a fixed text. Another release of Go or of a library may
//     compress differently: then the fingerprint differs, and the recipe is refused before any work is done.
//
// # Format
//
//	zstd frame, with a checksum
//	    "dedup recipe\n", version (1 byte)
//	    header: length (uvarint), fields as in protobuf
//	    steps, each a uvarint n<<2 | kind:
//	        0 literal   n bytes follow
//	        1 payload   its number is that of the one before, plus 1, plus n (zigzag)
//	        2 payload   the same, and 4 bytes of its own stand from byte 8 on: the timestamp of Python bytecode
//	        3 end       n is 0
//
// A recipe names its layer, and the layer's id covers each payload. Whoever makes a blob compares its digest: nothing
// else proves that a recipe is right.
//
// # What cannot be made again
//
// Blobs of encoders that are not here: ErrNoEncoder. Tars whose bytes are for a large part not in the layer, since a
// later member replaced a file, say, or in large sparse files: ErrTooLarge.
package recipe

import (
	"errors"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

var (
	// ErrNoEncoder is wrapped where no encoder makes the blob.
	ErrNoEncoder = errors.New("no encoder makes this blob again")
	// ErrTooLarge is wrapped where a recipe would take too much of what the blob takes.
	ErrTooLarge = errors.New("too little of the blob's tar is in the layer")
	// ErrDamaged is wrapped where a recipe is not what was written, or was written by nobody.
	ErrDamaged = errors.New("recipe is damaged")
	// ErrOtherEncoder is wrapped where this program's encoder makes other bytes than the one the recipe was made with.
	ErrOtherEncoder = errors.New("its encoder has changed")
	// ErrOtherBytes is wrapped where a recipe gives another blob than it names.
	ErrOtherBytes = errors.New("the blob that was made is another one")
)

// Layer is what a recipe is made and followed with. The caller keeps it alive.
type Layer struct {
	ID content.LayerID
	// Entries are the layer's tree, sorted by content.ComparePaths.
	Entries []*content.Entry
	// ReadAt fills b from an offset of an object on, or fails.
	ReadAt func(id content.ObjectID, b []byte, off int64) error
}

// Header is what a recipe says of itself.
type Header struct {
	Blob    content.Sum // sha256
	Size    int64       // of the blob, in bytes
	TarSize int64
	Layer   content.LayerID
	// Encoder is its name; Fingerprint what it made of the fixed text.
	Encoder     string
	Fingerprint content.Sum
	// Head is the blob's gzip header.
	Head []byte
}

// payloadsOf returns the regular files that have bytes, in the order of the tree.
func (l Layer) payloads() (list []*content.Entry) {
	for _, e := range l.Entries {
		if e.Kind == content.Regular && e.Size > 0 {
			list = append(list, e)
		}
	}
	return list
}

// readAt reads a part of a payload.
func (l Layer) readAt(e *content.Entry, b []byte, off int64) error {
	if e.Object.IsZero() {
		copy(b, e.Data[off:])
		return nil
	}
	return l.ReadAt(e.Object, b, off)
}
