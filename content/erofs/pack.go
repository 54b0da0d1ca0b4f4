package erofs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// What the package says of packs, in numbers: table and trailer are
//
//	slot      sha256 (32), first block (4, of the pack's own size), size (8)
//	trailer   magic (8), version (4), slots (4), pack id (8), m (4) and the length of the file (4) in 4 KiB, offset of
//	          the table from m (8), 8 zeros, sha256 (32) over the first 4 KiB and everything from m on but itself
//
// The trailer's sha256 vouches for all but the payloads, which their own sums vouch for. A lookup of
// "/<pack>/<number>" in another pack fails at the first component.
const (
	packMagic    = "dedupPK\n"
	slotLen      = sha256.Size + 4 + 8
	trailerLen   = 8 + 4 + 4 + 8 + 4 + 4 + 8 + 8 + sha256.Size
	sumOffset    = trailerLen - sha256.Size
	packRootNid  = 1
	packDirNid   = 4
	packFilesNid = 5
	// nameLen is the length of a file's name in a pack, hex digits.
	nameLen  = 6
	maxSlots = 1<<(4*nameLen) - 1
	// maxMeta is more than metadata and table of so many slots can take.
	maxMeta = (maxSlots + 1) * (extendedSize + direntSize + nameLen + slotLen + 16)
)

// packVersions are the versions of packs, by their blocks.
var packVersions = map[blocks]uint32{coarse: 1, dense: 2}

// ErrDamaged is wrapped where a file is not what its writer wrote.
var ErrDamaged = errors.New("damaged")

// Slot is one payload in a pack; the zero Slot holds none.
type Slot struct {
	ID     content.ObjectID
	Offset int64 // bytes, from the beginning of the file
	Size   int64 // bytes
}

// Pack is what a sealed pack says of itself.
type Pack struct {
	ID content.PackID
	// Dense: payloads begin at multiples of DenseBlock, and not of content.BlockSize.
	Dense bool
	// Slots are numbered from 0.
	Slots []Slot
	// Meta is where the payloads end, Blocks the length of the file, both in content.BlockSize.
	Meta, Blocks uint32
	// Sum vouches for everything but the payloads.
	Sum content.Sum
}

// Place is where a slot's payload lies.
func (p *Pack) Place(n uint32) content.Place {
	s := p.Slots[n]
	return content.Place{Pack: p.ID, N: n, Offset: s.Offset, Size: s.Size}
}

// Device is what a chain image needs to know of the pack. The tag may be replaced by one that says more.
func (p *Pack) Device() Device { return Device{Pack: p.ID, Tag: p.Sum.Hex(), Blocks: p.Blocks} }

// PackPath returns where a pack's file system has the payload of a slot; overlayfs follows it from
// trusted.overlay.redirect.
func PackPath(id content.PackID, n uint32) string { return "/" + id.String() + "/" + slotName(n) }

func slotName(n uint32) string { return string(appendSlotName(nil, n)) }

func appendSlotName(b []byte, n uint32) []byte {
	for shift := 4 * (nameLen - 1); shift >= 0; shift -= 4 {
		b = append(b, "0123456789abcdef"[n>>shift&15])
	}
	return b
}

// used is how many slots hold a payload.
func (p *Pack) used() (n int) {
	for _, s := range p.Slots {
		if s.Size > 0 {
			n++
		}
	}
	return n
}

// encodeTail returns the first 4 KiB and everything from p.Meta on of a pack whose ID, Dense, Slots and Meta are set,
// and sets the rest.
func (p *Pack) encodeTail() (super, tail []byte, err error) {
	unit := blocksOf(p.Dense)
	b := p.encodeInodes()
	table := int64(len(b))
	for _, s := range p.Slots {
		b = append(b, s.ID.Sum[:]...)
		b = le.AppendUint32(b, uint32(unit.count(s.Offset)))
		b = le.AppendUint64(b, uint64(s.Size))
	}
	blocks := int64(p.Meta) + coarse.count(int64(len(b))+trailerLen)
	if unit.count(blocks*blockSize) > math.MaxUint32 {
		return nil, nil, fmt.Errorf("pack %s: %d bytes are more than EROFS can count", p.ID, blocks*blockSize)
	}
	p.Blocks = uint32(blocks)
	b = append(b, make([]byte, (blocks-int64(p.Meta))*blockSize-int64(len(b)))...)
	super = p.encodeSuper(b[:table])

	t := b[len(b)-trailerLen:]
	copy(t, packMagic)
	le.PutUint32(t[8:], packVersions[unit])
	le.PutUint32(t[12:], uint32(len(p.Slots)))
	le.PutUint64(t[16:], uint64(p.ID))
	le.PutUint32(t[24:], p.Meta)
	le.PutUint32(t[28:], p.Blocks)
	le.PutUint64(t[32:], uint64(table))
	p.Sum = tailSum(super, b)
	copy(t[sumOffset:], p.Sum[:])
	return super, b, nil
}

