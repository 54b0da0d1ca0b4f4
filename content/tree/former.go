package tree

import (
	"fmt"
	"os"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Format 2 had one timestamp for all pairs, 983948261, and a second payload, with that timestamp, for each .pyc whose
// source was in another layer. Apart from that its trees are read as those of today.
const formerVersion = 2

const (
	formerPycLone                       = content.PycPaired << 1
	formerPycCanonical protowire.Number = 17
)

// Former is a layer in a tree file of format 2.
type Former struct {
	Fidelity content.Fidelity
	// Entries that are PycPaired have the payload with the one timestamp. No entry has a flag that is not used any more.
	Entries []*content.Entry
	// Bytecode are the objects of all .pyc: chain images from then refer to them.
	Bytecode []content.ObjectID
}

// ReadFormer reads a tree file of format 2, and verifies it against its id. ok is false for one of today's format.
func ReadFormer(path string, id content.LayerID) (f Former, ok bool, err error) {
	file, err := os.ReadFile(path)
	if err != nil {
		return f, false, err
	}
	raw, err := verified(file, id)
	if err != nil {
		return f, false, err
	}
	var version uint64
	f.Fidelity, version, f.Entries, err = decodeVersion(func(field func(protowire.Number, uint64, []byte) error) error {
		return eachField(raw, field)
	})
	if err == nil && version != formerVersion && version != formatVersion {
		err = fmt.Errorf("%w: version %d", errMalformed, version)
	}
	if err != nil {
		return Former{}, false, fmt.Errorf("tree of layer %s: %w", id, err)
	}
	if version == formatVersion {
		return Former{}, false, nil
	}
	for _, e := range f.Entries {
		if strings.HasSuffix(e.Path, ".pyc") && !e.Object.IsZero() {
			f.Bytecode = append(f.Bytecode, e.Object)
		}
		if e.Flags&formerPycLone != 0 {
			e.PycTime = 0
		}
		e.Flags &^= formerPycLone
	}
	lone, err := formerCanonical(raw)
	if err != nil {
		return Former{}, false, fmt.Errorf("tree of layer %s: %w", id, err)
	}
	f.Bytecode = append(f.Bytecode, lone...)
	return f, true, nil
}

// formerCanonical returns the second payloads of a tree.
func formerCanonical(raw []byte) (ids []content.ObjectID, err error) {
	var objects []byte
	err = eachField(raw, func(n protowire.Number, _ uint64, b []byte) error {
		if n == treeObjects {
			objects = b
		}
		if n != treeEntry {
			return nil
		}
		return eachField(b, func(n protowire.Number, v uint64, _ []byte) error {
			if n != formerPycCanonical {
				return nil
			}
			var id content.ObjectID
			err := objectAt(&id, objects, v)
			ids = append(ids, id)
			return err
		})
	})
	return ids, err
}
