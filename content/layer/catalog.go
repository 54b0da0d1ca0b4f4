package layer

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// catalog is what is in memory of the layers: it is read from the trees' headers at Open, and finds layers by whatever
// names them.
type catalog struct {
	fidelity content.Fidelity // under which layers are looked up

	mu       sync.RWMutex // guards what follows, and renames and unlinks in layers/
	layers   map[content.LayerID]*state
	diffs    map[diffKey]content.LayerID
	blobs    map[blobKey]tree.Tar
	payloads map[content.PayloadDigest][]content.LayerID
	// trees is what the tree files occupy, weight the sum of all layers'.
	trees  Usage
	weight int64
	// claimed is what the claims of all layers add up to.
	claimed Usage
	// fresh is what fresh layers have added to the disk.
	fresh Usage
	// damaged is how many layers are out of service.
	damaged int
	recipes recipeIndex
}

// show lets a layer be found. Under mu.
func (c *catalog) show(id content.LayerID, st *state) {
	c.payloads[st.facts.Payload] = append(c.payloads[st.facts.Payload], id)
	for _, t := range st.facts.Tars {
		c.insertTar(id, t)
	}
}

// hide is the reverse of show. Under mu.
func (c *catalog) hide(id content.LayerID, st *state) {
	for _, t := range st.facts.Tars {
		key := diffKey{t.Fidelity, t.DiffID}
		if c.diffs[key] != id {
			continue // came in again as another layer meanwhile
		}
		delete(c.diffs, key)
		for _, b := range t.Blobs {
			delete(c.blobs, blobKey{t.Fidelity, b})
		}
	}
	same := slices.DeleteFunc(slices.Clone(c.payloads[st.facts.Payload]), func(o content.LayerID) bool { return o == id })
	if c.payloads[st.facts.Payload] = same; len(same) == 0 {
		delete(c.payloads, st.facts.Payload)
	}
}

func (c *catalog) insertTar(id content.LayerID, t tree.Tar) {
	c.diffs[diffKey{t.Fidelity, t.DiffID}] = id
	for _, b := range t.Blobs {
		c.blobs[blobKey{t.Fidelity, b}] = t
	}
}

// forget takes a layer out of the store, but for its claim. Under mu.
func (c *catalog) forget(id content.LayerID, st *state) {
	if st.damage != nil {
		c.damaged--
	} else {
		c.hide(id, st)
	}
	delete(c.layers, id)
	c.countFresh(st, -1)
	c.weight -= st.weight()
	c.setFile(st, 0)
}

func (c *catalog) uncounted() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, st := range c.layers {
		if !st.counted {
			return true
		}
	}
	return false
}

// Lookup finds the layer of a diffID under the store's fidelity and holds it.
func (c *catalog) Lookup(d content.DiffID) (content.LayerID, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok := c.diffs[diffKey{c.fidelity, d}]
	if ok {
		c.layers[id].hold()
	}
	return id, ok
}

// Infer finds the known diffID for which parent.Chain(diffID) == chain.
func (c *catalog) Infer(parent, chain content.ChainID) (content.DiffID, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if parent.IsZero() {
		d := content.DiffID(chain)
		_, ok := c.diffs[diffKey{c.fidelity, d}]
		return d, ok
	}
	leads := parent.Leads(chain)
	for k := range c.diffs {
		if k.fidelity == c.fidelity && leads(k.diffID) {
			return k.diffID, true
		}
	}
	return content.DiffID{}, false
}

// LookupBlob finds the layer of a blob that was ingested under the store's fidelity and holds it.
func (c *catalog) LookupBlob(blob digest.Digest) (Ingested, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, ok := c.blobs[blobKey{c.fidelity, blob}]
	if !ok {
		return Ingested{}, false
	}
	id, ok := c.diffs[diffKey{t.Fidelity, t.DiffID}]
	if !ok {
		return Ingested{}, false
	}
	c.layers[id].hold()
	return Ingested{Layer: id, DiffID: t.DiffID, TarSize: t.Size}, true
}

// Hold adds a hold to a layer that the caller already holds.
func (c *catalog) Hold(id content.LayerID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.layers[id]; st != nil {
		st.hold()
	}
}

// Taken returns how often a layer has been held since it came in or the store was opened, 0 for one
// that is not there. Who has held it from the start learns that somebody else has taken it up.
func (c *catalog) Taken(id content.LayerID) int {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if st := c.layers[id]; st != nil {
		return st.taken
	}
	return 0
}

// TakeAhead reports whether a layer was ingested ahead of its turn (Blob.Ahead) and has not been asked about before:
// whoever uses it first is the one that it was ingested for.
func (c *catalog) TakeAhead(id content.LayerID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.layers[id]
	if st == nil || !st.ahead {
		return false
	}
	st.ahead = false
	return true
}