// tailSum is the trailer's sum.
func tailSum(super, tail []byte) (sum content.Sum) {
	h := sha256.New()
	h.Write(super)
	h.Write(tail[:len(tail)-sha256.Size])
	h.Sum(sum[:0])
	return sum
}

// encodeInodes returns the metadata area of the pack's file system, in whole blocks.
func (p *Pack) encodeInodes() []byte {
	unit := blocksOf(p.Dense)
	nids := make([]uint32, len(p.Slots))
	next := uint32(packFilesNid)
	for i, s := range p.Slots {
		if s.Size == 0 {
			continue
		}
		if nids[i] = next; s.Size > math.MaxUint32 {
			next++
		}
		next++
	}
	length := unit.align(int64(next) * slotSize)
	dir := packDirectory{unit: unit, first: uint32(unit.count(int64(p.Meta)*blockSize + length))}
	dir.add(".", packDirNid, 2)
	dir.add("..", packRootNid, 2)
	for i, nid := range nids {
		if nid != 0 {
			dir.add(slotName(uint32(i)), nid, 1)
		}
	}
	blocks, size := dir.finish()
	b := make([]byte, length, length+int64(len(blocks))+int64(len(p.Slots)*slotLen)+2*blockSize)

	root := packDirectory{unit: unit}
	root.add(".", packRootNid, 2)
	root.add("..", packRootNid, 2)
	root.add(p.ID.String(), packDirNid, 2)
	_, rootSize := root.finish()
	// Behind the root's inode there is room for its three names.
	putPackInode(b[packRootNid*slotSize:], layoutInline, 0o040555, 3, rootSize, 0, packRootNid)
	root.encode(b[packRootNid*slotSize+compactSize:])
	putPackInode(b[packDirNid*slotSize:], layoutPlain, 0o040555, 2, size, dir.first, packDirNid)
	for i, nid := range nids {
		if nid != 0 {
			s := p.Slots[i]
			putPackInode(b[int64(nid)*slotSize:], layoutPlain, 0o100444, 1, s.Size, uint32(unit.count(s.Offset)), nid)
		}
	}
	return append(b, blocks...)
}

// putPackInode writes an inode without xattrs, of root's and of the year 1970.
func putPackInode(b []byte, layout uint8, mode uint16, nlink uint32, size int64, block, ino uint32) {
	format := uint16(layout) << 1
	if size > math.MaxUint32 {
		format |= 1
		le.PutUint64(b[8:], uint64(size))
		le.PutUint32(b[44:], nlink)
	} else {
		le.PutUint16(b[6:], uint16(nlink))
		le.PutUint32(b[8:], uint32(size))
	}
	le.PutUint16(b[0:], format)
	le.PutUint16(b[4:], mode)
	le.PutUint32(b[16:], block)
	le.PutUint32(b[20:], ino)
}

// packDirectory collects the names of one directory, which come sorted.
type packDirectory struct {
	unit  blocks
	first uint32 // its first block
	names []string
	nids  []uint32
	types []uint8
}

func (d *packDirectory) add(name string, nid uint32, kind uint8) {
	d.names, d.nids, d.types = append(d.names, name), append(d.nids, nid), append(d.types, kind)
}

// finish returns the directory's blocks, and its length without what pads the last one.
func (d *packDirectory) finish() (blocks []byte, size int64) {
	for len(d.names) > 0 {
		n, length := 0, int64(0)
		for ; n < len(d.names) && length+direntSize+int64(len(d.names[n])) <= d.unit.size(); n++ {
			length += direntSize + int64(len(d.names[n]))
		}
		block := make([]byte, d.unit.size())
		rest := packDirectory{names: d.names[n:], nids: d.nids[n:], types: d.types[n:]}
		part := packDirectory{names: d.names[:n], nids: d.nids[:n], types: d.types[:n]}
		part.encode(block)
		blocks = append(blocks, block...)
		if size += length; len(rest.names) > 0 {
			size += d.unit.size() - length
		}
		if len(rest.names) == 0 {
			break
		}
		d.names, d.nids, d.types = rest.names, rest.nids, rest.types
	}
	return blocks, size
}

