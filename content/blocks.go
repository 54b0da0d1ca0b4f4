package content

// BlockSize is what files of a store are a multiple of, and what sizes of files are rounded up to, to tell what they
// occupy.
const BlockSize = 4096

// Blocks returns what a file of this size occupies, in bytes.
func Blocks(size int64) int64 { return (size + BlockSize - 1) &^ (BlockSize - 1) }
