// Package erofs writes and reads the two kinds of EROFS images that a store is made of. A pack holds payloads. A
// chain image holds the merged metadata of a chain; small files lie in it, and every larger one points into a pack.
//
// Both are multiples of 4 KiB, and have blocks of 4 KiB or of 512 bytes: those with the smaller ones are dense.
//
//	packs/<pack id>.erofs
//	  0            nothing (1 KiB for boot sectors)
//	  1024         superblock, written last; its metadata area begins at m
//	  4096         payloads in order of arrival; each begins a block, and its last block ends with zeros
//	  m            inodes    32 bytes each (64 for payloads of 4 GiB and more), all plain: first block and size;
//	                         mode 0444, root's, of 1970
//	                         /                   nid 1
//	                         /<pack id>/         nid 4
//	                         /<pack id>/<n>      the payload of slot n: six hex digits, so that they sort by number
//	               names     the blocks of /<pack id>/
//	               table     44 bytes a slot: sha256 of the payload, first block, size; zeros where there is none
//	               zeros     up to 4 KiB
//	               trailer   the last 80 bytes of the file: magic, version (2 of dense ones, else 1), counts,
//	                         offsets, and the sha256 of the first 4 KiB and all from m on
//
//	chains/<key>.erofs
//	  head         0      nothing
//	               1024   superblock, 128 bytes, crc32c over its block; the uuid is made from the sha256 of all
//	                      other bytes
//	               1152   device table: for each pack 128 bytes: tag, blocks, where it would lie in one file with all
//	               then   pack list: magic, flavour, count, crc32c of table and list, the ids of the packs
//	               then   root inode (its nid fits the superblock's 16 bits)
//	                      shared xattrs: entries that several inodes refer to
//	                      all other inodes, a directory's children next to one another
//	  block n      data   full blocks of directories, files and long symlinks; tails that do not fit behind their inode
//	  end          zeros up to 4 KiB
//
//	inode            at a multiple of 32 bytes; nid = offset / 32, as the metadata area of a chain image begins at
//	                 block 0, and that is the st_ino that programs see: small, and another for each inode
//	  header         32 bytes (compact) or 64 (extended)
//	  xattrs         12 bytes header, ids of shared xattrs, own xattrs
//	  payload        one of
//	    tail         directory, symlink or file bytes (layout "inline")
//	    chunk index  8 bytes a chunk: device (the pack, counted from 1) and block in it (layout "chunk")
//	    nothing      empty file, device, or bytes in data blocks (layout "plain")
//
// In a dense image all that counts blocks counts those of 512 bytes: inodes, directories, chunk indexes, the device
// table, a pack's table. What lies behind an inode must not cross one, and the crc32c is over the 512 bytes from the
// superblock on. m and the lengths in a pack's trailer are of 4 KiB in both.
//
// A chain image is mounted with its packs, in the order of the list: device=<pack>,device=<pack>. It comes in two
// flavours, which read the same by themselves. In a private one that is all. In a shared one files with payloads also
// have overlayfs's xattrs metacopy and redirect, which name the payload's file in its pack: under an overlay over
// <chain>::<pack>::<pack> the bytes come from the mounted packs, so all images share them in memory. An overlay over a
// shared image alone would look for payloads in vain. The root of a shared image has a whiteout named like each of its
// packs, so that an overlay in which packs are layers like any other shows none of them.
//
// # What kernels want
//
// Blocks smaller than a page need Linux 6.4, or 6.1 from 6.1.115 on. An image has one size of blocks for all its packs,
// so it is dense if one of them is. Payloads then begin at multiples of 512 bytes of a file, which loop devices with
// larger blocks do not read.
//
// Devices need Linux 5.16. Image and packs are either all files (6.12) or all block devices; the count of devices is
// compared, their length and tag are not. A pack that is cut still mounts, and reads beyond its end are EIO: compare
// it with OpenPack before. A chain image that is mounted without any device is taken for one file with all its packs
// behind it (6.4; older ones refuse), which is why the device table says where they would be: every read is EIO then.
// 6.1 looks for data-only lower layers in vain ("empty lowerdir").
//
// Chain images are a cache, rebuilt from trees, so their layout has no version of its own: the superblock's feature
// bits and the pack list say all that a reader needs. Packs are what a store lives from: a change of theirs needs a
// new version, and readers of the old ones.
//
// # Invariants
//
//   - The same tree over the same places gives the same bytes, the uuid included.
//   - Header, xattrs and tail of an inline inode lie in one block: all kernels
//     refuse a tail that crosses blocks, and a symlink whose xattrs do.
//   - Only this package writes trusted.overlay.* xattrs: whoever can choose one can
//     make a file show any payload. An entry that has one is an error, and so is
//     a 0/0 character device, which overlayfs takes for a whiteout: only those
//     that hide packs are written.
//   - A pack is written once. Nothing in it moves or is punched out after Seal.
//
// It does not look at payloads, does not merge trees, and syncs nothing.
package erofs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

