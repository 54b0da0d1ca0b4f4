// Package archive turns a layer's tar stream, or the upper directory of an
// overlay, into normalised entries. Hostile input ends here: whatever comes out
// is sorted by content.ComparePaths, has the root first, every parent present,
// every path clean and unique, and only metadata that a kernel would accept.
//
// # What a tar means
//
// The reference is what containerd's overlayfs snapshotter shows after
// containerd's applier ran (pkg/archive of containerd 2.x): a member is put where
// the symlinks of its own layer lead, a later member replaces an earlier one, a
// hardlink's header is applied to the inode it shares. ReadTar plays this through
// on a tree in memory, with the payloads handed to a Payloads as they pass.
//
// It is stricter than the reference where an image could only mean harm
// (ErrInvalid): paths, symlinks and hardlinks that climb above the root,
// trusted.overlay.* attributes (but for opaque=y on a directory, which is dropped, as
// the reference drops all of trusted.*), owners and device numbers that the kernel would
// truncate. It follows the image spec where the applier depends on accidents:
//
//   - a whiteout hides lower layers only, wherever it stands in the archive;
//   - sparse and contiguous members are regular files;
//   - a hardlink may name a file of a lower layer (content.LowerLink);
//   - a file inherits neither the default ACL nor the setgid group of its
//     directory: its own member says what it has;
//   - a parent that no member names has no mtime of its own.
//
// # What a directory means
//
// ReadDir reads overlayfs's own notation: whiteout devices, opaque and metacopy
// attributes. Only the trusted.overlay.* ones speak to the overlays of this
// system; user.overlay.* is what an image or a container stored for itself and
// stays an attribute like any other.
//
// # What it does not do
//
// It does not verify digests, store payloads, limit sizes (a Payloads may) or memory (a
// Memory may), or look at lower layers.
package archive

import (
	"errors"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrInvalid is wrapped by every error that is the archive's own fault, as
// opposed to one of reading it or of a Payloads.
var ErrInvalid = errors.New("invalid layer archive")

// Payloads takes the bytes of regular files, in archive order, from one goroutine.
type Payloads interface {
	// Put reads exactly e.Size bytes (never 0) from r. It may set e.Data or
	// e.Object (and the Pyc fields) later, so these must not be looked at before the caller's own
	// barrier. r must not be used after Put returns, and neither may e's other
	// fields be read before that barrier: a later hardlink changes them. An entry whose
	// payload was put may be missing from the result when a later member replaced it.
	Put(e *content.Entry, r io.Reader) error
}
