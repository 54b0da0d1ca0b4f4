package erofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// A chain image over packs is an image as above with a device for each pack that it needs, between the superblock and the root inode:
//
//	1152   the device table: 128 bytes a pack: tag (64), blocks of the pack (4), zeros
//	then   the pack list: magic (8), flavour (4), packs (4), and 8 bytes a pack: its id
//
// The chunk index of a file with a payload names the device (counted from 1) and the payload's first block there, so the image
// shows every byte by itself when it is mounted with its packs as device= in the order of the table.
const (
	deviceTable     = superOffset + superSize
	deviceSlot      = 128
	tagLen          = 64
	incompatDevices = 1 << 3
	packListMagic   = "packlist"
	packListLen     = 16
	// MaxPacks is how many packs an image can name: behind them the root inode's number still fits the superblock's 16 bits. What is
	// sensible is far less.
	MaxPacks = 1 << 12

	flavourPrivate = 0
	flavourShared  = 1
)

// Device is a pack as a chain image names it.
type Device struct {
	Pack content.PackID
	// Tag is what the pack's file must prove to be before the image is mounted over it: 64 characters.
	Tag string
	// Blocks is the length of the pack's file.
	Blocks uint32
}

// Options say where a chain image finds payloads.
type Options struct {
	// Place tells where a payload lies, in one of Packs.
	Place func(content.ObjectID) (content.Place, bool)
	// Packs are the image's devices, in the order in which it is to be mounted with them.
	Packs []Device
	// Redirect also gives files with payloads the xattrs by which overlayfs finds them in packs that are mounted as data-only
	// lower layers, where images share them in memory. Without data-only lower layers it must not be set: overlayfs would
	// look for payloads that it cannot find.
	Redirect bool
}

// WriteChain is Write for an image over packs: files with payloads show them, wherever the image is mounted with its packs.
func WriteChain(ctx context.Context, w io.Writer, root *tree.Node, o Options) (int64, error) {
	p, err := newPacks(o)
	if err != nil {
		return 0, fmt.Errorf("build chain image: %w", err)
	}
	im := image{ctx: ctx, packs: p}
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

// hidePacks returns a root with a whiteout for the directory of each pack. An overlay in which packs are lower layers like any other, as
// read-only ones may have them, then shows none of these.
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

// packs are the devices of an image that is being written; nil where it has none.
type packs struct {
	Options
	index map[content.PackID]uint16 // from 1
}

func newPacks(o Options) (*packs, error) {
	if len(o.Packs) > MaxPacks {
		return nil, fmt.Errorf("%d packs, at most %d fit", len(o.Packs), MaxPacks)
	}
	p := &packs{Options: o, index: make(map[content.PackID]uint16, len(o.Packs))}
	for i, d := range o.Packs {
		if len(d.Tag) != tagLen {
			return nil, fmt.Errorf("pack %s has a tag of %d bytes, want %d", d.Pack, len(d.Tag), tagLen)
		}
		if p.index[d.Pack] != 0 {
			return nil, fmt.Errorf("pack %s is there twice", d.Pack)
		}
		p.index[d.Pack] = uint16(i + 1)
	}
	return p, nil
}

func (p *packs) count() int {
	if p == nil {
		return 0
	}
	return len(p.Packs)
}

// end is where the superblock and what follows it ends.
func (p *packs) end() int64 {
	if p == nil {
		return superOffset + superSize
	}
	return deviceTable + int64(len(p.Packs))*deviceSlot + packListLen + 8*int64(len(p.Packs))
}

func (p *packs) encode(b []byte) {
	if p == nil {
		return
	}
	at := b[deviceTable:]
	for _, d := range p.Packs {
		copy(at, d.Tag)
		le.PutUint32(at[tagLen:], d.Blocks)
		at = at[deviceSlot:]
	}
	copy(at, packListMagic)
	if p.Redirect {
		le.PutUint32(at[8:], flavourShared)
	}
	le.PutUint32(at[12:], uint32(len(p.Packs)))
	for i, d := range p.Packs {
		le.PutUint64(at[packListLen+8*i:], uint64(d.Pack))
	}
}

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
	case int64(place.Block)+blocksOf(place.Size) > int64(p.Packs[device-1].Blocks):
		return place, 0, fmt.Errorf("payload %s lies outside of pack %s", e.Object, place.Pack)
	}
	return place, device, nil
}

