package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// ImageRef is an image as containerd knows it: the committed snapshots that it keeps.
type ImageRef struct {
	Namespace string
	Chains    []content.ChainID
}

// Keeps tells whether a snapshot's name is of one that the image keeps, not of one below it.
func (r ImageRef) Keeps(name string) bool {
	namespace, _, _ := strings.Cut(name, "/")
	chain, ok := chainOfName(name)
	return ok && namespace == r.Namespace && slices.Contains(r.Chains, chain)
}

// ImageUsage is what an image means for the disk. Sizes are of objects, trees and chain images.
type ImageUsage struct {
	Layers  int
	Entries int64
	// Bytes are the sizes of its layers' regular files.
	Bytes int64
	// Stored is what it needs, Exclusive the part of it that no other image needs. Freed is what goes
	// when the image goes: the exclusive part without what a container, a view or a lease still keeps.
	Stored, Exclusive, Freed layer.Usage
	// Users are the containers' snapshots and views of it.
	Users int
}

// Images returns the usage of each image of refs, which have to be all there are: what none of them leads to counts
// as needed by somebody else. What others lead to is used like a container's files.
func (rep *reports) Images(ctx context.Context, refs, others []ImageRef) ([]ImageUsage, error) {
	all, err := rep.db.records(ctx)
	if err != nil {
		return nil, err
	}
	stored := all.graph(rep.chains.Name)
	sharing, err := rep.layers.Sharing(ctx)
	if err != nil {
		return nil, fmt.Errorf("read layers: %w", err)
	}
	r := imagesReport{graph: stored, sharing: sharing, images: make([]imageReport, len(refs))}
	for i, ref := range refs {
		r.images[i].chains, r.images[i].snapshots = ref.Chains, stored.of(ref)
		for _, n := range r.images[i].snapshots {
			n.images++
		}
	}
	for _, ref := range others {
		for _, n := range stored.of(ref) {
			n.used = true
		}
	}
	stored.markOthers()
	r.layersOf()
	r.addObjects()
	r.addTrees()
	r.addChains(rep.chains.Images.Size)
	out := make([]ImageUsage, len(refs))
	for i := range r.images {
		out[i] = r.images[i].usage
	}
	return out, nil
}

// markOthers finds what would stay without any image.
func (g *snapshotGraph) markOthers() {
	for _, n := range g.nodes {
		switch {
		case n.kind != snapshots.KindCommitted:
			if n.parent != nil {
				n.parent.users++
			}
			for p := n.parent; p != nil && !p.used; p = p.parent {
				p.used = true
			}
		case n.images == 0:
			for p := n; p != nil && !p.foreign; p = p.parent {
				p.foreign = true
			}
		}
	}
}

// alone tells whether one image alone keeps a snapshot.
func (n *snapshotNode) alone() bool { return n.images == 1 && !n.foreign }

// imagesReport adds up what belongs to which image.
type imagesReport struct {
	graph   *snapshotGraph
	sharing *layer.Sharing
	images  []imageReport
	// By index of a layer in sharing: the images that have it, and the one to which it belongs alone, -1 for
	// none, with (exclusive) and without (freed) what containers use.
	having           [][]int
	exclusive, freed []int
}

type imageReport struct {
	chains    []content.ChainID
	snapshots []*snapshotNode
	usage     ImageUsage
}

func (r *imagesReport) layersOf() {
	index := map[content.LayerID]int{}
	for i, l := range r.sharing.Layers {
		index[l.ID] = i
	}
	r.having = make([][]int, len(index))
	r.exclusive = slices.Repeat([]int{-1}, len(index))
	r.freed = slices.Repeat([]int{-1}, len(index))
	for i := range r.images {
		img := &r.images[i]
		all, alone, gone := map[int]int{}, map[int]int{}, map[int]int{}
		for _, n := range img.snapshots {
			if slices.Contains(img.chains, n.place.chain) {
				img.usage.Users += n.users
			}
			l, ok := index[n.layer]
			if !ok {
				continue
			}
			all[l]++
			if n.alone() {
				alone[l]++
				if !n.used {
					gone[l]++
				}
			}
		}
		for l, n := range all {
			r.having[l] = append(r.having[l], i)
			img.usage.Layers += n
			img.usage.Entries += r.sharing.Layers[l].Entries * int64(n)
			img.usage.Bytes += r.sharing.Layers[l].Bytes * int64(n)
			if alone[l] == r.sharing.Layers[l].Holds {
				r.exclusive[l] = i
			}
			if gone[l] == r.sharing.Layers[l].Holds {
				r.freed[l] = i
			}
		}
	}
}

// addObjects counts each object where the layers that name it are: it goes with the last of them.
func (r *imagesReport) addObjects() {
	counted := make([]int, len(r.images)) // which set an image has been counted for
	set := 0
	r.sharing.Each(func(layers []int, u layer.Usage) {
		set++
		exclusive, freed := r.exclusive[layers[0]], r.freed[layers[0]]
		for _, l := range layers {
			if r.exclusive[l] != exclusive {
				exclusive = -1
			}
			if r.freed[l] != freed {
				freed = -1
			}
			for _, i := range r.having[l] {
				if counted[i] != set {
					counted[i] = set
					add(&r.images[i].usage.Stored, u)
				}
			}
		}
		r.addOwned(exclusive, freed, u)
	})
}

func (r *imagesReport) addOwned(exclusive, freed int, u layer.Usage) {
	if exclusive >= 0 {
		add(&r.images[exclusive].usage.Exclusive, u)
	}
	if freed >= 0 {
		add(&r.images[freed].usage.Freed, u)
	}
}

func (r *imagesReport) addTrees() {
	for l, listed := range r.sharing.Layers {
		u := layer.Usage{Bytes: listed.File, Inodes: 1}
		for _, i := range r.having[l] {
			add(&r.images[i].usage.Stored, u)
		}
		r.addOwned(r.exclusive[l], r.freed[l], u)
	}
}

// addChains counts chain images: one goes with the last snapshot that has its layers.
func (r *imagesReport) addChains(size func(lower.Name) (int64, bool)) {
	type owner struct{ exclusive, freed int }
	owners := map[lower.Name]owner{}
	for i := range r.images {
		own := map[lower.Name]bool{}
		for _, n := range r.images[i].snapshots {
			for _, name := range n.names() {
				if bytes, ok := size(name); ok && n.whole && !own[name] {
					own[name] = true
					owners[name] = owner{i, i}
					add(&r.images[i].usage.Stored, layer.Usage{Bytes: bytes, Inodes: 1})
				}
			}
		}
	}
	for _, n := range r.graph.nodes {
		for _, name := range n.names() {
			o, ok := owners[name]
			if !ok || n.kind != snapshots.KindCommitted {
				continue
			}
			if !n.alone() {
				o.exclusive = -1
			}
			if !n.alone() || n.used {
				o.freed = -1
			}
			owners[name] = o
		}
	}
	// Two images with one chain each have a snapshot of it, in different namespaces.
	for i := range r.images {
		for _, n := range r.images[i].snapshots {
			for _, name := range n.names() {
				o, ok := owners[name]
				if !ok || !n.alone() {
					continue
				}
				if o.exclusive != i {
					o.exclusive = -1
				}
				if o.freed != i {
					o.freed = -1
				}
				owners[name] = o
			}
		}
	}
	for name, o := range owners {
		bytes, _ := size(name)
		r.addOwned(o.exclusive, o.freed, layer.Usage{Bytes: bytes, Inodes: 1})
	}
}

func add(to *layer.Usage, u layer.Usage) {
	to.Bytes += u.Bytes
	to.Inodes += u.Inodes
}
