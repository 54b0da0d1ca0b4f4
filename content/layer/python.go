package layer

import (
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// pyc is what is known of an entry that looks like a timestamp .pyc.
type pyc struct {
	// header is the image's.
	header content.PycHeader
	// stamp is the source mtime that the stored payload carries. Under content.Exact that is always the image's, and
	// canonical is the id of the payload with stamp; it is zero for one with inline Data.
	stamp     uint32
	canonical content.ObjectID
}

// restamp names the payload of an entry with another source mtime in its header, and stores it unless the fidelity is
// exact.
type restamp func(e *content.Entry, p pyc, stamp uint32) (content.ObjectID, error)

// settlePython decides for every timestamp .pyc of a layer (found) whether it is half of a pair that is valid in this
// layer, and sees to it that its payload carries its source's SourceTime, or the image's timestamp when it is not. It
// returns, for exact fidelity, the payloads that the pairs would have.
//
// A valid pair is a .pyc and the .py that it belongs to (content.PycSource), both regular files with one name each,
// where the .pyc recorded the source's mtime and size. The source may be a symlink to another file of the layer.
// Nothing that another layer has counts, so what a layer shows does not depend on what is below it, and changes with
// nothing that comes above.
func settlePython(
	f content.Fidelity, entries []*content.Entry, found map[*content.Entry]pyc, restamp restamp,
) (map[*content.Entry]content.Entry, error) {
	if len(found) == 0 {
		return nil, nil
	}
	linked := map[string]bool{}
	for _, e := range entries {
		if e.Kind == content.Hardlink {
			linked[e.Target] = true
		}
	}
	canonical := map[*content.Entry]content.Entry{}
	for _, e := range entries {
		p, ok := found[e]
		if !ok {
			continue
		}
		stamp, source := p.header.Mtime, pairOf(e, p.header, entries, linked)
		if source != nil {
			stamp = source.SourceTime()
		}
		if f == content.Exact {
			if source == nil {
				continue
			}
			c, err := exactPair(e, p, stamp, restamp)
			if err != nil {
				return nil, err
			}
			canonical[e] = c
			continue
		}
		if source != nil {
			source.Flags |= content.PySource
			e.Flags |= content.PycPaired
			e.PycTime = p.header.Mtime
		}
		if p.stamp == stamp {
			continue
		}
		if e.Data != nil {
			content.SetPycTime(e.Data, stamp)
			continue
		}
		var err error
		if e.Object, err = restamp(e, p, stamp); err != nil {
			return nil, err
		}
	}
	return canonical, nil
}

// pairOf returns the source that a .pyc is valid for, or nil.
func pairOf(e *content.Entry, h content.PycHeader, entries []*content.Entry, linked map[string]bool) *content.Entry {
	path, ok := content.PycSource(e.Path)
	if !ok || linked[e.Path] {
		return nil
	}
	source := follow(entries, path)
	if source == nil || source.Kind != content.Regular || linked[source.Path] ||
		uint32(source.Mtime.Sec) != h.Mtime || uint32(source.Size) != h.Size {
		return nil
	}
	return source
}

// maxSymlinks is the kernel's limit for one path walk.
const maxSymlinks = 40

// follow finds what a path leads to inside a layer, through symlinks and never out of the root, or returns nil. What a
// layer has is what a container sees of it, whatever is below.
func follow(entries []*content.Entry, path string) *content.Entry {
	if e := entryAt(entries, path); e == nil || e.Kind == content.Regular {
		return e // nearly always
	}
	var at *content.Entry
	todo, dir := strings.Split(path, "/"), ""
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			dir, _ = content.SplitPath(dir)
			continue
		}
		if at = entryAt(entries, strings.TrimPrefix(dir+"/"+name, "/")); at == nil {
			return nil
		}
		switch at.Kind {
		case content.Dir:
			dir = at.Path
		case content.Symlink:
			if links++; links > maxSymlinks {
				return nil
			}
			if strings.HasPrefix(at.Target, "/") {
				dir = ""
			}
			todo = append(strings.Split(at.Target, "/"), todo...)
		default:
			if len(todo) > 0 {
				return nil
			}
		}
	}
	return at
}

// entryAt finds an entry by its path, or returns nil.
func entryAt(entries []*content.Entry, path string) *content.Entry {
	i, found := slices.BinarySearchFunc(entries, path, func(e *content.Entry, path string) int {
		return content.ComparePaths(e.Path, path)
	})
	if !found {
		return nil
	}
	return entries[i]
}

// exactPair is the payload of a paired .pyc as it would be with its source's timestamp.
func exactPair(e *content.Entry, p pyc, stamp uint32, restamp restamp) (content.Entry, error) {
	if e.Data != nil {
		data := slices.Clone(e.Data)
		content.SetPycTime(data, stamp)
		return content.Entry{Data: data}, nil
	}
	if p.stamp == stamp {
		return content.Entry{Object: p.canonical}, nil
	}
	id, err := restamp(e, p, stamp)
	return content.Entry{Object: id}, err
}
