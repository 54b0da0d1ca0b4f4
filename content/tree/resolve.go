package tree

import (
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// maxSymlinks is the kernel's limit for one path walk.
const maxSymlinks = 40

// followed is what is known of where a symlink leads.
type followed struct {
	node *Node // nil: nowhere, for a walk that has gone through failsAt symlinks or more before
	// links is how many symlinks lead there, the first included.
	links, failsAt int
}

// find returns the node of a path, symlinks not followed, or nil.
func (m *merger) find(path string) *Node {
	n := m.root
	for name := range strings.SplitSeq(path, "/") {
		m.steps++
		if n = n.child(name); n == nil {
			return nil
		}
	}
	return n
}

// resolve walks a path inside the merged tree and follows symlinks, the last
// component included, never leaving the root. Each symlink is walked once, however many paths go through it.
func (m *merger) resolve(path string) *Node {
	n, _ := m.walk(m.root, path, 0)
	return n
}

// walk resolves a path from a directory after so many symlinks, and returns how many there were in the end. On a
// path that does not exist that is 0, on one with too many of them more than maxSymlinks.
func (m *merger) walk(dir *Node, path string, links int) (*Node, int) {
	if strings.HasPrefix(path, "/") {
		dir = m.root
	}
	for name := range strings.SplitSeq(path, "/") {
		m.steps++
		switch name {
		case "", ".":
			continue
		case "..":
			if dir.parent != nil {
				dir = dir.parent
			}
			continue
		}
		next := dir.child(name)
		if next == nil {
			return nil, 0
		}
		if next.Entry.Kind == content.Symlink {
			if next, links = m.follow(next, links); next == nil {
				return nil, links
			}
		}
		dir = next
	}
	return dir, links
}

func (m *merger) follow(link *Node, links int) (*Node, int) {
	known, ok := m.followed[link]
	switch {
	case ok && known.node != nil && links+known.links <= maxSymlinks:
		return known.node, links + known.links
	case ok && known.node == nil && known.failsAt == 0:
		return nil, 0
	case ok && (known.node != nil || links >= known.failsAt), links >= maxSymlinks:
		return nil, maxSymlinks + 1
	}
	n, after := m.walk(link.parent, link.Entry.Target, links+1)
	switch {
	case n != nil:
		known = followed{node: n, links: after - links}
	case after > maxSymlinks:
		known = followed{failsAt: max(links, 1)} // one that begins here fails alike, and finds out again
	default:
		known = followed{}
	}
	m.followed[link] = known
	return n, after
}
