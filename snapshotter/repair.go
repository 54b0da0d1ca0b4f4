package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// origin is where a layer's blob may be: what a namespace calls the chain that it ends.
type origin struct {
	namespace string
	chain     content.ChainID
}

// repair heals damaged layers from the blobs in containerd's content store, as far as they are there. Only what is
// wrong with this node is an error: the caller looks at what is still damaged.
func (h *health) repair(ctx context.Context, damaged map[content.LayerID]layer.Damage) error {
	if len(damaged) == 0 {
		return nil
	}
	h.repairing.Lock()
	defer h.repairing.Unlock()
	origins, err := h.origins(ctx, damaged)
	if err != nil {
		return err
	}
	var node error
	for id := range damaged {
		if err := h.layers.LookAgain(ctx, id); err != nil {
			node = err
		}
		if h.layers.InService(id) == nil {
			continue // healed with another one, or by itself
		}
		for _, o := range origins[id] {
			healed, err := h.repairFrom(ctx, id, o)
			if healed {
				break
			}
			if err != nil {
				node = err
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return node
}

func (h *health) origins(ctx context.Context,
	layers map[content.LayerID]layer.Damage) (map[content.LayerID][]origin, error) {
	all := map[content.LayerID][]origin{}
	stored, err := h.db.records(ctx)
	for _, sn := range stored.whole {
		id, ok := layerOf(sn.Info)
		if _, damaged := layers[id]; !ok || !damaged || sn.Labels[labelNamespace] == "" {
			continue
		}
		o := origin{namespace: sn.Labels[labelNamespace]}
		o.chain, _ = chainOfName(sn.Name)
		if !slices.Contains(all[id], o) {
			all[id] = append(all[id], o)
		}
	}
	return all, err
}

// repairFrom tries the blobs that one namespace has for a layer. node is what is wrong with this node, not with a blob.
func (h *health) repairFrom(ctx context.Context, id content.LayerID, o origin) (healed bool, node error) {
	if h.opts.Blobs == nil {
		return false, nil
	}
	ctx = namespaces.WithNamespace(ctx, o.namespace)
	try := func(b layer.Blob) bool {
		err := h.layers.Repair(ctx, id, b)
		switch {
		case layer.Explained(err):
			node = err
		case err != nil:
			log.G(ctx).WithError(err).Warnf("a blob does not repair layer %s", id)
		}
		return err == nil
	}
	tried := map[digest.Digest]bool{}
	for _, d := range h.layers.Blobs(id) {
		tried[d] = true
		b, err := h.opts.Blobs.Blob(ctx, ocispec.Descriptor{Digest: d})
		if err == nil && try(b) {
			return true, nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).Warnf("look for a blob of layer %s", id)
		}
	}
	if o.chain.IsZero() {
		return false, node
	}
	b, ok, err := h.opts.Blobs.Find(ctx, o.chain, "")
	if err != nil {
		log.G(ctx).WithError(err).Warnf("look for the blob of layer %s", id)
	}
	healed = ok && !tried[b.Digest] && try(b)
	return healed, node
}

// healthy makes sure that a chain can be served: what is damaged is healed where its blob is at hand.
func (h *health) healthy(ctx context.Context, chain []content.LayerID) error {
	err := h.layers.InService(chain...)
	if !errors.Is(err, layer.ErrDamaged) {
		return err
	}
	all := h.layers.Damaged()
	damaged := map[content.LayerID]layer.Damage{}
	for _, id := range chain {
		if d, ok := all[id]; ok {
			damaged[id] = d
		}
	}
	if rerr := h.repair(ctx, damaged); rerr != nil {
		return errors.Join(err, rerr)
	}
	if err := h.layers.InService(chain...); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// LayersOf returns the layers that each image keeps here, base first.
func (rep *reports) LayersOf(ctx context.Context, refs []ImageRef) ([][]content.LayerID, error) {
	stored, err := rep.db.records(ctx)
	if err != nil {
		return nil, err
	}
	g := stored.graph(rep.chains.Name)
	out := make([][]content.LayerID, len(refs))
	for i, ref := range refs {
		for _, n := range g.of(ref) {
			if !n.layer.IsZero() {
				out[i] = append(out[i], n.layer)
			}
		}
	}
	return out, nil
}
