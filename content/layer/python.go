package layer

import (
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// settlePython decides for every timestamp .pyc of a layer (found) whether it is half of a
// pair that is valid in this layer, and has restore give back its exact bytes to each that is
// not. It returns, for exact fidelity, the canonical payloads of the pairs.
//
// A valid pair is a .pyc and the .py that it belongs to (content.PycSource), both regular
// files with one name each, where the .pyc recorded the source's mtime and size; the source may be a symlink
// to one beside it. A .pyc
// whose source is not in this layer may pair up with one in a layer below (tree.Merge).
func settlePython(f content.Fidelity, entries []*content.Entry, found map[*content.Entry]pyc, restore func(*content.Entry, pyc) error) (map[*content.Entry]content.Entry, error) {
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
		paired, lone := classify(e, p.header, entries, linked)
		if f == content.Exact {
			if paired {
				canonical[e] = exactPair(e, p)
			}
			continue
		}
		switch {
		case paired:
			e.Flags |= content.PycPaired
			e.PycTime = p.header.Mtime
		default:
			if err := restore(e, p); err != nil {
				return nil, err
			}
			if lone {
				e.Flags |= content.PycLone
				e.PycTime = p.header.Mtime
				e.PycCanonical = p.canonical
			}
		}
	}
	return canonical, nil
}

func classify(e *content.Entry, h content.PycHeader, entries []*content.Entry, linked map[string]bool) (paired, lone bool) {
	source, ok := content.PycSource(e.Path)
	if !ok || linked[e.Path] {
		return false, false
	}
	src := entryAt(entries, source)
	if src == nil {
		return false, true
	}
	if src.Kind == content.Symlink && !strings.Contains(src.Target, "/") {
		// The same source under another name beside it.
		dir, _ := content.SplitPath(source)
		source = strings.TrimPrefix(dir+"/"+src.Target, "/")
		if src = entryAt(entries, source); src == nil {
			return false, false
		}
	}
	return src.Kind == content.Regular && !linked[source] &&
		uint32(src.Mtime.Sec) == h.Mtime && uint32(src.Size) == h.Size, false
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

// exactPair is the payload of a paired .pyc as it would be with the canonical timestamp.
func exactPair(e *content.Entry, p pyc) content.Entry {
	if e.Data == nil {
		return content.Entry{Object: p.canonical}
	}
	data := slices.Clone(e.Data)
	content.SetPycTime(data, content.PycTime)
	return content.Entry{Data: data}
}

// restore gives an entry whose payload was stored with the canonical timestamp its exact bytes.
func (ss *session) restore(e *content.Entry, p pyc) error {
	if e.Data != nil {
		content.SetPycTime(e.Data, p.header.Mtime)
		return nil
	}
	buf, err := ss.objects.Read(e.Object)
	if err != nil {
		return err
	}
	content.SetPycTime(buf, p.header.Mtime)
	id := content.ObjectID{Sum: sha256.Sum256(buf)}
	added, err := ss.objects.Put(id, buf)
	if err != nil {
		return err
	}
	e.Object = id
	return ss.took(added)
}
