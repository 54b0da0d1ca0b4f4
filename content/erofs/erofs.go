// Package erofs writes chain images: read-only EROFS file systems with the
// merged metadata of a chain, whose larger files are data-less and redirect to objects.
package erofs

import (
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Write writes the image of root to w and returns its length in bytes.
func Write(w io.Writer, root *tree.Node) (int64, error) { panic("TBD") }
