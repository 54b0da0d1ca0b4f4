package tree

import (
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Node is one name in the merged file system of a chain. Nodes that share the
// Entry pointer are hard links of one inode.
type Node struct {
	// Name is the last path component; "" for the root.
	Name string
	// Entry is the inode: metadata and payload as a container sees them. Its Kind is
	// never Hardlink, LowerLink or Whiteout, and its Path says nothing about
	// where the node hangs.
	Entry *content.Entry
	// Children, of a Dir only, are sorted bytewise by Name.
	Children []*Node

	// parent is the directory that holds the node; nil for the root.
	parent *Node
}

// search returns the place of the first child that does not come before name, and whether it has that name.
func (n *Node) search(name string) (int, bool) {
	return slices.BinarySearchFunc(n.Children, name, func(c *Node, name string) int {
		return strings.Compare(c.Name, name)
	})
}

// child returns the child of that name, or nil. It costs a binary search.
func (n *Node) child(name string) *Node {
	if i, ok := n.search(name); ok {
		return n.Children[i]
	}
	return nil
}

// Objects returns the payloads of all files below a node, each once.
func (n *Node) Objects() (ids []content.ObjectID) {
	seen := map[content.ObjectID]bool{}
	var walk func(*Node)
	walk = func(n *Node) {
		if id := n.Entry.Object; !id.IsZero() && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
		for _, child := range n.Children {
			walk(child)
		}
	}
	walk(n)
	return ids
}
