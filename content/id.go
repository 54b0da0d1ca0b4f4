package content

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// Sum is a sha256 sum. It is embedded by the id types so that one kind of id
// cannot be handed over as another.
type Sum [sha256.Size]byte

// Hex returns the sum as 64 lower-case hex digits.
func (s Sum) Hex() string { return hex.EncodeToString(s[:]) }

// Digest returns the sum in OCI's form, "sha256:<hex>".
func (s Sum) Digest() digest.Digest { return digest.NewDigestFromEncoded(digest.SHA256, s.Hex()) }

// String is Hex.
func (s Sum) String() string { return s.Hex() }

// IsZero reports whether the sum was never set.
func (s Sum) IsZero() bool { return s == Sum{} }

// ParseSum accepts 64 hex digits, with or without OCI's "sha256:" in front.
func ParseSum(text string) (Sum, error) {
	var s Sum
	const prefix = "sha256:"
	raw := text
	if len(raw) > len(prefix) && raw[:len(prefix)] == prefix {
		raw = raw[len(prefix):]
	}
	if len(raw) != hex.EncodedLen(len(s)) {
		return Sum{}, fmt.Errorf("parse sha256 %q: want %d hex digits, got %d", text, hex.EncodedLen(len(s)), len(raw))
	}
	if _, err := hex.Decode(s[:], []byte(raw)); err != nil {
		return Sum{}, fmt.Errorf("parse sha256 %q: %w", text, err)
	}
	return s, nil
}

type (
	// DiffID is the sha256 of an uncompressed layer tar.
	DiffID struct{ Sum }
	// ChainID is OCI's identity of a stack of diffIDs.
	ChainID struct{ Sum }
	// ObjectID is the sha256 of a regular file's bytes.
	ObjectID struct{ Sum }
	// LayerID is the sha256 of a layer's canonical tree.
	LayerID struct{ Sum }
	// PayloadDigest is the sha256 of a canonical tree without mtime, uid and gid.
	PayloadDigest struct{ Sum }
)

// Path returns where the object lies below the objects directory:
// "<2 hex>/<62 hex>". Overlayfs follows it from trusted.overlay.redirect.
func (o ObjectID) Path() string {
	h := o.Hex()
	return h[:2] + "/" + h[2:]
}

// Chain extends c by one layer, as the OCI image spec defines ChainID. The
// zero ChainID stands for "no parent".
func (c ChainID) Chain(d DiffID) ChainID {
	if c.IsZero() {
		return ChainID(d)
	}
	return ChainID{sha256.Sum256([]byte(c.Digest().String() + " " + d.Digest().String()))}
}

// Leads returns a function that reports whether c.Chain(d) == to. It is for trying many: one
// costs a fifth of a microsecond. c is not zero. The function must not be called concurrently.
func (c ChainID) Leads(to ChainID) func(d DiffID) bool {
	text := []byte(c.Digest().String() + " " + DiffID{}.Digest().String())
	last := text[len(text)-hex.EncodedLen(sha256.Size):]
	return func(d DiffID) bool {
		hex.Encode(last, d.Sum[:])
		return sha256.Sum256(text) == to.Sum
	}
}

// PackID names a pack: the microseconds since 1970 at which it was begun, raised where needed so that ids grow. An id
// is never used again.
type PackID uint64

// packIDLen is the length of a PackID as text.
const packIDLen = 13

// MaxPackID is the last id that has the length of all others: of the year 2112.
const MaxPackID PackID = 1<<(4*packIDLen) - 1

// String returns the id as 13 lower-case hex digits.
func (p PackID) String() string { return fmt.Sprintf("%0*x", packIDLen, uint64(p)) }

// ParsePackID is the reverse of String; it accepts no other spelling.
func ParsePackID(text string) (PackID, bool) {
	n, err := strconv.ParseUint(text, 16, 64)
	return PackID(n), err == nil && len(text) == packIDLen && PackID(n).String() == text
}

// Place is where a payload lies: in a pack, as its N-th, from Offset on.
type Place struct {
	Pack   PackID
	N      uint32
	Offset int64 // bytes, from the beginning of the pack's file
	Size   int64 // bytes
}
