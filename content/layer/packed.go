package layer

import "github.com/dedup-snapshotter/dedup-snapshotter/content/object"

// packed is what holds the layers' payloads: packs, and what merges them.
type packed struct {
	*durable
	objects   *object.Store
	compactor *object.Compactor
	buffers   buffers       // payloads on their way to the disk
	wake      chan struct{} // tells the keeper that packs have come or lost something
	reads     chan struct{} // tells it that mounted packs are about to be read
}
