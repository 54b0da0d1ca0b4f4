package erofs

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// objects are the payloads that data-less files of a test tree redirect to.
type objects map[content.ObjectID][]byte

// file is a Regular whose payload goes where the contract says.
func (o objects) file(data []byte) *content.Entry {
	e := &content.Entry{Kind: content.Regular, Mode: 0o644, Mtime: someTime, Size: int64(len(data))}
	if len(data) <= content.InlineMax {
		e.Data = data
		return e
	}
	e.Object = content.ObjectID{Sum: sha256.Sum256(data)}
	o[e.Object] = data
	return e
}

// maxHole is the size of the largest payload that an image can show, from the second block of a pack on.
func maxHole(unit blocks) int64 { return math.MaxUint32*unit.size()&^(blockSize-1) - blockSize }

// hole is a Regular of any size whose object does not exist.
func hole(size int64) *content.Entry {
	id := content.ObjectID{Sum: sha256.Sum256(binary.AppendVarint(nil, size))}
	return &content.Entry{Kind: content.Regular, Mode: 0o600, Mtime: someTime, Size: size, Object: id}
}

var someTime = content.Time{Sec: 1_700_000_000}

func entry(kind content.Kind) *content.Entry {
	return &content.Entry{Kind: kind, Mode: 0o755, Mtime: someTime}
}

func symlink(target string) *content.Entry {
	e := entry(content.Symlink)
	e.Mode, e.Target = 0o777, target
	return e
}

func device(kind content.Kind, major, minor uint32) *content.Entry {
	e := entry(kind)
	e.Major, e.Minor = major, minor
	return e
}

// with changes an entry in place.
func with(e *content.Entry, change func(*content.Entry)) *content.Entry {
	change(e)
	return e
}

