package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Between the superblock and the root inode of a chain image over packs lie
//
//	1152   the device table: for each pack tag (64), its length (4), where it begins when image and packs are one
//	       behind the other (4; 0 if that is too far), both in blocks of the image, zeros up to 128
//	then   the pack list: magic (8), flavour (4), packs (4), crc32c of table and list (4), 4 zeros, and for each
//	       pack its id (8)
const (
	deviceTable     = superOffset + superSize
	deviceSlot      = 128
	tagLen          = 64
	incompatDevices = 1 << 3
	packListMagic   = "packlist"
	packListSum     = 16 // where its checksum is
	packListLen     = 24
	// MaxPacks is how many packs an image can name: behind them the root inode's number still fits the superblock's
	// 16 bits. What is sensible is far less.
	MaxPacks = 1 << 12

	flavourPrivate = 0
	flavourShared  = 1
)

// Device is a pack as a chain image names it.
type Device struct {
	Pack content.PackID
	// Tag is what the pack's file must prove to be before the image is mounted over it: 64 characters.
	Tag string
	// Blocks is the length of the pack's file, in content.BlockSize.
	Blocks uint32
}

// Options say where a chain image finds payloads.
type Options struct {
	// Place tells where a payload lies, in one of Packs.
	Place func(content.ObjectID) (content.Place, bool)
	// Packs are the image's devices, in the order in which it is to be mounted with them.
	Packs []Device
	// Dense: the image has blocks of DenseBlock, as it needs over dense packs. Others may be among its packs.
	Dense bool
	// Redirect also gives files with payloads the xattrs by which overlayfs finds them in packs that are mounted as
	// data-only lower layers, where images share them in memory. Without data-only lower layers it must not be set:
	// overlayfs would look for payloads that it cannot find.
	Redirect bool
}

// WriteChain writes the image of root to w and returns its length in bytes. Files with payloads show them, wherever
// the image is mounted with its packs.
//
// Nodes that share an Entry are one inode, except directories: each of those has its own. WriteChain keeps some 100
// bytes an entry in memory, and hands the image to w in pieces of 256 KiB and more. It takes half the time where w is
// an io.WriterAt, as an empty file is. An error about an entry names its path; nothing was written then.
//
// Errors are: an Entry that breaks its contract; a kind, name, xattr name, device number, link target or size that
// EROFS or Linux cannot hold; an entry that would steer overlayfs (see Invariants); a payload that is not where Options
// say.
func WriteChain(ctx context.Context, w io.Writer, root *tree.Node, o Options) (int64, error) {
	p, err := newPacks(o)
	if err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	im := image{ctx: ctx, packs: p, unit: blocksOf(o.Dense)}
	im.shared.most = im.unit.size() // go-erofs reads one block of a shared xattr
	if o.Redirect {
		im.shared.redirectLen = len(PackPath(0, 0))
		if root, err = hidePacks(root, o.Packs); err != nil {
			return 0, fmt.Errorf("build chain image: %w", err)
		}
	}
	return im.write(w, root)
}

// whiteout is the one inode of all whiteouts that this package writes; no other is let in (see Invariants).
var whiteout = &content.Entry{Kind: content.Char}

// ErrPackName is wrapped where a tree has a name of a pack in its root.
var ErrPackName = errors.New("the image has a file named like a pack")

// hidePacks returns a root with a whiteout for the directory of each pack. An overlay in which packs are lower layers
// like any other, as read-only ones may have them, then shows none of these.
func hidePacks(root *tree.Node, devices []Device) (*tree.Node, error) {
	with := *root
	with.Children = slices.Clone(root.Children)
	for _, d := range devices {
		with.Children = append(with.Children, &tree.Node{Name: d.Pack.String(), Entry: whiteout})
	}
	slices.SortFunc(with.Children, func(a, b *tree.Node) int { return strings.Compare(a.Name, b.Name) })
	for i, n := range with.Children {
		if i > 0 && n.Name == with.Children[i-1].Name {
			return nil, fmt.Errorf("%q: %w", n.Name, ErrPackName)
		}
	}
	return &with, nil
}

// packs are the devices of an image that is being written.
type packs struct {
	Options
	index map[content.PackID]uint16 // from 1
	paths []string                  // to the payloads of each
}

