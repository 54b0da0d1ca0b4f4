package erofs

import (
	"math"
	"math/bits"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

const (
	compactSize  = 32
	extendedSize = 64

	layoutPlain  = 0
	layoutInline = 2
	layoutChunk  = 4

	// A chunk is a block shifted left by up to 31 bits.
	maxChunkShift = 31
	maxChunks     = 128
	chunkSize     = 8 // of an index entry
	// chunkIndexes asks for 8-byte index entries, which name a device.
	chunkIndexes = 1 << 5
)

// inode is one inode of an image.
type inode struct {
	node   *tree.Node // its first name
	parent int32      // the directory that holds node
	refs   int32      // of a Dir: where its children begin in image.refs
	nlink  uint32
	xattrs uint32 // bytes of the xattr area
	size   int64  // i_size

	extended bool
	inGap    bool // see arena.take
	layout   uint8
	device   uint16 // of the pack with the payload, if any
	number   uint32 // of the payload in its pack
	block    uint32 // the first data block, in the image or the pack, if any
	offset   int64  // in the image
}

func (in *inode) nid() uint64 { return uint64(in.offset) / slotSize }

// headerSize is the length of the inode without xattrs and payload.
func (in *inode) headerSize() int64 {
	if in.extended {
		return extendedSize
	}
	return compactSize
}

// dataless tells a file whose bytes are an object.
func dataless(e *content.Entry) bool {
	return e.Kind == content.Regular && e.Size > 0 && len(e.Data) == 0
}

// fitsCompact tells whether all but the mtime fits a compact inode.
func (in *inode) fitsCompact() bool {
	e := in.node.Entry
	return e.UID <= math.MaxUint16 && e.GID <= math.MaxUint16 &&
		in.nlink <= math.MaxUint16 && in.size <= math.MaxUint32
}

// tail is how much of the payload does not fill a block.
func (in *inode) tail(unit blocks) int64 { return in.size & (unit.size() - 1) }

// chooseLayout decides how the payload is stored, once the header's and the xattrs'
// lengths are known.
func (in *inode) chooseLayout(unit blocks) {
	switch tail := in.tail(unit); {
	case dataless(in.node.Entry):
		in.layout = layoutChunk
	case in.node.Entry.Kind == content.Symlink && in.size > unit.size():
		in.layout = layoutPlain // kernels want all of an inline one behind its inode
	case tail > 0 && in.headerSize()+int64(in.xattrs)+tail <= unit.size():
		in.layout = layoutInline
	default:
		in.layout = layoutPlain
	}
}

// length is how many bytes the inode takes in the metadata area.
func (in *inode) length(unit blocks) int64 {
	end := in.headerSize() + int64(in.xattrs)
	switch in.layout {
	case layoutChunk:
		return alignUp(end, chunkSize) + chunkSize*in.chunks(unit)
	case layoutInline:
		return end + in.tail(unit)
	}
	return end
}

// dataBlocks is how many blocks of the data area the payload takes.
func (in *inode) dataBlocks(unit blocks) int64 {
	switch in.layout {
	case layoutInline:
		return in.size >> unit
	case layoutPlain:
		return unit.count(in.size)
	}
	return 0
}

// chunkShift makes chunks so large that one will do. It is no larger than needed:
// 32-bit kernels compute chunk lengths in 32 bits.
func (in *inode) chunkShift(unit blocks) int {
	return min(max(bits.Len64(uint64(in.size-1))-int(unit), 0), maxChunkShift)
}

func (in *inode) chunks(unit blocks) int64 {
	return (in.size-1)>>(int(unit)+in.chunkShift(unit)) + 1
}

// encodeInode writes an inode with what lies behind it.
func (im *image) encodeInode(o *out, id int32) {
	in := &im.inodes[id]
	e := in.node.Entry
	b := o.at(in.offset, in.length(im.unit))
	in.encodeHeader(b, im.unit, uint32(id)+1)
	b = b[in.headerSize():]
	if in.xattrs > 0 {
		im.shared.encodeArea(b, e, im.redirect(in))
	}
	switch in.layout {
	case layoutChunk:
		in.encodeChunks(im.unit, b[alignUp(int64(in.xattrs), chunkSize):])
	case layoutInline:
		im.encodeTail(b[in.xattrs:], id)
	}
}

// encodeTail writes the part of a payload that lies behind its inode: what does not fill a block.
func (im *image) encodeTail(b []byte, id int32) {
	in := &im.inodes[id]
	switch e := in.node.Entry; e.Kind {
	case content.Regular:
		copy(b, e.Data[in.size-in.tail(im.unit):])
	case content.Symlink:
		copy(b, e.Target)
	case content.Dir:
		var last []dirent
		im.dirBlocks(id, func(_ int64, ents []dirent, _ int64) { last = ents })
		im.encodeDirents(b, last)
	}
}

// encodeBlocks writes the part of a payload that lies in blocks of its own.
func (im *image) encodeBlocks(o *out, id int32) {
	in := &im.inodes[id]
	at := int64(in.block) * im.unit.size()
	switch e := in.node.Entry; e.Kind {
	case content.Regular:
		copy(o.at(at, min(in.size, in.dataBlocks(im.unit)*im.unit.size())), e.Data)
	case content.Symlink:
		copy(o.at(at, in.size), e.Target)
	case content.Dir:
		blocks := in.dataBlocks(im.unit)
		im.dirBlocks(id, func(n int64, ents []dirent, length int64) {
			if n < blocks {
				im.encodeDirents(o.at(at+n*im.unit.size(), length), ents)
			}
		})
	}
}

// encodeHeader writes the compact or extended inode at b[0].
func (in *inode) encodeHeader(b []byte, unit blocks, ino uint32) {
	e := in.node.Entry
	format := uint16(in.layout) << 1
	if in.extended {
		format |= 1
	}
	le.PutUint16(b[0:], format)
	le.PutUint16(b[2:], xattrCount(in.xattrs))
	le.PutUint16(b[4:], modeType(e.Kind)|uint16(e.Mode))
	le.PutUint32(b[16:], in.union(unit))
	le.PutUint32(b[20:], ino)
	if !in.extended {
		le.PutUint16(b[6:], uint16(in.nlink))
		le.PutUint32(b[8:], uint32(in.size))
		// b[12:16]: seconds after the epoch since 6.15, ignored before. Zero, as
		// only inodes of that very mtime are compact.
		le.PutUint16(b[24:], uint16(e.UID))
		le.PutUint16(b[26:], uint16(e.GID))
		return
	}
	le.PutUint64(b[8:], uint64(in.size))
	le.PutUint32(b[24:], e.UID)
	le.PutUint32(b[28:], e.GID)
	le.PutUint64(b[32:], uint64(e.Mtime.Sec))
	le.PutUint32(b[40:], e.Mtime.Nsec)
	le.PutUint32(b[44:], in.nlink)
}

// union is the field whose meaning depends on kind and layout.
func (in *inode) union(unit blocks) uint32 {
	switch e := in.node.Entry; {
	case e.Kind == content.Char || e.Kind == content.Block:
		// The kernel's new_encode_dev.
		return e.Minor&0xff | e.Major<<8 | (e.Minor&^0xff)<<12
	case in.layout == layoutChunk:
		return chunkIndexes | uint32(in.chunkShift(unit))
	}
	return in.block
}

// modeType is the S_IFMT part of a mode.
func modeType(k content.Kind) uint16 {
	switch k {
	case content.Dir:
		return 0o040000
	case content.Regular:
		return 0o100000
	case content.Symlink:
		return 0o120000
	case content.Char:
		return 0o020000
	case content.Block:
		return 0o060000
	case content.Fifo:
		return 0o010000
	}
	return 0o140000 // Socket: check lets nothing else through
}

// alignUp rounds n up to a multiple of to, a power of two.
func alignUp(n, to int64) int64 { return (n + to - 1) &^ (to - 1) }
