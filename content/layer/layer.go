// Package layer is the deep module: it turns blobs and directories into layers,
// keeps them durable, finds them again, and frees what nothing names any more.
package layer

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Options configure a Store.
type Options struct {
	// Root is the store's directory; it must exist.
	Root string
	// Fidelity under which new layers are ingested; "" is content.Python.
	Fidelity content.Fidelity
}

// Blob is a compressed (or plain) layer tar to be ingested.
type Blob struct {
	Digest    digest.Digest
	MediaType string
	Size      int64
	// Open is called at most once, and what it returns is closed by the store.
	Open func(context.Context) (io.ReadCloser, error)
}

// Dir is the upper directory of an overlay to be ingested.
type Dir struct {
	Upper string
	// View is the merged mount that shows Upper over its parents; needed only where
	// Upper holds data-less metacopy files. "" when there is none.
	View string
}

// Ingested is what an ingest found out.
type Ingested struct {
	Layer  content.LayerID
	DiffID content.DiffID // zero for a directory
	// TarSize is the length of the uncompressed tar in bytes, 0 for a directory.
	TarSize int64
	// Added is what the ingest really added to the disk.
	Added Usage
}

// Usage is disk space as the file system accounts it.
type Usage struct {
	Bytes  int64 // allocated bytes
	Inodes int64
}

// Facts are what the store knows of a layer without reading its tree.
type Facts struct {
	ID       content.LayerID
	Fidelity content.Fidelity
	Payload  content.PayloadDigest
	DiffIDs  []content.DiffID
	Entries  int64
	Bytes    int64 // sum of regular files' sizes
	Usage    Usage // what its ingest added to the disk
}

// Store holds layers. Every LayerID that a method returns carries one hold, which
// keeps the layer alive until Release; holds are counted, in memory. Safe for
// concurrent use.
type Store struct{}

// Open opens or creates the store below opts.Root. live names every layer that a
// snapshot refers to, once per reference: each gets one hold, every other layer is
// removed.
func Open(ctx context.Context, opts Options, live []content.LayerID) (*Store, error) { panic("TBD") }

// Close waits for background work. Holds end with it.
func (s *Store) Close() error { panic("TBD") }

// ObjectsDir is the data-only lower layer of every mount.
func (s *Store) ObjectsDir() string { panic("TBD") }

// IngestBlob stores a blob as a layer and returns it, held, once all of it is
// durable. The same blob asked for twice at the same time is ingested once; a
// caller whose ctx ends does not harm the others who wait. A blob that the store already
// knows is not opened at all.
func (s *Store) IngestBlob(ctx context.Context, b Blob) (Ingested, error) { panic("TBD") }

// IngestDir stores a directory as a layer and returns it, held, once durable.
func (s *Store) IngestDir(ctx context.Context, d Dir) (Ingested, error) { panic("TBD") }

// Lookup finds the layer of a diffID under the store's fidelity and holds it.
func (s *Store) Lookup(d content.DiffID) (content.LayerID, bool) { panic("TBD") }

// Infer finds the known diffID for which parent.Chain(diffID) == chain.
func (s *Store) Infer(parent, chain content.ChainID) (content.DiffID, bool) { panic("TBD") }

// Hold adds a hold to a layer that the caller already holds.
func (s *Store) Hold(id content.LayerID) { panic("TBD") }

// Release gives a hold back. A layer without holds is removed in the background,
// with every object that no other layer names.
func (s *Store) Release(id content.LayerID) { panic("TBD") }

// Facts returns what is known of a layer.
func (s *Store) Facts(id content.LayerID) (Facts, error) { panic("TBD") }

// Merge reads the trees of a chain, base first, and merges them. The empty
// chain is an empty root directory.
func (s *Store) Merge(ctx context.Context, chain []content.LayerID) (*tree.Node, error) {
	panic("TBD")
}
