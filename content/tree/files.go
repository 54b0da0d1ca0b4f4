package tree

import (
	"fmt"
	"os"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// File is a regular file of a layer, without its metadata.
type File struct {
	Path []byte
	Size int64
	// As in content.Entry.
	Data   []byte
	Object content.ObjectID
}

// Files reads a tree file, verifies it against its id, and calls fn for each regular file in it: for reports over many
// layers, at a fraction of what Read takes. The file is the same variable in every call; what it points to is valid
// during the call, and must not be changed. An error of fn ends it and is returned as it is.
func Files(path string, id content.LayerID, fn func(*File) error) error {
	file, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	raw, err := verified(file, id)
	if err != nil {
		return err
	}
	var objects []byte
	var f File
	return eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch {
		case n == treeObjects:
			objects = b
		case n == treeVersion && v != formatVersion:
			return fmt.Errorf("tree of layer %s: %w: version %d, this build reads %d", id, errMalformed, v, formatVersion)
		case n == treeEntry:
			regular, err := f.decode(b, objects)
			if err != nil {
				return fmt.Errorf("tree of layer %s: %w", id, err)
			}
			if regular {
				return fn(&f)
			}
		}
		return nil
	})
}

// decode reads an entry; regular is false for one that is no regular file.
func (f *File) decode(raw, objects []byte) (regular bool, err error) {
	*f = File{}
	err = eachField(raw, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case entryPath:
			f.Path = b
		case entryKind:
			regular = content.Kind(v) == content.Regular
		case entrySize:
			f.Size = int64(v)
		case entryData:
			f.Data = b
		case entryObject:
			return objectAt(&f.Object, objects, v)
		}
		return nil
	})
	return regular, err
}
