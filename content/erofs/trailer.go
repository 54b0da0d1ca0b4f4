package erofs

import (
	"fmt"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Trailer is what the end of a pack's file says, at the cost of one small read.
type Trailer struct {
	Pack   content.PackID
	Blocks uint32
	Sum    content.Sum
}

// ReadTrailer reads it from a file of this many bytes. It does not look whether the rest of the file agrees: OpenPack does.
func ReadTrailer(r io.ReaderAt, size int64) (t Trailer, err error) {
	damaged := func(format string, args ...any) error {
		return fmt.Errorf("pack is %w: %s", ErrDamaged, fmt.Sprintf(format, args...))
	}
	if size < 2*blockSize || size%blockSize != 0 {
		return t, damaged("a file of %d bytes is none", size)
	}
	var b [trailerLen]byte
	if _, err := r.ReadAt(b[:], size-trailerLen); err != nil {
		return t, fmt.Errorf("read the trailer of a pack: %w", err)
	}
	t.Pack, t.Blocks = content.PackID(le.Uint64(b[16:])), le.Uint32(b[28:])
	copy(t.Sum[:], b[sumOffset:])
	switch {
	case string(b[:8]) != packMagic:
		return t, damaged("it has no trailer")
	case int64(t.Blocks)*blockSize != size:
		return t, damaged("it has %d bytes, its trailer says %d", size, int64(t.Blocks)*blockSize)
	}
	return t, nil
}