func withXattrs(e *content.Entry, xattrs ...content.Xattr) *content.Entry {
	e.Xattrs = xattrs
	slices.SortFunc(e.Xattrs, func(a, b content.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return e
}

func leaf(name string, e *content.Entry) *tree.Node { return &tree.Node{Name: name, Entry: e} }

func dir(name string, children ...*tree.Node) *tree.Node {
	n := &tree.Node{Name: name, Entry: entry(content.Dir), Children: children}
	slices.SortFunc(n.Children, func(a, b *tree.Node) int { return strings.Compare(a.Name, b.Name) })
	return n
}

// text is n bytes that differ from those of other seeds.
func text(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('a' + (i*7+seed+i/26)%26)
	}
	return b
}

// acl is a POSIX ACL as the kernel hands it out: user::rwx user:uid:r-- group::r-x
// mask::r-x other::r--.
func acl(uid uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, math.MaxUint32}, {2, 4, uid}, {4, 5, math.MaxUint32}, {0x10, 5, math.MaxUint32}, {0x20, 4, math.MaxUint32}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// torture is a tree with everything that an image must hold.
func torture(unit blocks) (*tree.Node, objects) {
	o := make(objects)
	root := dir("", tortureKinds(o), tortureXattrs(o), tortureNames(), tortureSizes(o, unit),
		tortureTails(), tortureTargets(), tortureDirs(), tortureTimes(o), tortureDeep(o))
	addLinks(root, o)
	slices.SortFunc(root.Children, func(a, b *tree.Node) int { return strings.Compare(a.Name, b.Name) })
	root.Entry.Xattrs = []content.Xattr{{Name: "user.root", Value: []byte("yes")}}
	return root, o
}

func tortureKinds(o objects) *tree.Node {
	chmod := func(e *content.Entry, mode uint32) *content.Entry {
		return with(e, func(e *content.Entry) { e.Mode = mode })
	}
	return dir("kinds",
		leaf("empty", o.file(nil)),
		leaf("small", o.file(text(100, 1))),
		leaf("large", o.file(text(100_000, 2))),
		leaf("symlink", symlink("small")),
		leaf("dangling", symlink("/no/such/\xff\xfe")),
		leaf("null", device(content.Char, 1, 3)),
		leaf("char-max", device(content.Char, maxMajor, maxMinor)),
		leaf("char-0-1", device(content.Char, 0, 1)),
		leaf("block", device(content.Block, 259, 70_000)),
		leaf("block-0-0", device(content.Block, 0, 0)),
		leaf("fifo", entry(content.Fifo)),
		leaf("socket", entry(content.Socket)),
		leaf("mode-0", chmod(o.file(nil), 0)),
		leaf("setuid", chmod(o.file(text(5000, 3)), 0o4755)),
		leaf("setgid", chmod(o.file(text(5000, 4)), 0o2711)),
		leaf("sticky", chmod(entry(content.Dir), 0o1777)),
		leaf("all-bits", chmod(entry(content.Fifo), 0o7777)),
	)
}

func tortureXattrs(o objects) *tree.Node {
	capability := content.Xattr{Name: "security.capability",
		Value: []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")}
	access := content.Xattr{Name: "system.posix_acl_access", Value: acl(1000)}
	fallback := content.Xattr{Name: "system.posix_acl_default", Value: acl(70_000)}
	longest := content.Xattr{Name: "user." + strings.Repeat("n", maxXattrName-len("user.")), Value: []byte("v")}
	biggest := content.Xattr{Name: "user.biggest", Value: bytes.Repeat([]byte("0123456789abcdef"), 4096)[:maxXattrValue]}
	var many, wide []content.Xattr
	for i := range 300 {
		many = append(many, content.Xattr{Name: fmt.Sprintf("user.many%d", i), Value: text(i%50, i)})
	}
	for i := range 4 {
		wide = append(wide, content.Xattr{Name: fmt.Sprintf("trusted.wide%d", i), Value: text(60_000, i)})
	}
	nodes := []*tree.Node{
		leaf("acl", withXattrs(o.file(text(10, 5)), access)),
		leaf("acl-large", withXattrs(o.file(text(4000, 5)), access, capability)),
		leaf("biggest", withXattrs(o.file(text(1000, 6)), biggest)),
		leaf("biggest-large", withXattrs(o.file(text(3000, 6)), biggest)),
		leaf("biggest-symlink", withXattrs(symlink("biggest"), content.Xattr{Name: "trusted.big", Value: biggest.Value})),
		leaf("empty-value", withXattrs(o.file(nil), content.Xattr{Name: "user.e"})),
		leaf("longest", withXattrs(entry(content.Fifo), content.Xattr{Name: "trusted" + longest.Name[4:252],
			Value: longest.Value})),
		leaf("longest-file", withXattrs(o.file(nil), longest)),
		leaf("many1", withXattrs(o.file(nil), slices.Clone(many)...)),
		leaf("many2", withXattrs(o.file(text(2000, 1)), slices.Clone(many)...)),
		leaf("wide", withXattrs(o.file(text(640, 1)), slices.Clone(wide)...)),
		leaf("like-overlay", withXattrs(o.file(nil), content.Xattr{Name: "trusted.overlays", Value: []byte("y")})),
	}
	for n := range 560 { // what lies behind them stops fitting into a block
		pad := content.Xattr{Name: "user.pad", Value: text(n, n)}
		nodes = append(nodes, leaf(fmt.Sprint("edge", n), withXattrs(o.file(text(90, n)), pad)))
		nodes = append(nodes, leaf(fmt.Sprint("far", n), withXattrs(o.file(text(641, n)), pad)))
	}
	for i := range 50 { // shared, and at every offset to a block boundary
		nodes = append(nodes,
			leaf(fmt.Sprintf("cap%d", i), withXattrs(o.file(text(i*100, i)), capability,
				content.Xattr{Name: "user.pad", Value: text(i*77, i)})))
	}
	d := dir("xattrs", nodes...)
	withXattrs(d.Entry, access, fallback, biggest)
	return d
}

func tortureNames() *tree.Node {
	var nodes []*tree.Node
	for _, name := range []string{"!", "-x", ".a", "..b", ".\x01", "...", "a\nb", `back\slash`, "\xff\xfe", "\x01", "é",
		" ", "a", "a.", "a-", "A"} {
		nodes = append(nodes, leaf(name, entry(content.Fifo)))
	}
	for i := range 100 {
		nodes = append(nodes, leaf(fmt.Sprintf("%0*d", maxName, i), entry(content.Dir)))
	}
	return dir("names", nodes...)
}

func tortureSizes(o objects, unit blocks) *tree.Node {
	var nodes []*tree.Node
	for _, n := range []int{641, 1024, 1025, 4095, 4096, 4097, 12_288} {
		nodes = append(nodes, leaf(fmt.Sprint("object-", n), o.file(text(n, n))))
	}
	longest := int64(1) << (unit + maxChunkShift) // chunk
	for _, n := range []int64{
		1, 4096, 1 << 31, math.MaxUint32, 1 << 32, 10 << 30, longest, longest + 1, maxHole(unit),
	} {
		nodes = append(nodes, leaf(fmt.Sprint("hole-", n), hole(n)))
	}
	return dir("sizes", nodes...)
}

func tortureTails() *tree.Node {
	var nodes []*tree.Node
	for n := 1; n <= content.InlineMax; n++ {
		nodes = append(nodes, leaf(fmt.Sprint(n), objects{}.file(text(n, n))))
	}
	return dir("tails", nodes...)
}

func tortureTargets() *tree.Node {
	var nodes []*tree.Node
	for _, n := range []int{1, 59, 60, 255, 256, 1000, 1024, 2048} {
		nodes = append(nodes, leaf(fmt.Sprint(n), symlink(string(text(n, n)))))
	}
	for n := 530; n < 4000; n += 37 {
		nodes = append(nodes, leaf(fmt.Sprint("long-", n), symlink(string(text(n, n)))))
	}
	for _, fit := range []int{416, 3990} { // around where they stop fitting behind the inode
		for n := fit; n < fit+106; n++ {
			nodes = append(nodes, leaf(fmt.Sprint(n), symlink(string(text(n, n)))),
				leaf(fmt.Sprint("xattr-", n), withXattrs(symlink(string(text(n, n))),
					content.Xattr{Name: "trusted.own", Value: text(n%40, n)})))
		}
	}
	return dir("targets", nodes...)
}

// tortureDirs has directories of all sizes around one and two blocks, and one large.
func tortureDirs() *tree.Node {
	var large []*tree.Node
	for i := range 10_000 {
		large = append(large, leaf(fmt.Sprint("entry-", i), objects{}.file(text(i%3, i))))
	}
	nodes := []*tree.Node{dir("large", large...), dir("empty")}
	for blocks := range 4 { // of 512 bytes, all full
		inside := []*tree.Node{leaf(strings.Repeat("0", maxName), entry(content.Fifo)),
			leaf(strings.Repeat("1", 206), entry(content.Fifo))}
		for i := range 4 * blocks {
			inside = append(inside, leaf(fmt.Sprintf("2%0115d", i), entry(content.Fifo)))
		}
		nodes = append(nodes, dir(fmt.Sprint("full-", blocks), inside...))
	}
	for blocks := 1; blocks <= 2; blocks++ {
		for pad := 1; pad <= 140; pad++ {
			var inside []*tree.Node
			for i := range 36 * blocks { // 108 bytes each
				inside = append(inside, leaf(fmt.Sprintf("%096d", i), entry(content.Socket)))
			}
			inside = append(inside, leaf(strings.Repeat("p", pad), entry(content.Fifo)))
			nodes = append(nodes, dir(fmt.Sprintf("fill-%d-%d", blocks, pad), inside...))
		}
	}
	return dir("dirs", nodes...)
}

func tortureTimes(o objects) *tree.Node {
	var nodes []*tree.Node
	for i, t := range []content.Time{{}, {Sec: -1}, {Sec: -1, Nsec: 999_999_999}, {Sec: -12_219_292_800}, {Nsec: 1},
		{Sec: someTime.Sec, Nsec: 5}, {Sec: 1 << 31}, {Sec: 1 << 32}, {Sec: 1 << 34, Nsec: 123_456_789}} {
		e := o.file(text(i*300, i))
		e.Mtime = t
		nodes = append(nodes, leaf(fmt.Sprint("time-", i), e))
	}
	for i, id := range []uint32{1, math.MaxUint16, math.MaxUint16 + 1, math.MaxUint32 - 1} {
		e := o.file(text(i*600, i))
		e.UID, e.GID = id, 0
		f := o.file(text(i*600, i))
		f.UID, f.GID = 7, id
		nodes = append(nodes, leaf(fmt.Sprint("uid-", i), e), leaf(fmt.Sprint("gid-", i), f))
	}
	return dir("times", nodes...)
}

func tortureDeep(o objects) *tree.Node {
	n := leaf("bottom", o.file(text(3000, 9)))
	for range 500 {
		n = dir("d", n)
	}
	return dir("deep", n)
}

// addLinks gives inodes of every kind a second and third name, one of them in
// another directory.
func addLinks(root *tree.Node, o objects) {
	shared := map[string]*content.Entry{
		"data": o.file(text(50, 8)), "object": o.file(text(9000, 8)), "empty": o.file(nil),
		"symlink": symlink("data"), "fifo": entry(content.Fifo), "char": device(content.Char, 5, 1),
	}
	var a, b []*tree.Node
	for name, e := range shared {
		a = append(a, leaf(name, e), leaf(name+"2", e))
		b = append(b, leaf("other-"+name, e))
	}
	// Directories are never links of one another, whatever made them.
	same := dir("same", dir("x", leaf("f", entry(content.Fifo))), dir("y", dir("z")))
	same.Children[1].Entry = same.Children[0].Entry
	root.Children = append(root.Children, dir("links", a...), dir("a-links", b...), same)
}
