package tree

import (
	"context"
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// emptyRoot is what a chain shows of "/" when no layer says anything about it:
// what containerd's applier gives every snapshot.
var emptyRoot = content.Entry{Kind: content.Dir, Mode: 0o755, Flags: content.Implied}

// Merge overlays the entries of a chain's layers, base first, as the kernel would
// overlay their directories, and returns what a container sees. Entries are
// sorted by content.ComparePaths and are not changed; the result points to them. It ends early with ctx.
//
// It costs n log n in the entries of all layers, and one pass over the children of each directory in which a layer
// adds or removes names.
func Merge(ctx context.Context, layers ...[]*content.Entry) (*Node, error) {
	return MergeEach(ctx, func(yield func([]*content.Entry, error) bool) {
		for _, entries := range layers {
			if !yield(entries, nil) {
				return
			}
		}
	})
}

// MergeEach is Merge for layers that are read one at a time, so that what upper layers replace does not stay in
// memory. An error of layers ends it and is returned as it is.
func MergeEach(ctx context.Context, layers iter.Seq2[[]*content.Entry, error]) (*Node, error) {
	m := newMerger(ctx)
	i := 0
	for entries, err := range layers {
		if err != nil {
			return nil, err
		}
		if err := m.apply(entries); err != nil {
			return nil, fmt.Errorf("layer %d of the chain: %w", i+1, err)
		}
		i++
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	m.show(m.root, map[*content.Entry]*content.Entry{})
	return m.root, nil
}

// merger holds the tree that the layers so far have made.
type merger struct {
	ctx  context.Context
	root *Node
	// shared holds the inodes with more than one name, over all layers, and names their nodes (some may hang in
	// the tree no more). own are those of them that Merge has made: it may change them in place.
	shared map[*content.Entry]bool
	names  map[*content.Entry][]*Node
	own    map[*content.Entry]bool
	// followed holds where symlinks lead; good until the tree changes.
	followed map[*Node]followed
	// steps counts work: names that were looked at, moved or followed.
	steps int
}

func newMerger(ctx context.Context) *merger {
	return &merger{
		ctx: ctx, root: &Node{Entry: &emptyRoot},
		shared: map[*content.Entry]bool{}, names: map[*content.Entry][]*Node{}, own: map[*content.Entry]bool{},
		followed: map[*Node]followed{},
	}
}

// show replaces entries by what containers see of them. What that is follows from the entry alone: a layer changes
// nothing of what it does not name.
func (m *merger) show(n *Node, shown map[*content.Entry]*content.Entry) {
	if e := n.Entry; e.Flags&content.PySource != 0 {
		if shown[e] == nil {
			shown[e] = e.Shown()
		}
		n.Entry = shown[e]
	}
	for _, c := range n.Children {
		m.show(c, shown)
	}
}

// checkEvery is how many entries pass between two looks at ctx.
const checkEvery = 1 << 10

// stopped returns why to stop before entry i.
func (m *merger) stopped(i int) error {
	m.steps++
	if i%checkEvery != 0 || m.ctx.Err() == nil {
		return nil
	}
	return context.Cause(m.ctx)
}

// inodes are those that a layer takes from elsewhere than the entry at hand.
type inodes struct {
	links   map[string]*content.Entry         // of the paths that Hardlinks name
	lower   map[*content.Entry]*content.Entry // of LowerLinks
	implied map[*content.Entry]*content.Entry // of implied directories over symlinks
}

func (m *merger) apply(entries []*content.Entry) error {
	from, err := m.collect(entries)
	if err != nil {
		return err
	}
	stack := []*level{{node: m.root}}
	pop := func() {
		m.steps += stack[len(stack)-1].close()
		stack = stack[:len(stack)-1]
	}
	for i, e := range entries {
		if err := m.stopped(i); err != nil {
			return err
		}
		if e.Path == "" {
			if err := setRoot(m.root, e); err != nil {
				return err
			}
			continue
		}
		dir, name := content.SplitPath(e.Path)
		for len(stack) > 1 && stack[len(stack)-1].path != dir {
			pop()
		}
		parent := stack[len(stack)-1]
		if parent.path != dir {
			return fmt.Errorf("entry %q has no parent directory", e.Path)
		}
		n, err := m.put(parent, name, e, from)
		if err != nil {
			return err
		}
		if n != nil && e.Kind == content.Dir {
			stack = append(stack, &level{path: e.Path, node: n})
		}
	}
	for len(stack) > 0 {
		pop()
	}
	return nil
}

func setRoot(root *Node, e *content.Entry) error {
	if e.Kind != content.Dir {
		return fmt.Errorf("the root is of kind %d, not a directory", e.Kind)
	}
	if e.Flags&content.Opaque != 0 {
		root.Children = nil
	}
	if e.Flags&content.Implied == 0 || root.Entry == &emptyRoot {
		root.Entry = e
	}
	return nil
}

// collect finds the inodes that this layer takes from elsewhere: its own first, then
// those of the layers below, before this layer hides any of them.
func (m *merger) collect(entries []*content.Entry) (inodes, error) {
	in := inodes{links: map[string]*content.Entry{}, lower: map[*content.Entry]*content.Entry{},
		implied: map[*content.Entry]*content.Entry{}}
	m.followed = map[*Node]followed{}
	for i, e := range entries {
		if err := m.stopped(i); err != nil {
			return in, err
		}
		switch {
		case e.Kind == content.Hardlink:
			in.links[e.Target] = nil
		case e.Kind == content.Dir && e.Flags&content.Implied != 0 && e.Path != "":
			if inode := m.impliedOver(e); inode != nil {
				in.implied[e] = inode
			}
		}
	}
	for i, e := range entries {
		if err := m.stopped(i); err != nil {
			return in, err
		}
		inode := e
		if e.Kind == content.LowerLink {
			var err error
			if inode, err = m.lowerInode(e); err != nil {
				return in, err
			}
			in.lower[e] = inode
		}
		if len(in.links) == 0 || e.Kind == content.Hardlink {
			continue
		}
		if _, ok := in.links[e.Path]; ok {
			in.links[e.Path] = inode
			m.shared[inode] = true
		}
	}
	return in, nil
}

// impliedOver is the inode of an implied directory over a symlink to a directory: containerd's applier copies
// that directory's metadata. It is nil over anything else.
func (m *merger) impliedOver(e *content.Entry) *content.Entry {
	below := m.find(e.Path)
	if below == nil || below.Entry.Kind != content.Symlink {
		return nil
	}
	target := m.resolve(e.Path)
	if target == nil || target.Entry.Kind != content.Dir {
		return nil
	}
	inode := *target.Entry
	inode.Path = e.Path
	return &inode
}

// lowerInode gives the inode that a LowerLink names the metadata of the link, under
// all its names.
func (m *merger) lowerInode(e *content.Entry) (*content.Entry, error) {
	n := m.find(e.Target)
	switch {
	case n == nil:
		return nil, noTarget(e.Path, e.Target)
	case n.Entry.Kind == content.Dir:
		return nil, targetIsDir(e.Path, e.Target)
	}
	inode := m.owned(n)
	if e.Mtime != inode.Mtime { // else a source shows what it did
		inode.Flags &^= content.PySource
	}
	inode.UID, inode.GID, inode.Mtime = e.UID, e.GID, e.Mtime
	if inode.Kind != content.Symlink {
		inode.Mode = e.Mode
	}
	if len(e.Xattrs) > 0 {
		inode.Xattrs = unionXattrs(inode.Xattrs, e.Xattrs)
	}
	return inode, nil
}

// owned makes a node's inode one that may be changed in place, and that counts as shared.
func (m *merger) owned(n *Node) *content.Entry {
	if m.own[n.Entry] {
		return n.Entry
	}
	old, inode := n.Entry, *n.Entry
	names := m.names[old]
	if !m.shared[old] {
		names = []*Node{n}
	}
	for _, n := range names {
		n.Entry = &inode
	}
	m.steps += len(names)
	delete(m.names, old)
	m.names[&inode] = names
	m.shared[&inode], m.own[&inode] = true, true
	return &inode
}

// unionXattrs returns both lists, which are sorted, as one; where both have a name the new value counts.
func unionXattrs(old, new []content.Xattr) []content.Xattr {
	out := make([]content.Xattr, 0, len(old)+len(new))
	for len(old) > 0 && len(new) > 0 {
		switch c := strings.Compare(old[0].Name, new[0].Name); {
		case c < 0:
			out, old = append(out, old[0]), old[1:]
		case c == 0:
			old = old[1:]
		default:
			out, new = append(out, new[0]), new[1:]
		}
	}
	return append(append(out, old...), new...)
}

// put places one entry in the directory of a level and returns its node, nil for a whiteout.
func (m *merger) put(l *level, name string, e *content.Entry, from inodes) (*Node, error) {
	old, looked, err := l.seek(name)
	if err != nil {
		return nil, err
	}
	m.steps += looked
	inode := e
	switch e.Kind {
	case content.Whiteout:
		if old != nil {
			l.remove()
		}
		return nil, nil
	case content.Hardlink:
		if inode = from.links[e.Target]; inode == nil {
			return nil, fmt.Errorf("hard link %q names %q, which the layer does not have", e.Path, e.Target)
		}
	case content.LowerLink:
		inode = from.lower[e]
	case content.Dir:
		if old != nil && old.Entry.Kind == content.Dir {
			if e.Flags&content.Opaque != 0 {
				old.Children = nil
			}
			if e.Flags&content.Implied == 0 {
				old.Entry = e
			}
			return old, nil
		}
		if dir := from.implied[e]; old != nil && dir != nil {
			inode = dir
		}
	}
	n := &Node{Name: name, Entry: inode, parent: l.node}
	if m.shared[inode] {
		m.names[inode] = append(m.names[inode], n)
	}
	l.place(n, old != nil)
	return n, nil
}

// level is one directory on the path to the entry at hand. A layer's names come sorted, so the changes of one layer to
// a directory are made in one pass over its children.
type level struct {
	path string
	node *Node
	last string // the name at hand
	// at is the place of the first child that does not come before it.
	at int
	// added are new children, to be put between the others; removed of those are nil.
	added   []*Node
	removed bool
}

// seek goes on to a name and returns the child that has it, or nil, and how many it looked at.
func (l *level) seek(name string) (child *Node, looked int, err error) {
	if l.last != "" && name <= l.last {
		return nil, 0, fmt.Errorf("%q comes after %q in directory %q: the layer is not sorted", name, l.last, l.path)
	}
	l.last = name
	// The place is near: steps that double find a stretch to search.
	old := l.node.Children
	end := l.at
	for step := 1; end < len(old) && old[end].Name < name; step *= 2 {
		l.at, end = end+1, end+step
		looked++
	}
	end = min(end, len(old))
	looked += bits.Len(uint(end - l.at))
	i, _ := slices.BinarySearchFunc(old[l.at:end], name, func(c *Node, name string) int {
		return strings.Compare(c.Name, name)
	})
	l.at += i
	if l.at == len(old) || old[l.at].Name != name {
		return nil, looked, nil
	}
	l.at++ // nobody asks for it again
	return old[l.at-1], looked, nil
}

// remove takes away the child that seek found.
func (l *level) remove() { l.node.Children[l.at-1], l.removed = nil, true }

// place puts a node where seek found a child, or none.
func (l *level) place(n *Node, over bool) {
	if over {
		l.node.Children[l.at-1] = n
		return
	}
	l.added = append(l.added, n)
}

// close makes the directory's children one sorted list again, and returns how many it moved.
func (l *level) close() (moved int) {
	old := l.node.Children
	if l.removed {
		moved = len(old)
		old = slices.DeleteFunc(old, func(c *Node) bool { return c == nil })
	}
	switch {
	case len(l.added) == 0:
	case len(old) == 0:
		old = l.added
	case old[len(old)-1].Name < l.added[0].Name:
		old = append(old, l.added...)
	default:
		old = weave(old, l.added)
		moved += len(old)
	}
	l.node.Children = old
	return moved
}

// weave makes one sorted list of two that share no name.
func weave(a, b []*Node) []*Node {
	out := make([]*Node, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].Name < b[0].Name {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}
