package erofs

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"io"
	"slices"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// CheckChain looks at a whole chain image over packs, of this many bytes: that its bytes are those that were written,
// and that each file with a payload points to where a pack has one of that size, and sends overlayfs to the same. A
// wrong place would show zeros or another payload, and no error. packs returns what a pack says of itself, nil where it
// is not to be had. It does not look at payloads.
//
// It returns the payloads that the image shows, and where. Whether they are the right ones is for the caller to say:
// who builds the image once more over these places gets the same bytes. What is wrong is an error that wraps
// ErrDamaged; the image is then to be built again.
func CheckChain(ctx context.Context, r io.ReaderAt, size int64, packs func(content.PackID) *Pack) (
	places map[content.ObjectID]content.Place, err error,
) {
	chain, err := ReadChain(r, size)
	if err != nil {
		return nil, err
	}
	if err := checkSum(ctx, r, size); err != nil {
		return nil, err
	}
	c := checker{
		ctx: ctx, image: window{r: r, size: size}, redirect: chain.Redirect, unit: blocksOf(chain.Dense),
		seen: make([]uint64, size/slotSize/64), places: map[content.ObjectID]content.Place{},
	}
	for _, d := range chain.Packs {
		p := packs(d.Pack)
		switch {
		case p == nil:
			return nil, damagedChain("it needs pack %s, which is not there", d.Pack)
		case p.Blocks != d.Blocks:
			return nil, damagedChain("it was built over a pack %s of %d blocks, which has %d", d.Pack, d.Blocks, p.Blocks)
		case p.Dense && !chain.Dense:
			return nil, damagedChain("it has larger blocks than its pack %s", d.Pack)
		}
		c.packs = append(c.packs, newPayloads(p))
	}
	return c.places, c.walk()
}

// checkSum compares the bytes with the sum in the uuid. The head has been compared with its checksum.
func checkSum(ctx context.Context, r io.ReaderAt, size int64) error {
	block := make([]byte, blockSize)
	if _, err := r.ReadAt(block, 0); err != nil {
		return readChainError(err)
	}
	var want, got [superSize]byte
	uuid := block[superOffset+superUUIDOff:][:16]
	copy(want[superUUIDOff:], uuid)
	clear(uuid)
	clear(block[superOffset+superChecksumOff:][:4])
	sum := sha256.New()
	sum.Write(block)
	buf := make([]byte, outChunk)
	for at := int64(blockSize); at < size; at += outChunk {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := buf[:min(outChunk, size-at)]
		if _, err := r.ReadAt(part, at); err != nil {
			return readChainError(err)
		}
		sum.Write(part)
	}
	if putUUID(got[:], sum.Sum(nil)); got != want {
		return damagedChain("its bytes are not those that were written")
	}
	return nil
}

// payloads finds the slots of a pack by where they begin.
type payloads struct {
	*Pack
	sorted []uint32 // numbers of the slots that are in use
}

func newPayloads(p *Pack) payloads {
	sorted := make([]uint32, 0, len(p.Slots))
	for n, s := range p.Slots {
		if s.Size > 0 {
			sorted = append(sorted, uint32(n))
		}
	}
	slices.SortFunc(sorted, func(a, b uint32) int { return cmp.Compare(p.Slots[a].Offset, p.Slots[b].Offset) })
	return payloads{p, sorted}
}

// at returns the number of the slot that begins at a byte.
func (p payloads) at(offset int64) (n uint32, ok bool) {
	begin := func(n uint32, offset int64) int { return cmp.Compare(p.Slots[n].Offset, offset) }
	i, ok := slices.BinarySearchFunc(p.sorted, offset, begin)
	if !ok {
		return 0, false
	}
	return p.sorted[i], true
}

// checker walks through the directories of an image. It trusts no number in it.
type checker struct {
	ctx      context.Context
	image    window
	unit     blocks
	packs    []payloads // by device, from 0
	redirect bool
	seen     []uint64 // a bit for each nid
	dirs     []uint64 // nids of directories to look at
	places   map[content.ObjectID]content.Place
}

func (c *checker) walk() error {
	sb, err := c.image.at(superOffset, superSize)
	if err != nil {
		return err
	}
	if err := c.inode(uint64(le.Uint16(sb[14:]))); err != nil {
		return err
	}
	for len(c.dirs) > 0 {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		last := len(c.dirs) - 1
		nid := c.dirs[last]
		c.dirs = c.dirs[:last]
		if err := c.dir(nid); err != nil {
			return err
		}
	}
	return nil
}

// raw is an inode as it is stored.
type raw struct {
	nid           uint64
	layout        uint8
	mode          uint16
	size          int64
	union         uint32
	xattrs, after int64 // where its xattrs and what follows them begin
}

func (c *checker) read(nid uint64) (in raw, err error) {
	if nid >= uint64(c.image.size)/slotSize {
		return in, damagedChain("inode %d is outside of it", nid)
	}
	at := int64(nid) * slotSize
	b, err := c.image.at(at, compactSize)
	if err != nil {
		return in, err
	}
	format, count := le.Uint16(b), int64(le.Uint16(b[2:]))
	in = raw{nid: nid, layout: uint8(format >> 1 & 7), mode: le.Uint16(b[4:]), union: le.Uint32(b[16:])}
	if in.xattrs = at + compactSize; format&1 != 0 {
		in.xattrs = at + extendedSize
		in.size = int64(le.Uint64(b[8:]))
	} else {
		in.size = int64(le.Uint32(b[8:]))
	}
	if in.after = in.xattrs; count > 0 {
		in.after += xattrHeaderSize + 4*(count-1)
	}
	if in.size < 0 || in.size > maxSize {
		return in, damagedChain("inode %d says it has %d bytes", nid, in.size)
	}
	return in, nil
}

