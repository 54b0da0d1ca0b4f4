package tree

import (
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// resolvePython decides which timestamp each Python source of the merged tree shows.
//
// A PycPaired .pyc carries the canonical timestamp, so it is valid for Python
// exactly when its source shows that timestamp too. The source shows it when
// a paired .pyc was compiled from it (PycTime is the mtime that the image gave the
// source), and its image mtime otherwise. That keeps what crosses layers right:
//
//   - A source replaced above its pair has another mtime than the .pyc recorded, or a
//     pair of its own. If both a fresh and a stale pair hang on one source, it shows its image mtime:
//     Python then recompiles, but never runs the stale one.
//
//   - A source that replaces another and by chance has the canonical timestamp shows the second after.
//
//   - A PycLone (compiled in a layer above its source) was compiled against the
//     image mtime: it is shown with its canonical payload when the source shows the canonical
//     timestamp, and as it is when not.
//
//   - A .pyc that was compiled in a container of ours has recorded the canonical
//     timestamp itself. It counts as stale when its source came in a later layer.
//
//   - A symlink to a source beside it is that source under another name. Where a symlink from elsewhere
//     has bytecode of its own, the source keeps its image mtime, which that bytecode recorded.
//
// Sources with several hard links keep their image mtime, since the other names'
// bytecode could disagree.
func (m *merger) resolvePython() {
	m.pinned = map[*content.Entry]bool{}
	m.pinLinked(m.root, "")
	m.pythonDir(m.root)
}

// pinLinked finds the sources that bytecode of a symlink depends on which is not settled with the source's own.
func (m *merger) pinLinked(dir *Node, path string) {
	for _, c := range dir.Children {
		at := path + "/" + c.Name
		switch {
		case c.Entry.Kind == content.Dir:
			m.pinLinked(c, at)
		case c.Entry.Kind == content.Symlink && strings.HasSuffix(c.Name, ".py"):
			bytecode := m.bytecodeOf(dir, c.Name)
			settled := !slices.ContainsFunc(bytecode, func(b *Node) bool {
				return b.Entry.Flags&(content.PycPaired|content.PycLone) == 0
			})
			if len(bytecode) == 0 || settled && source(dir, c.Name) != nil {
				continue
			}
			if src := m.resolve(at); src != nil {
				m.pinned[src.Entry] = true
			}
		}
	}
}

// bytecodeOf returns the compiled files that belong to a source of a directory.
func (m *merger) bytecodeOf(dir *Node, name string) (found []*Node) {
	stem := strings.TrimSuffix(name, "py") // "module."
	for _, holder := range []struct {
		dir    *Node
		prefix string
	}{{dir, ""}, {dir.child("__pycache__"), "__pycache__/"}} {
		if holder.dir == nil {
			continue
		}
		for _, c := range holder.dir.prefixed(stem) {
			m.steps++
			if src, ok := content.PycSource(holder.prefix + c.Name); ok && src == name {
				found = append(found, c)
			}
		}
	}
	return found
}

// source returns the regular file that a source of a directory is, by itself or as a symlink to one beside it.
func source(dir *Node, name string) *Node {
	n := dir.child(name)
	if n != nil && n.Entry.Kind == content.Symlink && !strings.Contains(n.Entry.Target, "/") {
		n = dir.child(n.Entry.Target)
	}
	if n == nil || n.Entry.Kind != content.Regular {
		return nil
	}
	return n
}

func (m *merger) pythonDir(dir *Node) {
	cache := dir.child("__pycache__")
	var paired bool
	for _, holder := range []*Node{dir, cache} {
		if holder == nil {
			continue
		}
		for _, c := range holder.Children {
			paired = paired || c.Entry.Flags&content.PycPaired != 0
		}
	}
	if paired {
		m.pythonSources(dir, cache)
	}
	for _, c := range dir.Children {
		if c.Entry.Kind == content.Dir {
			m.pythonDir(c)
		}
	}
}

// pythonSources handles the sources of one directory that has paired bytecode.
func (m *merger) pythonSources(dir, cache *Node) {
	type compiled struct{ fresh, stale, lone []*Node }
	bySource := map[*Node]*compiled{}
	collect := func(holder *Node, prefix string) {
		if holder == nil {
			return
		}
		for _, c := range holder.Children {
			if c.Entry.Flags&(content.PycPaired|content.PycLone) == 0 {
				continue
			}
			name, ok := content.PycSource(prefix + c.Name)
			if !ok {
				continue
			}
			src := source(dir, name)
			if src == nil {
				continue
			}
			k := bySource[src]
			if k == nil {
				k = &compiled{}
				bySource[src] = k
			}
			fresh := c.Entry.PycTime == uint32(src.Entry.Mtime.Sec)
			switch {
			case c.Entry.Flags&content.PycPaired != 0 && fresh:
				k.fresh = append(k.fresh, c)
			case c.Entry.Flags&content.PycPaired != 0,
				c.Entry.PycTime == content.PycTime && c.layer < src.layer:
				k.stale = append(k.stale, c)
			case fresh:
				k.lone = append(k.lone, c)
			}
		}
	}
	collect(dir, "")
	collect(cache, "__pycache__/")
	for src, k := range bySource {
		if len(k.stale) > 0 && uint32(src.Entry.Mtime.Sec) == content.PycTime {
			m.avoidCanonicalTime(src)
		}
		if len(k.fresh) == 0 || len(k.stale) > 0 || m.shared[src.Entry] || m.pinned[src.Entry] {
			continue
		}
		shown := *src.Entry
		shown.Mtime = content.Time{Sec: content.PycTime}
		src.Entry = &shown
		for _, c := range k.lone {
			c.Entry = canonicalLone(c.Entry)
		}
	}
}

// avoidCanonicalTime lets a source that really has the canonical timestamp show the next second: the
// stale bytecode beside it carries the canonical one, and Python would run it.
func (m *merger) avoidCanonicalTime(src *Node) {
	if m.shared[src.Entry] { // all names have to show the same
		src.Entry.Mtime.Sec++
		return
	}
	shown := *src.Entry
	shown.Mtime.Sec++
	src.Entry = &shown
}

func canonicalLone(e *content.Entry) *content.Entry {
	c := *e
	if len(e.Data) >= content.PycHeaderLen {
		c.Data = slices.Clone(e.Data)
		content.SetPycTime(c.Data, content.PycTime)
	} else {
		c.Object = e.PycCanonical
	}
	return &c
}
