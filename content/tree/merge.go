package tree

import (
	"fmt"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// emptyRoot is what a chain shows of "/" when no layer says anything about it:
// what containerd's applier gives every snapshot.
var emptyRoot = content.Entry{Kind: content.Dir, Mode: 0o755, Flags: content.Implied}

// Merge overlays the entries of a chain's layers, base first, as the kernel would
// overlay their directories, and returns what a container sees. Entries are
// sorted by content.ComparePaths and are not changed; the result points to them.
func Merge(layers ...[]*content.Entry) (*Node, error) {
	m := merger{root: &Node{Entry: &emptyRoot}}
	for i, entries := range layers {
		if err := m.apply(entries); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	m.show(m.root, map[*content.Entry]*content.Entry{})
	return m.root, nil
}

type merger struct {
	root *Node
	// shared holds the inodes with more than one name, over all layers.
	shared map[*content.Entry]bool
}

// show replaces entries by what containers see of them. What that is follows from the entry alone: a layer changes nothing of what it
// does not name.
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

// level is one directory on the path to the entry at hand.
type level struct {
	path string
	node *Node
}

func (m *merger) apply(entries []*content.Entry) error {
	links, err := m.linkTargets(entries)
	if err != nil {
		return err
	}
	stack := []level{{"", m.root}}
	for _, e := range entries {
		if e.Path == "" {
			if err := setRoot(m.root, e); err != nil {
				return err
			}
			continue
		}
		dir, name := content.SplitPath(e.Path)
		for len(stack) > 1 && stack[len(stack)-1].path != dir {
			stack = stack[:len(stack)-1]
		}
		parent := stack[len(stack)-1]
		if parent.path != dir {
			return fmt.Errorf("entry %q has no parent directory", e.Path)
		}
		n, err := m.put(parent.node, name, e, links)
		if err != nil {
			return err
		}
		if n != nil && e.Kind == content.Dir {
			stack = append(stack, level{e.Path, n})
		}
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

// linkTargets finds the inodes that this layer's links name: its own first, then
// those of the layers below, before this layer hides any of them.
func (m *merger) linkTargets(entries []*content.Entry) (map[string]*content.Entry, error) {
	links := map[string]*content.Entry{}
	for _, e := range entries {
		if e.Kind == content.Hardlink {
			links[e.Target] = nil
		}
	}
	if len(links) > 0 {
		for _, e := range entries {
			if _, ok := links[e.Path]; ok && e.Kind != content.Hardlink {
				links[e.Path] = e
				m.share(e)
			}
		}
	}
	for _, e := range entries {
		if e.Kind != content.LowerLink {
			continue
		}
		inode, err := m.lowerInode(e)
		if err != nil {
			return nil, err
		}
		if own, ok := links[e.Path]; ok && own == e {
			// Further names in this layer link to this lower link.
			links[e.Path] = inode
		}
		links["\x00"+e.Path] = inode
	}
	return links, nil
}

func (m *merger) share(e *content.Entry) {
	if m.shared == nil {
		m.shared = map[*content.Entry]bool{}
	}
	m.shared[e] = true
}

// lowerInode gives the inode that a LowerLink names the metadata of the link, under
// all its names.
func (m *merger) lowerInode(e *content.Entry) (*content.Entry, error) {
	n := m.find(e.Target)
	if n == nil {
		return nil, fmt.Errorf("hard link %q names %q, which no layer below has", e.Path, e.Target)
	}
	old := n.Entry
	if old.Kind == content.Dir {
		return nil, fmt.Errorf("hard link %q names %q, which is a directory", e.Path, e.Target)
	}
	inode := *old
	if e.Mtime != old.Mtime { // else a source shows what it did
		inode.Flags &^= content.PySource
	}
	inode.UID, inode.GID, inode.Mtime = e.UID, e.GID, e.Mtime
	if old.Kind != content.Symlink {
		inode.Mode = e.Mode
	}
	if len(e.Xattrs) > 0 {
		inode.Xattrs = unionXattrs(old.Xattrs, e.Xattrs)
	}
	if m.shared[old] {
		walk(m.root, func(n *Node) {
			if n.Entry == old {
				n.Entry = &inode
			}
		})
	}
	n.Entry = &inode
	m.share(&inode)
	return &inode, nil
}

func unionXattrs(old, new []content.Xattr) []content.Xattr {
	out := slices.Clone(new)
	for _, x := range old {
		if !slices.ContainsFunc(new, func(y content.Xattr) bool { return x.Name == y.Name }) {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, func(a, b content.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// put places one entry below parent and returns its node, nil for a whiteout.
func (m *merger) put(parent *Node, name string, e *content.Entry, links map[string]*content.Entry) (*Node, error) {
	i, found := parent.search(name)
	inode := e
	switch e.Kind {
	case content.Whiteout:
		if found {
			parent.Children = slices.Delete(parent.Children, i, i+1)
		}
		return nil, nil
	case content.Hardlink:
		if inode = links[e.Target]; inode == nil {
			return nil, fmt.Errorf("hard link %q names %q, which the layer does not have", e.Path, e.Target)
		}
	case content.LowerLink:
		inode = links["\x00"+e.Path]
	case content.Dir:
		if found && parent.Children[i].Entry.Kind == content.Dir {
			n := parent.Children[i]
			if e.Flags&content.Opaque != 0 {
				n.Children = nil
			}
			if e.Flags&content.Implied == 0 {
				n.Entry = e
			}
			return n, nil
		}
		if found && e.Flags&content.Implied != 0 {
			inode = m.impliedOver(e)
		}
	}
	n := &Node{Name: name, Entry: inode}
	if found {
		parent.Children[i] = n
	} else {
		parent.Children = slices.Insert(parent.Children, i, n)
	}
	return n, nil
}

// impliedOver is the inode of an implied directory over something that is no
// directory: over a symlink to a directory, containerd's applier copies that
// directory's metadata.
func (m *merger) impliedOver(e *content.Entry) *content.Entry {
	target := m.resolve(e.Path)
	if target == nil || target.Entry.Kind != content.Dir {
		return e
	}
	inode := *target.Entry
	inode.Path = e.Path
	return &inode
}

func (n *Node) search(name string) (int, bool) {
	// Entries come sorted, so most often the place is at the end.
	if l := len(n.Children); l == 0 || n.Children[l-1].Name < name {
		return l, false
	}
	return slices.BinarySearchFunc(n.Children, name, func(c *Node, name string) int {
		return strings.Compare(c.Name, name)
	})
}

func (n *Node) child(name string) *Node {
	if i, ok := n.search(name); ok {
		return n.Children[i]
	}
	return nil
}

func (m *merger) find(path string) *Node {
	n := m.root
	for name := range strings.SplitSeq(path, "/") {
		if n = n.child(name); n == nil {
			return nil
		}
	}
	return n
}

// maxSymlinks is the kernel's limit for one path walk.
const maxSymlinks = 40

// resolve walks a path inside the merged tree and follows symlinks, the last
// component included, never leaving the root.
func (m *merger) resolve(path string) *Node {
	todo := strings.Split(path, "/")
	at := []*Node{m.root}
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		n := at[len(at)-1].child(name)
		if n == nil {
			return nil
		}
		if n.Entry.Kind != content.Symlink {
			at = append(at, n)
			continue
		}
		if links++; links > maxSymlinks {
			return nil
		}
		if strings.HasPrefix(n.Entry.Target, "/") {
			at = at[:1]
		}
		todo = append(strings.Split(n.Entry.Target, "/"), todo...)
	}
	return at[len(at)-1]
}

func walk(n *Node, visit func(*Node)) {
	visit(n)
	for _, c := range n.Children {
		walk(c, visit)
	}
}