// checkPlaces refuses payloads that are not where the image could show them. It looks before anything is encoded.
func (im *image) checkPlaces() error {
	if im.packs == nil {
		return nil
	}
	for i := range im.inodes {
		in := &im.inodes[i]
		if !dataless(in.node.Entry) {
			continue
		}
		if _, _, err := im.packs.find(in.node.Entry); err != nil {
			return fmt.Errorf("%q: %w", im.path(in.parent, in.node.Name), err)
		}
	}
	return nil
}

// redirect is where overlayfs finds a payload in its pack.
func (im *image) redirect(e *content.Entry) string {
	if !dataless(e) {
		return ""
	}
	if im.packs == nil {
		return "/" + e.Object.Path()
	}
	place, _, _ := im.packs.find(e) // checkPlaces has
	return PackPath(place.Pack, place.N)
}

// encodeChunks writes the chunk index of a file with a payload at b[0].
func (im *image) encodeChunks(b []byte, in *inode) {
	if im.packs == nil {
		for i := range in.chunks() {
			le.PutUint32(b[i*chunkSize+4:], chunkNull)
		}
		return
	}
	place, device, _ := im.packs.find(in.node.Entry)
	for i := range in.chunks() {
		le.PutUint16(b[i*chunkSize+2:], device)
		le.PutUint32(b[i*chunkSize+4:], place.Block+uint32(i)<<in.chunkShift())
	}
}

// ReadChain reads from a chain image over packs which packs it names, and whether overlayfs finds payloads through it. A file that is
// no such image is an error that wraps ErrDamaged.
func ReadChain(r io.ReaderAt, size int64) (devices []Device, redirect bool, err error) {
	damaged := func(what string) error { return fmt.Errorf("chain image is %w: %s", ErrDamaged, what) }
	if size < blockSize || size%blockSize != 0 {
		return nil, false, damaged(fmt.Sprintf("a file of %d bytes is none", size))
	}
	sb := make([]byte, superSize)
	if _, err := r.ReadAt(sb, superOffset); err != nil {
		return nil, false, fmt.Errorf("read chain image: %w", err)
	}
	n := int(le.Uint16(sb[86:]))
	switch {
	case le.Uint32(sb) != superMagic:
		return nil, false, damaged("it has no superblock")
	case int64(le.Uint32(sb[36:]))*blockSize != size:
		return nil, false, damaged(fmt.Sprintf("it has %d bytes, its superblock says %d", size, int64(le.Uint32(sb[36:]))*blockSize))
	case n > MaxPacks || n > 0 && le.Uint16(sb[88:]) != deviceTable/deviceSlot:
		return nil, false, damaged("its device table is elsewhere")
	}
	b := make([]byte, n*deviceSlot+packListLen+8*n)
	if _, err := r.ReadAt(b, deviceTable); errors.Is(err, io.EOF) {
		return nil, false, damaged("its device table is cut")
	} else if err != nil {
		return nil, false, fmt.Errorf("read chain image: %w", err)
	}
	list := b[n*deviceSlot:]
	if string(list[:8]) != packListMagic || int(le.Uint32(list[12:])) != n {
		return nil, false, damaged("it has no list of packs")
	}
	for i := range n {
		slot := b[i*deviceSlot:]
		devices = append(devices, Device{
			Pack: content.PackID(le.Uint64(list[packListLen+8*i:])), Tag: string(slot[:tagLen]), Blocks: le.Uint32(slot[tagLen:]),
		})
	}
	return devices, le.Uint32(list[8:]) == flavourShared, nil
}
