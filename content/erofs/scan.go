package erofs

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

const (
	maxName   = 255
	maxTarget = 4095      // PATH_MAX with its NUL
	maxMajor  = 1<<12 - 1 // the kernel keeps 12 and 20 bits
	maxMinor  = 1<<20 - 1
	// maxSize keeps the index of a file at 1 KiB, so that a tar that claims 8 EiB
	// cannot blow up the image. No pack can be as large.
	maxSize = maxChunks << (coarse + maxChunkShift)
)

// scan collects the inodes below root and checks every one of them.
func (im *image) scan(root *tree.Node) error {
	switch {
	case root == nil || root.Entry == nil:
		return errors.New("no root")
	case root.Entry.Kind != content.Dir:
		return errors.New("the root is not a directory")
	}
	if err := check(root); err != nil {
		return fmt.Errorf("%q: %w", "/", err)
	}
	n := count(root) // room for all at once: a quarter less memory
	im.inodes = make([]inode, 0, n)
	im.refs = make([]int32, 0, n)
	im.add(root, 0)
	return im.scanDir(0, make(map[*content.Entry]int32))
}

// count is the number of names in a tree.
func count(n *tree.Node) int {
	sum := 1
	for _, child := range n.Children {
		sum += count(child)
	}
	return sum
}

// scanDir adds all children of a directory before it goes deeper: a listing that
// stats what it lists then reads neighbouring blocks. links finds the inode of a
// non-directory that was seen under another name.
func (im *image) scanDir(dir int32, links map[*content.Entry]int32) error {
	children := im.inodes[dir].node.Children
	first := len(im.refs)
	im.inodes[dir].refs = int32(first)
	prev := ""
	for _, child := range children {
		if err := checkName(prev, child.Name); err != nil {
			return fmt.Errorf("%q: %w", im.path(dir, child.Name), err)
		}
		prev = child.Name
		if id, ok := links[child.Entry]; ok {
			im.inodes[id].nlink++
			im.refs = append(im.refs, id)
			continue
		}
		if err := check(child); err != nil {
			return fmt.Errorf("%q: %w", im.path(dir, child.Name), err)
		}
		id := im.add(child, dir)
		if err := im.stopped(int(id)); err != nil {
			return err
		}
		if child.Entry.Kind == content.Dir {
			im.inodes[dir].nlink++
		} else {
			links[child.Entry] = id
		}
		im.refs = append(im.refs, id)
	}
	im.inodes[dir].size = im.dirSize(dir)
	for i, child := range children {
		if child.Entry.Kind != content.Dir {
			continue
		}
		if err := im.scanDir(im.refs[first+i], links); err != nil {
			return err
		}
	}
	return nil
}

// add appends the inode of a checked node. The size of a directory is not known yet.
func (im *image) add(n *tree.Node, parent int32) int32 {
	e := n.Entry
	in := inode{node: n, parent: parent, nlink: 1}
	switch e.Kind {
	case content.Dir:
		in.nlink = 2
	case content.Regular:
		in.size = e.Size
	case content.Symlink:
		in.size = int64(len(e.Target))
	}
	im.shared.count(e)
	im.inodes = append(im.inodes, in)
	return int32(len(im.inodes) - 1)
}

// path is where a name in a directory lies, for messages.
func (im *image) path(dir int32, name string) string {
	parts := []string{name}
	for ; dir != 0; dir = im.inodes[dir].parent {
		parts = append(parts, im.inodes[dir].node.Name)
	}
	parts = append(parts, "")
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// checkName refuses what a directory cannot hold. The kernel looks names up by
// bisection, so an unsorted directory would lose some of them.
func checkName(prev, name string) error {
	switch {
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return errors.New("not a file name")
	case len(name) > maxName:
		return fmt.Errorf("name of %d bytes, at most %d fit", len(name), maxName)
	case name <= prev:
		return fmt.Errorf("out of order after %q", prev)
	}
	return nil
}

// check refuses a node whose entry breaks its contract, does not fit the format,
// or would steer overlayfs.
func check(n *tree.Node) error {
	e := n.Entry
	switch {
	case e == nil:
		return errors.New("no entry")
	case e.Mode&^0o7777 != 0:
		return fmt.Errorf("mode %#o has bits beyond 07777", e.Mode)
	case e.Mtime.Nsec >= 1e9:
		return fmt.Errorf("mtime has %d nanoseconds", e.Mtime.Nsec)
	case e.Kind != content.Dir && len(n.Children) > 0:
		return errors.New("children below something that is not a directory")
	}
	for i := range e.Xattrs {
		if err := checkXattr(&e.Xattrs[i]); err != nil {
			return err
		}
	}
	switch e.Kind {
	case content.Dir, content.Fifo, content.Socket:
		return nil
	case content.Regular:
		return checkPayload(e)
	case content.Symlink:
		return checkTarget(e.Target)
	case content.Char, content.Block:
		return checkDevice(e)
	}
	return fmt.Errorf("an entry of kind %d has no inode", e.Kind)
}

func checkPayload(e *content.Entry) error {
	switch {
	case e.Size < 0:
		return fmt.Errorf("size %d", e.Size)
	case len(e.Data) > 0 && int64(len(e.Data)) != e.Size:
		return fmt.Errorf("size %d with %d bytes of data", e.Size, len(e.Data))
	case len(e.Data) > content.InlineMax:
		return fmt.Errorf("%d bytes of data, at most %d lie in an image", len(e.Data), content.InlineMax)
	case e.Size > 0 && len(e.Data) == 0 && e.Object.IsZero():
		return errors.New("neither data nor an object")
	case e.Size > maxSize:
		return fmt.Errorf("size %d, at most %d fits", e.Size, int64(maxSize))
	}
	return nil
}

func checkTarget(target string) error {
	switch {
	case target == "":
		return errors.New("symlink without a target")
	case len(target) > maxTarget:
		return fmt.Errorf("symlink target of %d bytes, at most %d fit", len(target), maxTarget)
	case strings.IndexByte(target, 0) >= 0:
		return errors.New("symlink target with a NUL byte")
	}
	return nil
}

func checkDevice(e *content.Entry) error {
	switch {
	case e == whiteout:
	case e.Kind == content.Char && e.Major == 0 && e.Minor == 0:
		return errors.New("character device 0/0: overlayfs takes it for a whiteout")
	case e.Major > maxMajor || e.Minor > maxMinor:
		return fmt.Errorf("device %d/%d, at most %d/%d fits", e.Major, e.Minor, maxMajor, maxMinor)
	}
	return nil
}
