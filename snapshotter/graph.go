package snapshotter

import (
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// snapshotNode is a stored snapshot.
type snapshotNode struct {
	id     string
	parent *snapshotNode
	orphan bool // its parent is not there, or its record is damaged
	kind   snapshots.Kind
	place  chainPlace
	// layer is zero when the directory is not yet ingested: the snapshot is pending.
	layer content.LayerID
	// chain and mapped name the chain images of a committed one's layers.
	chain, mapped lower.Name
	whole         bool // it has a chain: none of its layers is pending
	images        int  // how many images lead to it
	// foreign: something that is no image needs it. used: a container, a view or a lease keeps it.
	foreign, used bool
	// users are the containers and views directly on it.
	users int
	// over are the ids of the steps that a container or a view lies over, above a chain image.
	over []string
	// flavour is that of the chain image that a container or a view lies on.
	flavour lower.Flavour
}

type chainPlace struct {
	namespace string
	chain     content.ChainID
}

// snapshotGraph is what metadata.db says of snapshots whose records are whole.
type snapshotGraph struct {
	nodes   []*snapshotNode
	byPlace map[chainPlace][]*snapshotNode
}

// graph links the snapshots with each other, and with their chain images.
func (r records) graph(name func([]content.LayerID, lower.Flavour) lower.Name) *snapshotGraph {
	g := &snapshotGraph{byPlace: map[chainPlace][]*snapshotNode{}}
	byName := map[string]*snapshotNode{}
	parents := map[*snapshotNode]string{}
	for _, sn := range r.whole {
		n := &snapshotNode{id: sn.id, kind: sn.Kind, flavour: flavourOf(sn.Info), over: overOf(sn.Info)}
		n.layer, _ = layerOf(sn.Info)
		if chain, ok := chainOfName(sn.Name); ok && n.kind == snapshots.KindCommitted {
			n.place = chainPlace{sn.Labels[labelNamespace], chain}
			g.byPlace[n.place] = append(g.byPlace[n.place], n)
		}
		g.nodes = append(g.nodes, n)
		byName[sn.Name], parents[n] = n, sn.Parent
	}
	for n, parent := range parents {
		n.parent = byName[parent]
		n.orphan = n.parent == nil && parent != ""
	}
	for _, n := range g.nodes {
		n.setChain(name)
	}
	return g
}

func (n *snapshotNode) setChain(name func([]content.LayerID, lower.Flavour) lower.Name) {
	if chain, ok := n.layers(); ok {
		n.chain, n.mapped, n.whole = name(chain, lower.Plain), name(chain, lower.Mapped), true
	}
}

// names are the chain images of a committed snapshot's layers.
func (n *snapshotNode) names() []lower.Name {
	if n.mapped == n.chain {
		return []lower.Name{n.chain}
	}
	return []lower.Name{n.chain, n.mapped}
}

// below names the chain image that a container or a view on n lies on.
func (n *snapshotNode) below(f lower.Flavour) lower.Name {
	if f == lower.Mapped {
		return n.mapped
	}
	return n.chain
}

// base is the committed snapshot whose chain image a container or a view lies on, nil for none.
func (n *snapshotNode) base() *snapshotNode {
	p := n.parent
	for range n.over {
		if p == nil {
			return nil
		}
		p = p.parent
	}
	return p
}

// layers returns the layers of a committed snapshot and all below it, base first, when all are there.
func (n *snapshotNode) layers() (chain []content.LayerID, ok bool) {
	for p := n; p != nil; p = p.parent {
		if p.layer.IsZero() || p.kind != snapshots.KindCommitted || p.orphan {
			return nil, false
		}
		chain = append(chain, p.layer)
	}
	slices.Reverse(chain)
	return chain, true
}

// of returns the snapshots that an image keeps.
func (g *snapshotGraph) of(ref ImageRef) []*snapshotNode {
	seen := map[*snapshotNode]bool{}
	var list []*snapshotNode
	for _, chain := range ref.Chains {
		for _, n := range g.byPlace[chainPlace{ref.Namespace, chain}] {
			for ; n != nil && !seen[n]; n = n.parent {
				seen[n] = true
				list = append(list, n)
			}
		}
	}
	return list
}
