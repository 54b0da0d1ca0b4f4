package erofs

import (
	"fmt"
	"io"
	"math"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Trailer is what the end of a pack's file says, at the cost of one small read.
type Trailer struct {
	Pack   content.PackID
	Blocks uint32
	Sum    content.Sum
	// Metadata is where the inodes and names of its file system begin, in bytes, MetadataLen their length.
	Metadata, MetadataLen int64
}

// trailer is all that it says.
type trailer struct {
	Trailer
	version uint32
	meta    uint32 // the first block after the payloads
	slots   int64
	table   int64 // where it begins, from meta on
}

// ReadTrailer reads it from a file of this many bytes. It does not look whether the rest of the file agrees: OpenPack
// does.
func ReadTrailer(r io.ReaderAt, size int64) (Trailer, error) {
	t, err := readTrailer(r, size)
	return t.Trailer, err
}

func readTrailer(r io.ReaderAt, size int64) (t trailer, err error) {
	if size < 2*blockSize || size%blockSize != 0 || size/blockSize > math.MaxUint32 {
		return t, damagedPack("a file of %d bytes is none", size)
	}
	var b [trailerLen]byte
	if _, err := r.ReadAt(b[:], size-trailerLen); err != nil {
		return t, fmt.Errorf("read the trailer of a pack: %w", err)
	}
	t.Pack, t.Blocks = content.PackID(le.Uint64(b[16:])), le.Uint32(b[28:])
	t.version, t.meta = le.Uint32(b[8:]), le.Uint32(b[24:])
	t.slots, t.table = int64(le.Uint32(b[12:])), int64(le.Uint64(b[32:]))
	t.Metadata, t.MetadataLen = int64(t.meta)*blockSize, t.table
	copy(t.Sum[:], b[sumOffset:])
	length := size - int64(t.meta)*blockSize
	switch {
	case string(b[:8]) != packMagic:
		return t, damagedPack("it has no trailer")
	case int64(t.Blocks)*blockSize != size:
		return t, damagedPack("it has %d bytes, its trailer says %d", size, int64(t.Blocks)*blockSize)
	case t.meta < 1 || t.Pack > content.MaxPackID || t.slots > maxSlots,
		t.table < packFilesNid*slotSize || t.table > length,
		// All of the numbers go together, so a wrong one is found before it is asked for as memory.
		alignUp(t.table+t.slots*slotLen+trailerLen, blockSize) != length:
		return t, damagedPack("its trailer says what cannot be")
	}
	return t, nil
}