func newPacks(o Options) (*packs, error) {
	if len(o.Packs) > MaxPacks {
		return nil, fmt.Errorf("%d packs, at most %d fit", len(o.Packs), MaxPacks)
	}
	p := &packs{Options: o, index: make(map[content.PackID]uint16, len(o.Packs))}
	for i, d := range o.Packs {
		if d.Pack > content.MaxPackID {
			return nil, fmt.Errorf("%d is no pack's id", uint64(d.Pack))
		}
		if size := int64(d.Blocks) * blockSize; blocksOf(o.Dense).count(size) > math.MaxUint32 {
			return nil, fmt.Errorf("pack %s has %d bytes, more than an image of such blocks can count", d.Pack, size)
		}
		if len(d.Tag) != tagLen {
			return nil, fmt.Errorf("pack %s has a tag of %d bytes, want %d", d.Pack, len(d.Tag), tagLen)
		}
		if p.index[d.Pack] != 0 {
			return nil, fmt.Errorf("pack %s is there twice", d.Pack)
		}
		p.index[d.Pack] = uint16(i + 1)
		p.paths = append(p.paths, "/"+d.Pack.String()+"/")
	}
	return p, nil
}

// end is where the superblock and what follows it ends.
func (p *packs) end() int64 {
	return deviceTable + int64(len(p.Packs))*deviceSlot + packListLen + 8*int64(len(p.Packs))
}

// encode writes the device table and the list of packs of an image of this length.
func (p *packs) encode(o *out, length int64) {
	unit := blocksOf(p.Dense)
	b := o.at(deviceTable, p.end()-deviceTable)
	flat := unit.count(length)
	for i, d := range p.Packs {
		slot := b[i*deviceSlot:]
		copy(slot, d.Tag)
		size := unit.count(int64(d.Blocks) * blockSize)
		le.PutUint32(slot[tagLen:], uint32(size))
		if flat <= math.MaxUint32 {
			le.PutUint32(slot[tagLen+4:], uint32(flat))
		}
		flat += size
	}
	list := b[len(p.Packs)*deviceSlot:]
	copy(list, packListMagic)
	if p.Redirect {
		le.PutUint32(list[8:], flavourShared)
	}
	le.PutUint32(list[12:], uint32(len(p.Packs)))
	for i, d := range p.Packs {
		le.PutUint64(list[packListLen+8*i:], uint64(d.Pack))
	}
	le.PutUint32(list[packListSum:], packListChecksum(b))
}

// packListChecksum is over the device table and the list behind it, while the field itself is zero.
func packListChecksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// find returns a payload's place, and its device.
func (p *packs) find(e *content.Entry) (place content.Place, device uint16, err error) {
	place, ok := p.Place(e.Object)
	if !ok {
		return place, 0, fmt.Errorf("no pack has the payload %s", e.Object)
	}
	device = p.index[place.Pack]
	switch {
	case device == 0:
		return place, 0, fmt.Errorf("payload %s lies in pack %s, which is not among the image's", e.Object, place.Pack)
	case place.Size != e.Size:
		return place, 0, fmt.Errorf("payload %s has %d bytes, and its file %d", e.Object, place.Size, e.Size)
	case place.Offset != blocksOf(p.Dense).align(place.Offset):
		return place, 0, fmt.Errorf("payload %s begins at byte %d of pack %s, and no block of the image can",
			e.Object, place.Offset, place.Pack)
	case place.Offset < blockSize || place.Offset+place.Size > int64(p.Packs[device-1].Blocks)*blockSize:
		return place, 0, fmt.Errorf("payload %s lies outside of pack %s", e.Object, place.Pack)
	case place.N >= maxSlots:
		return place, 0, fmt.Errorf("payload %s is number %d of its pack, at most %d fit", e.Object, place.N, maxSlots)
	}
	return place, device, nil
}

// findPayloads asks once for the place of each payload, and refuses those that are not where the image could show
// them.
func (im *image) findPayloads() error {
	for i := range im.inodes {
		in := &im.inodes[i]
		if !dataless(in.node.Entry) {
			continue
		}
		if err := im.stopped(i); err != nil {
			return err
		}
		place, device, err := im.packs.find(in.node.Entry)
		if err != nil {
			return fmt.Errorf("%q: %w", im.path(in.parent, in.node.Name), err)
		}
		in.device, in.block, in.number = device, uint32(im.unit.count(place.Offset)), place.N
	}
	return nil
}

