package tree

import (
	"context"
	"errors"
	"fmt"
	"os"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrUnfit is wrapped where a layer cannot lie on the layers below it. Of all that Merge refuses it is what a single
// layer does not show: its hard links into lower layers.
var ErrUnfit = errors.New("layer does not fit the layers below it")

func noTarget(link, target string) error {
	return fmt.Errorf("%w: hard link %q names %q, which no layer below has", ErrUnfit, link, target)
}

func targetIsDir(link, target string) error {
	return fmt.Errorf("%w: hard link %q names %q, which is a directory", ErrUnfit, link, target)
}

// Below is what of a layer depends on the layers below it.
type Below struct {
	Links int64 // LowerLinks
	// Xattrs is what they add to the xattrs of one inode at most, in bytes.
	Xattrs int64
}

// BelowOf counts a layer's LowerLinks.
func BelowOf(entries []*content.Entry) (b Below) {
	largest := map[string]int64{} // each name is on an inode once
	for _, e := range entries {
		if e.Kind != content.LowerLink {
			continue
		}
		b.Links++
		for _, x := range e.Xattrs {
			largest[x.Name] = max(largest[x.Name], content.XattrSize(x))
		}
	}
	for _, n := range largest {
		b.Xattrs += n
	}
	return b
}

// Link is a LowerLink.
type Link struct{ Path, Target string }

// Links reads a layer's LowerLinks from its tree file.
func Links(path string, id content.LayerID) (links []Link, err error) {
	err = names(path, id, func(n *name) error {
		if n.kind == content.LowerLink {
			links = append(links, Link{string(n.path), string(n.target)})
		}
		return nil
	})
	return links, err
}

// EachName calls fn for each entry of a layer, in order, without decoding more of its tree file than it is told.
func EachName(path string, id content.LayerID, fn func(path string, kind content.Kind, flags content.Flags)) error {
	return names(path, id, func(n *name) error {
		fn(string(n.path), n.kind, n.flags)
		return nil
	})
}

// CheckLinks returns an error that wraps ErrUnfit when a target is not there, or is a directory, in the layers below,
// the topmost first, whose tree files open names. It reads no more of them than it takes to tell, and merges nothing.
func CheckLinks(ctx context.Context, links []Link, below []content.LayerID, open func(content.LayerID) string) error {
	for _, id := range below {
		if len(links) == 0 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		said := newSaid(links)
		if err := names(open(id), id, said.note); err != nil {
			return err
		}
		var open []Link
		for _, l := range links {
			switch there, err := said.of(l); {
			case err != nil:
				return err
			case !there:
				open = append(open, l)
			}
		}
		links = open
	}
	if len(links) > 0 {
		return noTarget(links[0].Path, links[0].Target)
	}
	return nil
}

// said is what one layer says of the targets of links, and of the directories on the way there.
type said map[string]*name

func newSaid(links []Link) said {
	s := said{"": nil}
	for _, l := range links {
		for path := l.Target; path != ""; path, _ = content.SplitPath(path) {
			if _, ok := s[path]; ok {
				break
			}
			s[path] = nil
		}
	}
	return s
}

func (s said) note(n *name) error {
	if _, ok := s[string(n.path)]; ok {
		s[string(n.path)] = &name{kind: n.kind, flags: n.flags}
	}
	return nil
}

// of tells whether the layer has a link's target; neither that nor an error means that the layers below it have to
// say.
func (s said) of(l Link) (there bool, err error) {
	if n := s[l.Target]; n != nil {
		switch n.kind {
		case content.Whiteout:
			return false, noTarget(l.Path, l.Target)
		case content.Dir:
			return false, targetIsDir(l.Path, l.Target)
		}
		return true, nil
	}
	for dir := l.Target; dir != ""; {
		dir, _ = content.SplitPath(dir)
		if n := s[dir]; n != nil && (n.kind != content.Dir || n.flags&content.Opaque != 0) {
			return false, noTarget(l.Path, l.Target)
		}
	}
	return false, nil
}

// name is an entry without its metadata and its payload.
type name struct {
	path, target []byte
	kind         content.Kind
	flags        content.Flags
}

// names is Files for the names of all entries.
func names(path string, id content.LayerID, fn func(*name) error) error {
	file, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	raw, err := verified(file, id)
	if err != nil {
		return err
	}
	return eachField(raw, func(n protowire.Number, _ uint64, b []byte) error {
		if n != treeEntry {
			return nil
		}
		var e name
		err := eachField(b, func(n protowire.Number, v uint64, b []byte) error {
			switch n {
			case entryPath:
				e.path = b
			case entryKind:
				e.kind = content.Kind(v)
			case entryFlags:
				e.flags = content.Flags(v)
			case entryTarget:
				e.target = b
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("tree of layer %s: %w", id, err)
		}
		return fn(&e)
	})
}