// inode checks an inode when it is met first; a directory waits for its turn.
func (c *checker) inode(nid uint64) error {
	in, err := c.read(nid)
	if err != nil {
		return err
	}
	if bit := uint64(1) << (nid % 64); c.seen[nid/64]&bit == 0 {
		c.seen[nid/64] |= bit
	} else {
		return nil
	}
	switch {
	case in.mode&0o170000 == 0o040000:
		c.dirs = append(c.dirs, nid)
	case in.layout == layoutChunk:
		return c.file(in)
	}
	return nil
}

// dir checks what a directory names.
func (c *checker) dir(nid uint64) error {
	in, err := c.read(nid)
	if err != nil {
		return err
	}
	block := c.unit.size()
	for at := int64(0); at < in.size; at += block {
		length := min(block, in.size-at)
		from := int64(in.union)*block + at
		if in.layout == layoutInline && length < block {
			from = in.after
		}
		b, err := c.image.at(from, length)
		if err != nil {
			return err
		}
		b = bytes.Clone(b)
		if len(b) < direntSize || int(le.Uint16(b[8:])) > len(b) {
			return damagedChain("directory %d has no names where it must", nid)
		}
		for names := int(le.Uint16(b[8:])); names >= direntSize; names -= direntSize {
			if err := c.inode(le.Uint64(b)); err != nil {
				return err
			}
			b = b[direntSize:]
		}
	}
	return nil
}

// file checks where a file with a payload has it.
func (c *checker) file(in raw) error {
	shift := in.union & maxChunkShift
	chunks := (in.size-1)>>(uint32(c.unit)+shift) + 1
	if in.union&chunkIndexes == 0 || in.size <= 0 || chunks > maxChunks {
		return damagedChain("file %d is not made as its writer makes files", in.nid)
	}
	b, err := c.image.at(alignUp(in.after, chunkSize), chunks*chunkSize)
	if err != nil {
		return err
	}
	device, block := int(le.Uint16(b[2:])), le.Uint32(b[4:])
	for i := range uint32(chunks) {
		if d, at := int(le.Uint16(b[i*chunkSize+2:])), le.Uint32(b[i*chunkSize+4:]); d != device || at != block+i<<shift {
			return damagedChain("file %d is in pieces", in.nid)
		}
	}
	if device < 1 || device > len(c.packs) {
		return damagedChain("file %d is on device %d of %d", in.nid, device, len(c.packs))
	}
	p := c.packs[device-1]
	n, ok := p.at(int64(block) * c.unit.size())
	if !ok {
		return damagedChain("file %d begins at block %d of pack %s, where no payload does", in.nid, block, p.ID)
	}
	if size := p.Slots[n].Size; size != in.size {
		return damagedChain("file %d has %d bytes, its payload %d of pack %s has %d", in.nid, in.size, n, p.ID, size)
	}
	id := p.Slots[n].ID
	if other, ok := c.places[id]; ok && other != p.Place(n) {
		return damagedChain("it has payload %s at two places", id)
	}
	c.places[id] = p.Place(n)
	return c.steered(in, PackPath(p.ID, n))
}

// steered checks that overlayfs finds the payload at a path, or in the private flavour, that nothing sends it
// anywhere.
func (c *checker) steered(in raw, path string) error {
	if !c.redirect {
		path = ""
	}
	got, metacopy := "", false
	if in.after > in.xattrs {
		b, err := c.image.at(in.xattrs, in.after-in.xattrs)
		if err != nil {
			return err
		}
		b = b[min(len(b), xattrHeaderSize+xattrIDSize*int(b[4])):]
		for len(b) >= xattrEntrySize {
			name, value := int(b[0]), int(le.Uint16(b[2:]))
			end := xattrEntrySize + name + value
			if end > len(b) {
				return damagedChain("the xattrs of file %d are cut", in.nid)
			}
			if b[1] == trustedIndex {
				switch string(b[xattrEntrySize : xattrEntrySize+name]) {
				case redirectName:
					got = string(b[xattrEntrySize+name : end])
				case metacopyName:
					metacopy = true
				}
			}
			b = b[min(int64(len(b)), storedSize(name, value)):]
		}
	}
	if got != path || metacopy != c.redirect {
		return damagedChain("file %d sends overlayfs to %q, its payload is at %q", in.nid, got, path)
	}
	return nil
}

// windowSize is how much of an image is read at a time.
const windowSize = 64 << 10

// window reads an image in pieces, as neighbours are asked for one after the other.
type window struct {
	r    io.ReaderAt
	size int64
	base int64
	buf  []byte
}

// at returns n bytes at an offset; good until the next call.
func (w *window) at(offset, n int64) ([]byte, error) {
	if offset < 0 || n < 0 || offset > w.size-n {
		return nil, damagedChain("%d bytes at %d are outside of it", n, offset)
	}
	if offset < w.base || offset+n > w.base+int64(len(w.buf)) {
		w.base = offset &^ (blockSize - 1)
		length := min(max(alignUp(offset+n-w.base, blockSize), windowSize), w.size-w.base)
		if int64(cap(w.buf)) < length {
			w.buf = make([]byte, length)
		}
		w.buf = w.buf[:length]
		if _, err := w.r.ReadAt(w.buf, w.base); err != nil {
			w.buf = w.buf[:0]
			return nil, readChainError(err)
		}
	}
	return w.buf[offset-w.base:][:n], nil
}
