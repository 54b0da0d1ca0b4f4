package tree

import "github.com/dedup-snapshotter/dedup-snapshotter/content"

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
}
