package forecast

import (
	"crypto/sha256"
	"maps"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// identity names a payload, also one that lies inline in the tree.
func identity(e *content.Entry) (id content.ObjectID) {
	if !e.Object.IsZero() {
		return e.Object
	}
	return content.ObjectID{Sum: sha256.Sum256(e.Data)}
}

// folder is one directory with the duplicates in all that is below it.
type folder struct {
	files, bytes int64
	children     map[string]*folder
}

func (f *folder) add(path string, files, bytes int64) {
	f.files, f.bytes = f.files+files, f.bytes+bytes
	name, rest, below := strings.Cut(path, "/")
	if !below {
		return
	}
	if f.children == nil {
		f.children = map[string]*folder{}
	}
	c := f.children[name]
	if c == nil {
		c = &folder{}
		f.children[name] = c
	}
	c.add(rest, files, bytes)
}

// collections are directories that a person thinks of as one thing, whatever is the largest part of it.
var collections = map[string]bool{
	"site-packages": true, "dist-packages": true, "node_modules": true, "gems": true, "jars": true,
}

// report returns the prefixes with at least so many bytes: the children that have as much, and then the folder itself
// without them, if enough is left.
func (f *folder) report(path string, least int64) (out []Prefix) {
	if f.bytes < least {
		return nil
	}
	rest := Prefix{Path: path, Bytes: f.bytes, Files: f.files}
	holdsPackages := collections[path[strings.LastIndexByte(path, '/')+1:]]
	for _, name := range slices.Sorted(maps.Keys(f.children)) {
		c := f.children[name]
		if holdsPackages {
			rest.Parts = append(rest.Parts, Prefix{Path: name, Bytes: c.bytes, Files: c.files})
			continue
		}
		// What is too small to be named below is the child's, and not ours.
		if below := c.report(strings.TrimPrefix(path+"/"+name, "/"), least); len(below) > 0 {
			out = append(out, below...)
			rest.Bytes -= c.bytes
			rest.Files -= c.files
			rest.Rest = true
		}
	}
	rest.Parts = largest(rest.Parts, parts)
	if rest.Bytes >= least {
		out = append(out, rest)
	}
	return out
}
