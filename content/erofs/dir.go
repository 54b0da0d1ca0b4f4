package erofs

import "github.com/dedup-snapshotter/dedup-snapshotter/content"

const direntSize = 12

// dirent is one name in a directory.
type dirent struct {
	name  string
	inode int32
}

// dirents lists a directory as it is stored: bytewise, with "." and ".." among
// the names (those that begin with '!' or '-' come before them). The slice is
// good until the next call.
//
// A directory is a row of blocks, each on its own:
//
//	dirent   12 bytes each: nid, where its name begins in the block, type
//	names    without separators; a NUL after the last if there is room
//
// The count of dirents follows from where the first name begins. The last block
// ends with its last name.
func (im *image) dirents(dir int32) []dirent {
	in := &im.inodes[dir]
	ents := im.ents[:0]
	dots := []dirent{{".", dir}, {"..", in.parent}}
	for i, child := range in.node.Children {
		for len(dots) > 0 && dots[0].name < child.Name {
			ents, dots = append(ents, dots[0]), dots[1:]
		}
		ents = append(ents, dirent{child.Name, im.refs[int(in.refs)+i]})
	}
	im.ents = append(ents, dots...)
	return im.ents
}

// firstBlock says how many of ents fit in one block, and how many bytes they take.
func firstBlock(unit blocks, ents []dirent) (count int, length int64) {
	for ; count < len(ents); count++ {
		n := int64(direntSize + len(ents[count].name))
		if length+n > unit.size() {
			break
		}
		length += n
	}
	return count, length
}

// dirBlocks calls f for each block of a directory, with what is in it and how many bytes that takes.
func (im *image) dirBlocks(dir int32, f func(n int64, ents []dirent, length int64)) {
	ents := im.dirents(dir)
	for n := int64(0); len(ents) > 0; n++ {
		count, length := firstBlock(im.unit, ents)
		f(n, ents[:count], length)
		ents = ents[count:]
	}
}

// dirSize is a directory's i_size: all blocks but the last are full.
func (im *image) dirSize(dir int32) (size int64) {
	im.dirBlocks(dir, func(n int64, _ []dirent, length int64) { size = n*im.unit.size() + length })
	return size
}

// encodeDirents writes one block of a directory at b[0].
func (im *image) encodeDirents(b []byte, ents []dirent) {
	name := direntSize * len(ents)
	for i, ent := range ents {
		in := &im.inodes[ent.inode]
		le.PutUint64(b[i*direntSize:], in.nid())
		le.PutUint16(b[i*direntSize+8:], uint16(name))
		b[i*direntSize+10] = direntType(in.node.Entry.Kind)
		name += copy(b[name:], ent.name)
	}
}

func direntType(k content.Kind) uint8 {
	switch k {
	case content.Regular:
		return 1
	case content.Dir:
		return 2
	case content.Char:
		return 3
	case content.Block:
		return 4
	case content.Fifo:
		return 5
	case content.Socket:
		return 6
	case content.Symlink:
		return 7
	}
	return 0
}
