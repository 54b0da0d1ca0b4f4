// Package erofs writes chain images: read-only EROFS file systems with the merged
// metadata of a chain. Small files lie in the image; every larger file is an
// inode without data whose overlayfs xattrs name its object.
//
// # The image
//
//	block 0   0      nothing (1 KiB for boot sectors)
//	          1024   superblock, 128 bytes, crc32c over the rest of block 0
//	          1152   root inode (nid 36 or soon after: the superblock has 16 bits for it)
//	                 shared xattrs: entries that several inodes refer to
//	                 all other inodes, a directory's children next to one another
//	block n   data   full directory blocks; tails that do not fit behind their inode
//	end              zeros up to a whole block
//
//	inode            at a multiple of 32 bytes; nid = offset / 32, as the metadata area
//	                 begins at block 0
//	  header         32 bytes (compact) or 64 (extended)
//	  xattrs         12 bytes header, ids of shared xattrs, own xattrs
//	  payload        one of
//	    tail         directory, symlink or file bytes (layout "inline")
//	    chunk index  8 bytes a chunk, all null: a file that is one hole (layout "chunk")
//	    nothing      empty file, device, or bytes in data blocks (layout "plain")
//
// The feature set is that of Linux 5.15 (chunk-based files being the newest of it).
// Images are a cache, rebuilt from trees, so the layout has no version of its own:
// the superblock's feature bits say all that a reader needs.
//
// # Invariants
//
//   - The same tree gives the same bytes, the uuid included.
//   - Header, xattrs and tail of an inline inode lie in one block: all kernels
//     refuse a tail that crosses blocks, and a symlink whose xattrs do.
//   - Only this package writes trusted.overlay.* xattrs: whoever can choose one can
//     make a file show any object. An entry that has one is an error, and so is
//     a 0/0 character device, which overlayfs takes for a whiteout.
//
// It does not look at objects and does not merge trees.
package erofs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

const (
	blockBits = 12
	blockSize = 1 << blockBits
	slotSize  = 32 // inodes begin at multiples of it

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xe0f5e1e2

	compatChecksum   = 1 << 0
	compatMtime      = 1 << 1 // inode times are mtimes
	incompatChunked  = 1 << 2
	superChecksumOff = 4
	superUUIDOff     = 48
	superBlocksOff   = 36
	superIncompatOff = 80
	superDevicesOff  = 86
	superTableOff    = 88
)

var le = binary.LittleEndian

// image is one image being written: scan fills inodes and refs, place gives each
// inode its offset, encode makes the bytes.
type image struct {
	ctx    context.Context
	inodes []inode // the root is first
	// refs holds the inodes of all directory children, directory by directory.
	refs   []int32
	epoch  content.Time // the mtime of all compact inodes
	shared sharedXattrs
	ents   []dirent                             // scratch of dirents
	text   []byte                               // scratch of redirect
	digest func(content.ObjectID) verity.Digest // nil: files without data say nothing of it
	packs  *packs                               // nil: files without data are holes
	length int64                                // of the image in bytes; a multiple of blockSize
	// chunked: there are files with payloads.
	chunked bool
}

// Write writes the image of root to w and returns its length in bytes.
//
// Nodes that share an Entry are one inode, except directories: each of those has
// its own. Write keeps some 100 bytes an entry in memory, and hands the image to w in
// pieces of 256 KiB and more. An error about an entry names its path; nothing was
// written then.
//
// Errors are: an Entry that breaks its contract; a kind, name, xattr name, device
// number, link target or size that EROFS or Linux cannot hold; an entry
// that would steer overlayfs (see Invariants).
func Write(ctx context.Context, w io.Writer, root *tree.Node) (int64, error) {
	return WriteVerity(ctx, w, root, nil)
}

// WriteVerity is Write with fs-verity's digest of each object in the xattr that leads to it: where overlayfs is mounted with verity=on it
// opens no object that has another. digest is asked once for each inode without data.
func WriteVerity(ctx context.Context, w io.Writer, root *tree.Node, digest func(content.ObjectID) verity.Digest) (int64, error) {
	im := image{ctx: ctx, digest: digest, shared: sharedXattrs{digests: digest != nil, redirectLen: redirectLen}}
	return im.write(w, root)
}

