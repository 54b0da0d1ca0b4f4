// Package archive turns a layer's tar stream, or the upper directory of an
// overlay, into normalised entries. Hostile input ends here.
package archive

import (
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Payloads takes the bytes of regular files, in archive order, from one goroutine.
type Payloads interface {
	// Put reads exactly e.Size bytes (never 0) from r. It may set e.Data or
	// e.Object (and the Pyc fields) later, so these must not be looked at before the caller's own
	// barrier. r must not be used after Put returns. An entry whose
	// payload was put may be missing from the result when a later member replaced it.
	Put(e *content.Entry, r io.Reader) error
}
