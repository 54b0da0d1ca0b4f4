package archive

import (
	"errors"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Memory is told of bytes before they are kept until the layer is whole, and refuses them with an error. It may wait.
// A nil Memory refuses nothing. It must be safe for concurrent use: a layer is decompressed and parsed side by side.
type Memory func(bytes int64) error

// ErrMemory is wrapped by what a Memory refuses with: the layer may be fine.
var ErrMemory = errors.New("out of the memory for layers")

// EntryCost is what an entry takes in memory beside twice its strings, attributes and inline data: itself, its place
// in its directory, what whoever takes payloads notes of it, and its node and inode when a chain is built.
// BenchmarkMemory in content/layer measures it.
const EntryCost = 640

// MemoryStep is how much is kept between two calls of a Memory.
const MemoryStep = 64 << 10

// keeper adds up what a reader keeps.
type keeper struct {
	memory Memory
	kept   int64 // that memory has not been told of
}

// entry counts an entry under a path of that length as its tree will have it: each path in full, whatever shares it
// here.
func (k *keeper) entry(path int, e *content.Entry) {
	encoded := int64(encodedRest + path + len(e.Target))
	if len(e.Path) != path {
		encoded += int64(len(e.Path)) // a hard link's target
	}
	for _, x := range e.Xattrs {
		encoded += int64(encodedRest + len(x.Name) + len(x.Value))
	}
	if e.Kind == content.Regular && e.Size <= content.InlineMax {
		encoded += e.Size
	}
	k.kept += EntryCost + 2*encoded
}

// encodedRest is about what an entry's numbers, or an attribute's lengths, take in a tree.
const encodedRest = 40

// tell tells memory of what has been counted, once it is worth a call.
func (k *keeper) tell() error {
	if k.memory == nil || k.kept < MemoryStep {
		return nil
	}
	kept := k.kept
	k.kept = 0
	return k.memory(kept)
}
