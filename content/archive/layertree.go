package archive

import (
	"maps"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// layerTree is one layer as the members so far have made it.
type layerTree struct {
	keeper
	root *node
	// shared holds the inodes with more than one path, and, while entries runs,
	// the smallest of these.
	shared map[*content.Entry]string
	// The last directory asked for, since members of one directory tend to follow
	// each other. Dropped whenever something is replaced.
	lastPath string
	lastDir  *node
}

// node is one name in a directory. Two nodes with the same entry are hardlinks.
type node struct {
	entry    *content.Entry // nil: nothing but a whiteout marker
	children map[string]*node
	hidden   bool // a marker hides the name in the layers below
}

func newLayerTree() *layerTree {
	root := &content.Entry{Kind: content.Dir, Flags: content.Implied, Mode: 0o755}
	return &layerTree{root: &node{entry: root}, shared: map[*content.Entry]string{}}
}

func (n *node) isDir() bool { return n.entry != nil && n.entry.Kind == content.Dir }

// child returns the node of name, which is new and empty if there was none.
func (n *node) child(name string) *node {
	c := n.children[name]
	if c == nil {
		if n.children == nil {
			n.children = map[string]*node{}
		}
		c = &node{}
		n.children[name] = c
	}
	return c
}

// put replaces whatever dir has under name, with all that is below it. A marker
// of that name stays: it speaks of lower layers.
func (t *layerTree) put(dir *node, name string, e *content.Entry) {
	n := dir.child(name)
	if n.entry != nil {
		t.lastDir = nil
	}
	n.entry, n.children = e, nil
	t.entry(len(dir.entry.Path)+len(name)+1, e)
}

// share notes that e has more than one path from now on.
func (t *layerTree) share(e *content.Entry) { t.shared[e] = "" }

// dir returns the directory that path leads to, symlinks followed, and creates
// what is missing.
func (t *layerTree) dir(path string) (*node, error) {
	if t.lastDir != nil && t.lastPath == path {
		return t.lastDir, nil
	}
	resolved, err := t.resolve(path)
	if err != nil {
		return nil, err
	}
	if err := checkPath(resolved); err != nil {
		return nil, err
	}
	d := t.root
	for end, name := range components(resolved) {
		n := d.child(name)
		switch {
		case n.entry == nil:
			n.entry = &content.Entry{Path: resolved[:end], Kind: content.Dir, Flags: content.Implied, Mode: 0o755}
			t.entry(end, n.entry)
		case !n.isDir():
			return nil, invalid("%s is not a directory", quote(resolved[:end]))
		}
		d = n
	}
	t.lastPath, t.lastDir = path, d
	return d, nil
}

// components yields each component of a clean path with the offset of its end.
func components(path string) func(yield func(int, string) bool) {
	return func(yield func(int, string) bool) {
		for start := 0; start < len(path); {
			end := len(path)
			if i := strings.IndexByte(path[start:], '/'); i >= 0 {
				end = start + i
			}
			if !yield(end, path[start:end]) {
				return
			}
			start = end + 1
		}
	}
}

// find returns the node of a path without following symlinks, nil if there is none.
func (t *layerTree) find(path string) (*node, error) {
	n := t.root
	for _, name := range components(path) {
		if n.entry != nil && !n.isDir() {
			return nil, invalid("%s is not a directory", quote(n.entry.Path))
		}
		if n = n.children[name]; n == nil {
			return nil, nil
		}
	}
	return n, nil
}

// maxLinks is how many symlinks one path may go through: containerd's limit
// (continuity, fs.RootPath), which is more than the kernel's 40.
const maxLinks = 255

// resolve follows the layer's own symlinks inside the root, the last component
// included, as a chroot would: absolute targets begin at the root. What does not
// exist is taken for a directory to be. Unlike a chroot, and unlike continuity's
// fs.RootPath, it does not stop at the root when ".." leads above it: an honest
// archive has no reason to try.
func (t *layerTree) resolve(path string) (string, error) {
	if path == "" || t.plain(path) {
		return path, nil
	}
	var done []string        // resolved components
	nodes := []*node{t.root} // their nodes, nil when missing, behind the root's
	links := 0
	for rest := path; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if name == "" || name == "." {
			continue
		}
		if name == ".." {
			if len(done) == 0 {
				return "", invalid("%s leads above the root", quote(path))
			}
			done, nodes = done[:len(done)-1], nodes[:len(nodes)-1]
			continue
		}
		var next *node
		if d := nodes[len(nodes)-1]; d != nil && d.entry != nil {
			if !d.isDir() {
				return "", invalid("%s is not a directory", quote(strings.Join(done, "/")))
			}
			next = d.children[name]
		}
		if next == nil || next.entry == nil || next.entry.Kind != content.Symlink {
			done, nodes = append(done, name), append(nodes, next)
			continue
		}
		target := next.entry.Target
		if links++; links > maxLinks {
			return "", invalid("%s goes through more than %d symlinks", quote(path), maxLinks)
		}
		if rest = target + "/" + rest; len(rest) > 2*maxPath {
			return "", invalid("%s leads through symlinks to a path that is too long", quote(path))
		}
		if target[0] == '/' {
			done, nodes = done[:0], nodes[:1]
		}
	}
	return strings.Join(done, "/"), nil
}

// plain reports whether a clean path leads through directories only, so that
// there is nothing to resolve.
func (t *layerTree) plain(path string) bool {
	n := t.root
	for _, name := range components(path) {
		if name == ".." || name == "." || name == "" {
			return false
		}
		if n = n.children[name]; n == nil || !n.isDir() {
			return false
		}
	}
	return path[len(path)-1] != '/'
}

// linkTarget resolves a hardlink's target: its directory through symlinks, its
// last component not, so that a symlink can have hardlinks.
func (t *layerTree) linkTarget(linkname string) (string, error) {
	i := strings.LastIndexByte(linkname, '/') + 1
	dir, err := t.resolve(linkname[:i])
	if err != nil {
		return "", err
	}
	path := dir
	switch name := linkname[i:]; name {
	case "", ".":
	case "..":
		if dir == "" {
			return "", invalid("it leads above the root")
		}
		path, _ = content.SplitPath(dir)
	default:
		path = join(dir, name)
	}
	return path, checkPath(path)
}

// entries returns the finished layer. The tree must not be used afterwards.
func (t *layerTree) entries() []*content.Entry {
	var out []*content.Entry
	var walk func(n *node, path string)
	walk = func(n *node, path string) {
		e := t.finish(n, path)
		out = append(out, e)
		for _, name := range slices.Sorted(maps.Keys(n.children)) {
			walk(n.children[name], join(e.Path, name))
		}
	}
	walk(t.root, "")
	return out
}

// finish makes the entry of one node. It must be called in the order of paths: the
// first path of an inode holds it, the others link to that one.
func (t *layerTree) finish(n *node, path string) *content.Entry {
	e := n.entry
	if e == nil {
		return &content.Entry{Path: path, Kind: content.Whiteout}
	}
	if n.hidden && e.Kind == content.Dir {
		// Hidden below, and here again: a directory of its own, not a merged one.
		e.Flags = e.Flags&^content.Implied | content.Opaque
	}
	if first, ok := t.shared[e]; ok {
		if first != "" {
			return &content.Entry{Path: path, Kind: content.Hardlink, Target: first}
		}
		t.shared[e] = path
		if e.Path != path {
			e.Path = path
		}
	}
	return e
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}
