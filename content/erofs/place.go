package erofs

import (
	"fmt"
	"math"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// place decides where everything lies.
func (im *image) place() error {
	im.epoch = im.commonMtime()
	im.shared.choose()
	meta := arena{unit: im.unit, end: im.packs.end()}
	for i := range im.inodes {
		if err := im.stopped(i); err != nil {
			return err
		}
		in := &im.inodes[i]
		in.extended = !in.fitsCompact() || in.node.Entry.Mtime != im.epoch
		var err error
		if in.xattrs, err = im.shared.areaSize(in.node.Entry); err != nil {
			return fmt.Errorf("%q: %w", im.path(in.parent, in.node.Name), err)
		}
		in.chooseLayout(im.unit)
		im.chunked = im.chunked || in.layout == layoutChunk
		in.offset, in.inGap = meta.take(in.length(im.unit), in.layout == layoutInline)
		if i == 0 {
			// Behind the root, as the root's nid must be small.
			meta.end = im.shared.place(meta.end)
		}
	}
	end := max(im.unit.align(meta.end), im.minLength(meta.end))
	for i := range im.inodes {
		if n := im.inodes[i].dataBlocks(im.unit); n > 0 {
			im.inodes[i].block = uint32(im.unit.count(end))
			end += n * im.unit.size()
		}
	}
	im.length = coarse.align(end)
	if im.unit.count(im.length) > math.MaxUint32 {
		return fmt.Errorf("%d bytes of metadata are too many", im.length)
	}
	return nil
}

// minLength lets a reader fetch 64 bytes at any inode and a block at any shared
// xattr without looking at what is there first; go-erofs does.
func (im *image) minLength(metaEnd int64) int64 {
	n := metaEnd + extendedSize - compactSize
	if end := im.shared.end; end > 0 {
		n = max(n, end+blockSize)
	}
	return im.unit.align(n)
}

// commonMtime returns the mtime that saves most when it is the superblock's, which
// is what compact inodes show. Of equally common ones the earliest is taken.
func (im *image) commonMtime() content.Time {
	counts := make(map[content.Time]int)
	for i := range im.inodes {
		if im.inodes[i].fitsCompact() {
			counts[im.inodes[i].node.Entry.Mtime]++
		}
	}
	var best content.Time
	most := 0
	for t, n := range counts {
		if n > most || n == most && before(t, best) {
			best, most = t, n
		}
	}
	return best
}

func before(a, b content.Time) bool {
	return a.Sec < b.Sec || a.Sec == b.Sec && a.Nsec < b.Nsec
}

// arena hands out the metadata area from front to back. Where an inode had to move
// to the next block it remembers the largest such gap, and later inodes that fit
// go there. The gaps would be 3 % of an image of Python packages.
type arena struct {
	unit        blocks
	end         int64
	gap, gapEnd int64
}

// take returns where length bytes go, and whether that is in a gap; with whole, they do not cross a block. Each of the
// two kinds of places comes in ascending order, as a new gap lies behind the one before: inOrder relies on it.
func (a *arena) take(length int64, whole bool) (at int64, inGap bool) {
	if length <= a.gapEnd-a.gap {
		at = a.gap
		a.gap = alignUp(at+length, slotSize)
		return at, true
	}
	at = alignUp(a.end, slotSize)
	if whole && at>>a.unit != (at+length-1)>>a.unit {
		next := a.unit.align(at)
		if next-at > a.gapEnd-a.gap {
			a.gap, a.gapEnd = at, next
		}
		at = next
	}
	a.end = at + length
	return at, false
}