// redirect is where overlayfs finds a payload; good until the next call.
func (im *image) redirect(in *inode) []byte {
	im.text = im.text[:0]
	if dataless(in.node.Entry) {
		im.text = appendSlotName(append(im.text, im.packs.paths[in.device-1]...), in.number)
	}
	return im.text
}

// encodeChunks writes the chunk index of a file with a payload at b[0].
func (in *inode) encodeChunks(unit blocks, b []byte) {
	for i := range in.chunks(unit) {
		le.PutUint16(b[i*chunkSize+2:], in.device)
		le.PutUint32(b[i*chunkSize+4:], in.block+uint32(i)<<in.chunkShift(unit))
	}
}

// Chain is what a chain image says of itself: the Options it was written with, but for the places.
type Chain struct {
	Packs           []Device
	Redirect, Dense bool
}

// ReadChain reads it from the head and the list of packs only. A file that is no such image is an error that wraps
// ErrDamaged.
func ReadChain(r io.ReaderAt, size int64) (c Chain, err error) {
	if size < blockSize || size%blockSize != 0 {
		return c, damagedChain("a file of %d bytes is none", size)
	}
	head := make([]byte, blockSize)
	if _, err := r.ReadAt(head, 0); err != nil {
		return c, readChainError(err)
	}
	n, unit, err := checkSuper(head, size)
	if err != nil {
		return c, err
	}
	b := make([]byte, n*deviceSlot+packListLen+8*n)
	if _, err := r.ReadAt(b, deviceTable); err != nil {
		return c, readChainError(err)
	}
	list := b[n*deviceSlot:]
	sum, flavour := le.Uint32(list[packListSum:]), le.Uint32(list[8:])
	clear(list[packListSum : packListSum+4])
	switch {
	case string(list[:8]) != packListMagic || int(le.Uint32(list[12:])) != n:
		return c, damagedChain("it has no list of packs")
	case sum != packListChecksum(b) || flavour > flavourShared:
		return c, damagedChain("its list of packs is not what was written")
	}
	for i := range n {
		slot, id := b[i*deviceSlot:], le.Uint64(list[packListLen+8*i:])
		length := int64(le.Uint32(slot[tagLen:])) * unit.size()
		if length%blockSize != 0 {
			return c, damagedChain("it says that pack %s has %d bytes", content.PackID(id), length)
		}
		d := Device{Pack: content.PackID(id), Tag: string(slot[:tagLen]), Blocks: uint32(length / blockSize)}
		c.Packs = append(c.Packs, d)
	}
	c.Redirect, c.Dense = flavour == flavourShared, unit == dense
	return c, nil
}

// checkSuper looks at the head of a chain image and returns how many packs it names, and what its blocks are.
func checkSuper(head []byte, size int64) (packs int, unit blocks, err error) {
	sb := head[superOffset:]
	if le.Uint32(sb) != superMagic {
		return 0, 0, damagedChain("it has no superblock")
	}
	if unit = blocks(sb[12]); unit != coarse && unit != dense {
		return 0, 0, damagedChain("it has blocks of 2^%d bytes", unit)
	}
	packs = int(le.Uint16(sb[superDevicesOff:]))
	length := int64(le.Uint32(sb[superBlocksOff:])) * unit.size()
	sum := le.Uint32(sb[superChecksumOff:])
	unsummed := bytes.Clone(head)
	clear(unsummed[superOffset+superChecksumOff:][:4])
	switch {
	case sum != superChecksum(unsummed, unit):
		return 0, 0, damagedChain("its first block is not what was written")
	case length != size:
		return 0, 0, damagedChain("it has %d bytes, its superblock says %d", size, length)
	case packs > MaxPacks || packs > 0 && le.Uint16(sb[superTableOff:]) != deviceTable/deviceSlot:
		return 0, 0, damagedChain("its device table is elsewhere")
	}
	return packs, unit, nil
}

func damagedChain(format string, args ...any) error {
	return fmt.Errorf("chain image is %w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// readChainError says why bytes of a chain image could not be read.
func readChainError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damagedChain("it is cut")
	}
	return fmt.Errorf("read chain image: %w", err)
}