// List returns all layers, sorted by id. The holds are a look at one moment, and
// nothing is held for the caller.
func (c *catalog) List() []Listed {
	c.mu.RLock()
	list := make([]Listed, 0, len(c.layers))
	for id, st := range c.layers {
		l := Listed{Holds: st.holds, File: st.file, Facts: Facts{
			ID:       id,
			Fidelity: st.facts.Fidelity,
			Payload:  st.facts.Payload,
			Entries:  st.facts.Entries,
			Bytes:    st.facts.Bytes,
			Usage:    Usage{Bytes: st.facts.UsedBytes, Inodes: st.facts.UsedInodes},
		}}
		for _, t := range st.facts.Tars {
			// One tar stands there once for every fidelity it came in under.
			if !slices.Contains(l.DiffIDs, t.DiffID) {
				l.DiffIDs = append(l.DiffIDs, t.DiffID)
			}
		}
		list = append(list, l)
	}
	c.mu.RUnlock()
	slices.SortFunc(list, func(a, b Listed) int { return bytes.Compare(a.ID.Sum[:], b.ID.Sum[:]) })
	return list
}

// Facts returns what is known of a layer.
func (c *catalog) Facts(id content.LayerID) (Facts, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	st := c.layers[id]
	if st == nil {
		return Facts{}, fmt.Errorf("layer %s: %w", id, fs.ErrNotExist)
	}
	f := Facts{
		ID:       id,
		Fidelity: st.facts.Fidelity,
		Payload:  st.facts.Payload,
		Entries:  st.facts.Entries,
		Bytes:    st.facts.Bytes,
		Usage:    Usage{Bytes: st.facts.UsedBytes, Inodes: st.facts.UsedInodes},
	}
	for _, t := range st.facts.Tars {
		f.DiffIDs = append(f.DiffIDs, t.DiffID)
	}
	return f, nil
}

// Entries is how many entries the layers of a chain have.
func (c *catalog) Entries(chain []content.LayerID) (sum int64) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, id := range chain {
		if st := c.layers[id]; st != nil {
			sum += st.facts.Entries
		}
	}
	return sum
}

// Blobs returns the digests of the blobs that a layer was ingested from.
func (c *catalog) Blobs(id content.LayerID) (blobs []digest.Digest) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if st := c.layers[id]; st != nil {
		for _, t := range st.facts.Tars {
			blobs = append(blobs, t.Blobs...)
		}
	}
	return blobs
}

// InService returns an error that wraps ErrDamaged for the first layer that is damaged.
func (c *catalog) InService(chain ...content.LayerID) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, id := range chain {
		switch st := c.layers[id]; {
		case st == nil:
			return fmt.Errorf("layer %s: %w", id, fs.ErrNotExist)
		case st.damage != nil:
			return fmt.Errorf("%w: %s: %w (`dedupctl fsck --repair` repairs what it can; otherwise remove the image "+
				"and pull it again)", ErrDamaged, id, *st.damage)
		}
	}
	return nil
}

// Damaged returns the layers that are out of service, and why.
func (c *catalog) Damaged() map[content.LayerID]Damage {
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := map[content.LayerID]Damage{}
	for id, st := range c.layers {
		if st.damage != nil {
			out[id] = *st.damage
		}
	}
	return out
}

func (c *catalog) harmLocked(ctx context.Context, id content.LayerID, d Damage) (changed bool) {
	st := c.layers[id]
	if st == nil {
		return false // removed meanwhile
	}
	if st.damage == nil {
		c.hide(id, st)
		c.damaged++
		log.G(ctx).WithError(d).Errorf("layer %s is damaged and out of service", id)
		st.damage = &d
		return true
	}
	merged := *st.damage
	if merged.Tree == nil {
		merged.Tree = d.Tree
	}
	for _, o := range d.Objects {
		if !slices.Contains(merged.Objects, o) {
			merged.Objects = append(merged.Objects[:len(merged.Objects):len(merged.Objects)], o)
		}
	}
	changed = (merged.Tree != nil) != (st.damage.Tree != nil) || len(merged.Objects) != len(st.damage.Objects)
	st.damage = &merged
	return changed
}

// setFile notes the size of a layer's tree file, 0 for one that is gone. Under mu.
func (c *catalog) setFile(st *state, size int64) {
	for _, sign := range []int64{-1, 1} {
		if sign > 0 {
			st.file = content.Blocks(size)
		}
		if st.file > 0 {
			c.trees.Bytes += sign * st.file
			c.trees.Inodes += sign
		}
	}
}

// Reclaim restores what Claim returned in an earlier process.
func (c *catalog) Reclaim(id content.LayerID, u Usage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setClaim(id, u)
}

func (c *catalog) setClaim(id content.LayerID, u Usage) bool {
	st := c.layers[id]
	if st == nil || st.claimed != nil {
		return false
	}
	c.countFresh(st, -1)
	st.claimed, st.fresh = &u, false
	c.claimed.Bytes += u.Bytes
	c.claimed.Inodes += u.Inodes
	return true
}

// Unclaim gives a claim up.
func (c *catalog) Unclaim(id content.LayerID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.layers[id]; st != nil {
		c.unclaim(st)
	}
}

// unclaim is Unclaim under mu.
func (c *catalog) unclaim(st *state) {
	if st.claimed != nil {
		c.claimed.Bytes -= st.claimed.Bytes
		c.claimed.Inodes -= st.claimed.Inodes
		st.claimed = nil
	}
}

// countFresh counts a layer among the fresh ones, or takes it out, if it is one. Under mu.
func (c *catalog) countFresh(st *state, sign int64) {
	if st.fresh {
		c.fresh.Bytes += sign * st.facts.UsedBytes
		c.fresh.Inodes += sign * st.facts.UsedInodes
	}
}