// encode writes all names, which fit, at b[0].
func (d *packDirectory) encode(b []byte) {
	name := direntSize * len(d.names)
	for i := range d.names {
		le.PutUint64(b[i*direntSize:], uint64(d.nids[i]))
		le.PutUint16(b[i*direntSize+8:], uint16(name))
		b[i*direntSize+10] = d.types[i]
		name += copy(b[name:], d.names[i])
	}
}

// encodeSuper returns the first 4 KiB. The uuid is made from the id and the inodes.
func (p *Pack) encodeSuper(inodes []byte) []byte {
	unit := blocksOf(p.Dense)
	b := make([]byte, blockSize)
	sb := b[superOffset:]
	le.PutUint32(sb[0:], superMagic)
	le.PutUint32(sb[8:], compatChecksum|compatMtime)
	sb[12] = byte(unit)
	le.PutUint16(sb[14:], packRootNid)
	le.PutUint64(sb[16:], uint64(p.used())+2)
	le.PutUint32(sb[superBlocksOff:], uint32(unit.count(int64(p.Blocks)*blockSize)))
	le.PutUint32(sb[40:], uint32(unit.count(int64(p.Meta)*blockSize)))
	h := sha256.New()
	h.Write([]byte(p.ID.String()))
	h.Write(inodes)
	seal(b, unit, h.Sum(nil))
	return b
}

// OpenPack reads what a sealed pack says of itself, from a file of this many bytes. What the file is not, or no
// longer, is an error that wraps ErrDamaged. It does not look at payloads. It holds metadata and table in memory
// while it works, some 94 bytes a slot.
func OpenPack(r io.ReaderAt, size int64) (*Pack, error) {
	t, err := readTrailer(r, size)
	if err != nil {
		return nil, err
	}
	super, tail := make([]byte, blockSize), make([]byte, size-int64(t.meta)*blockSize)
	if _, err := r.ReadAt(super, 0); err != nil {
		return nil, fmt.Errorf("read the superblock of a pack: %w", err)
	}
	if _, err := r.ReadAt(tail, int64(t.meta)*blockSize); err != nil {
		return nil, fmt.Errorf("read the table of a pack: %w", err)
	}
	if sum := tailSum(super, tail); sum != t.Sum {
		return nil, damagedPack("superblock, inodes or table have the sum %s, the trailer says %s", sum, t.Sum)
	}
	p := &Pack{ID: t.Pack, Meta: t.meta, Blocks: t.Blocks, Sum: t.Sum}
	switch t.version {
	case packVersions[coarse]:
	case packVersions[dense]:
		p.Dense = true
	default:
		return nil, fmt.Errorf("pack %s has version %d, this build reads 1 and 2", t.Pack, t.version)
	}
	if err := p.decodeTable(tail[t.table : t.table+t.slots*slotLen]); err != nil {
		return nil, err
	}
	return p, nil
}

func damagedPack(format string, args ...any) error {
	return fmt.Errorf("pack is %w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

func (p *Pack) decodeTable(b []byte) error {
	p.Slots = make([]Slot, len(b)/slotLen)
	unit, end := blocksOf(p.Dense), int64(p.Meta)*blockSize
	for i := range p.Slots {
		rec := b[i*slotLen:]
		s := Slot{
			Offset: int64(le.Uint32(rec[sha256.Size:])) * unit.size(), Size: int64(le.Uint64(rec[sha256.Size+4:])),
		}
		copy(s.ID.Sum[:], rec)
		switch {
		case s == Slot{}:
		case s.Size <= 0 || s.Size > end, s.Offset < blockSize || s.Offset+s.Size > end:
			return damagedPack("slot %d of its table is outside of it", i)
		}
		p.Slots[i] = s
	}
	return nil
}

// PackSize returns the length of a pack's file, in bytes, that holds payloads of these sizes.
func PackSize(sizes []int64, dense bool) (int64, error) {
	p := &Pack{Dense: dense, Slots: make([]Slot, len(sizes))}
	end := int64(blockSize)
	for i, size := range sizes {
		p.Slots[i] = Slot{Offset: end, Size: size}
		end += Space(size, dense)
	}
	p.Meta = uint32(coarse.count(end))
	if _, _, err := p.encodeTail(); err != nil {
		return 0, err
	}
	return int64(p.Blocks) * blockSize, nil
}
