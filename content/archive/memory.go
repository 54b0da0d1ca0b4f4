package archive

import (
	"errors"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Memory is told of bytes before they are kept until the layer is whole, and refuses them with an error. It may wait. A nil
// Memory refuses nothing. It must be safe for concurrent use: a layer is decompressed and parsed side by side.
type Memory func(bytes int64) error

// ErrMemory is wrapped by what a Memory refuses with: the layer may be fine.
var ErrMemory = errors.New("out of the memory for layers")

// EntryCost is what an entry takes in memory beside its strings, attributes and inline data: itself, its place in its
// directory, and what whoever takes payloads notes of it. BenchmarkMemory in content/layer measures it.
const EntryCost = 512

// memoryStep is how much is kept between two calls of a Memory.
const memoryStep = 256 << 10

// keeper adds up what a reader keeps.
type keeper struct {
	memory Memory
	kept   int64 // that memory has not been told of
}

// entry counts an entry under a path of that length as its tree will have it: each path in full, whatever shares it here.
func (k *keeper) entry(path int, e *content.Entry) {
	k.kept += EntryCost + int64(path+len(e.Target))
	if len(e.Path) != path {
		k.kept += int64(len(e.Path)) // a hard link's target
	}
	for _, x := range e.Xattrs {
		k.kept += 64 + int64(len(x.Name)+len(x.Value))
	}
	if e.Kind == content.Regular && e.Size <= content.InlineMax {
		k.kept += e.Size
	}
}

// tell tells memory of what has been counted, once it is worth a call.
func (k *keeper) tell() error {
	if k.memory == nil || k.kept < memoryStep {
		return nil
	}
	kept := k.kept
	k.kept = 0
	return k.memory(kept)
}