func (im *image) write(w io.Writer, root *tree.Node) (int64, error) {
	if err := im.scan(root); err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	if err := im.findPayloads(); err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	if err := im.place(); err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	sum := sha256.New()
	first := out{w: sum}
	if err := im.encode(&first); err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	seal(first.head, sum.Sum(nil))
	second := out{w: w, head: first.head, buf: first.buf[:0]}
	if err := im.encode(&second); err != nil {
		return second.base, err
	}
	return im.length, nil
}

// encode makes the bytes of a placed image.
func (im *image) encode(o *out) error {
	im.encodeSuper(o.at(superOffset, superSize))
	im.packs.encode(o)
	shared := im.shared.begin()
	err := im.inOrder(func(id int32) error {
		if shared > 0 && im.inodes[id].offset > shared {
			im.shared.encode(o)
			shared = 0
		}
		im.encodeInode(o, id)
		return o.err
	})
	if err != nil {
		return err
	}
	if shared > 0 {
		im.shared.encode(o)
	}
	for i := range im.inodes {
		if im.inodes[i].dataBlocks() > 0 {
			im.encodeBlocks(o, int32(i))
		}
	}
	return o.finish(im.length)
}

// inOrder calls f for all inodes by offset. They form two rows that are in order already: those that follow one another, and those in gaps.
func (im *image) inOrder(f func(id int32) error) error {
	next := func(i int, inGap bool) int {
		for i++; i < len(im.inodes) && im.inodes[i].inGap != inGap; i++ {
		}
		return i
	}
	row, gap := next(-1, false), next(-1, true)
	for n := range im.inodes {
		if err := im.stopped(n); err != nil {
			return err
		}
		id := row
		if row == len(im.inodes) || gap < len(im.inodes) && im.inodes[gap].offset < im.inodes[row].offset {
			id, gap = gap, next(gap, true)
		} else {
			row = next(row, false)
		}
		if err := f(int32(id)); err != nil {
			return err
		}
	}
	return nil
}

// stopped returns why to stop before inode i. It looks at every few thousandth.
func (im *image) stopped(i int) error {
	if i%(1<<12) != 0 || im.ctx.Err() == nil {
		return nil
	}
	return context.Cause(im.ctx)
}

// encodeSuper writes the superblock without what seal adds.
func (im *image) encodeSuper(sb []byte) {
	le.PutUint32(sb[0:], superMagic)
	le.PutUint32(sb[8:], compatChecksum|compatMtime)
	sb[12] = blockBits
	le.PutUint16(sb[14:], uint16(im.inodes[0].nid()))
	le.PutUint64(sb[16:], uint64(len(im.inodes)))
	le.PutUint64(sb[24:], uint64(im.epoch.Sec))
	le.PutUint32(sb[32:], im.epoch.Nsec)
	le.PutUint32(sb[superBlocksOff:], uint32(im.length/blockSize))
	// sb[40:48]: the metadata area and the shared xattrs are counted from block 0.
	incompat := uint32(0)
	if im.chunked {
		incompat |= incompatChunked
	}
	if im.packs.count() > 0 {
		incompat |= incompatDevices
		le.PutUint16(sb[superDevicesOff:], uint16(im.packs.count()))
		le.PutUint16(sb[superTableOff:], deviceTable/deviceSlot)
	}
	le.PutUint32(sb[superIncompatOff:], incompat)
}

// seal completes block 0: the uuid is made from the sum of the whole image without it, and the checksum is over what follows it in
// the block, inodes included.
func seal(block, sum []byte) {
	putUUID(block[superOffset:], sum)
	le.PutUint32(block[superOffset+superChecksumOff:], superChecksum(block))
}

// superChecksum is the kernel's over block 0, taken while the field itself is zero. It leaves out crc32c's last inversion.
func superChecksum(block []byte) uint32 {
	return ^crc32.Checksum(block[superOffset:], crc32.MakeTable(crc32.Castagnoli))
}

// putUUID writes a uuid made from a sum into a superblock.
func putUUID(sb, sum []byte) {
	uuid := sb[superUUIDOff : superUUIDOff+16]
	copy(uuid, sum)
	uuid[6] = uuid[6]&0x0f | 0x80 // RFC 9562: version 8, made by a rule of our own
	uuid[8] = uuid[8]&0x3f | 0x80
}
