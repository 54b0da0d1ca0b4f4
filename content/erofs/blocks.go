package erofs

// DenseBlock is what payloads in dense packs are aligned to, in bytes. It is the smallest block of EROFS.
const DenseBlock = 1 << dense

// blocks are the blocks of an image: the logarithm of their size.
type blocks uint8

const (
	coarse blocks = 12 // content.BlockSize
	dense  blocks = 9
)

func blocksOf(isDense bool) blocks {
	if isDense {
		return dense
	}
	return coarse
}

func (b blocks) size() int64 { return 1 << b }

// count is how many blocks so many bytes take.
func (b blocks) count(n int64) int64 { return (n + b.size() - 1) >> b }

// align rounds bytes up to whole blocks.
func (b blocks) align(n int64) int64 { return b.count(n) << b }

// Space returns what a payload takes in a pack, in bytes, but for what the pack says of it.
func Space(size int64, isDense bool) int64 { return blocksOf(isDense).align(size) }