const (
	// blockSize is what lengths of files are a multiple of. What lies before it, the superblock among it, is written
	// last.
	blockSize = content.BlockSize
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
	unit   blocks
	inodes []inode // the root is first
	// refs holds the inodes of all directory children, directory by directory.
	refs   []int32
	epoch  content.Time // the mtime of all compact inodes
	shared sharedXattrs
	ents   []dirent // scratch of dirents
	text   []byte   // scratch of redirect
	packs  *packs
	length int64 // of the image in bytes; a multiple of blockSize
	// chunked: there are files with payloads.
	chunked bool
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
	if at, ok := w.(io.WriterAt); ok {
		return im.length, im.writeOnce(w, at, sum)
	}
	first := out{w: sum}
	if err := im.encode(&first); err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	seal(first.head, im.unit, sum.Sum(nil))
	second := out{w: w, head: first.head, buf: first.buf[:0]}
	if err := im.encode(&second); err != nil {
		return second.base, err
	}
	return im.length, nil
}

// writeOnce makes a placed image once: its head, which nothing takes for an image before, comes last.
func (im *image) writeOnce(w io.Writer, at io.WriterAt, sum hash.Hash) error {
	o := out{w: io.MultiWriter(w, sum)}
	if err := im.encode(&o); err != nil {
		return err
	}
	seal(o.head, im.unit, sum.Sum(nil))
	if _, err := at.WriteAt(o.head, 0); err != nil {
		return fmt.Errorf("write chain image: %w", err)
	}
	return nil
}

// encode makes the bytes of a placed image.
func (im *image) encode(o *out) error {
	im.encodeSuper(o.at(superOffset, superSize))
	im.packs.encode(o, im.length)
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
		if im.inodes[i].dataBlocks(im.unit) > 0 {
			im.encodeBlocks(o, int32(i))
		}
	}
	return o.finish(im.length)
}

// inOrder calls f for all inodes by offset. They form two rows that are in order already: those that follow one
// another, and those in gaps.
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
	sb[12] = byte(im.unit)
	le.PutUint16(sb[14:], uint16(im.inodes[0].nid()))
	le.PutUint64(sb[16:], uint64(len(im.inodes)))
	le.PutUint64(sb[24:], uint64(im.epoch.Sec))
	le.PutUint32(sb[32:], im.epoch.Nsec)
	le.PutUint32(sb[superBlocksOff:], uint32(im.unit.count(im.length)))
	// sb[40:48]: the metadata area and the shared xattrs are counted from block 0.
	incompat := uint32(0)
	if im.chunked {
		incompat |= incompatChunked
	}
	if len(im.packs.Packs) > 0 {
		incompat |= incompatDevices
		le.PutUint16(sb[superDevicesOff:], uint16(len(im.packs.Packs)))
		le.PutUint16(sb[superTableOff:], deviceTable/deviceSlot)
	}
	le.PutUint32(sb[superIncompatOff:], incompat)
}

// seal completes the head: the uuid is made from the sum of the whole image without it, and the checksum is over what
// follows it in the block, inodes included.
func seal(head []byte, unit blocks, sum []byte) {
	putUUID(head[superOffset:], sum)
	le.PutUint32(head[superOffset+superChecksumOff:], superChecksum(head, unit))
}

// superChecksum is the kernel's, taken while the field itself is zero: over the superblock and what follows it in its
// block, or, where it does not lie in block 0, over as much as a block. It leaves out crc32c's last inversion.
func superChecksum(head []byte, unit blocks) uint32 {
	end := unit.size()
	if end <= superOffset {
		end += superOffset
	}
	return ^crc32.Checksum(head[superOffset:end], crc32.MakeTable(crc32.Castagnoli))
}

// putUUID writes a uuid made from a sum into a superblock.
func putUUID(sb, sum []byte) {
	uuid := sb[superUUIDOff : superUUIDOff+16]
	copy(uuid, sum)
	uuid[6] = uuid[6]&0x0f | 0x80 // RFC 9562: version 8, made by a rule of our own
	uuid[8] = uuid[8]&0x3f | 0x80
}
