package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// recipeKeeper implements blobs.Recipes.
type recipeKeeper struct{ s func() *Snapshotter }

// KeepRecipes keeps recipes of blobs beside the layers of a snapshotter, for the Trimmer.
func KeepRecipes(s func() *Snapshotter) blobs.Recipes { return recipeKeeper{s} }

// MakeRecipe implements blobs.Recipes.
func (k recipeKeeper) MakeRecipe(ctx context.Context, d content.DiffID, b layer.Blob) error {
	return layer.MakeRecipe(ctx, k.s().layers, d, b)
}

var (
	errNotStored = errors.New("its layer is not stored here")
	errDamaged   = errors.New("its layer is damaged: see dedupctl fsck")
)

// StoredLayers looks at what s holds at this moment, for the Trimmer, which decides which blobs are needed no more. A
// layer counts when a committed snapshot of the namespace stands for it, it came in as a tar with that diffID (so that
// it can be healed from the image's blob), nothing of it is known to be damaged, and all of it is on the disk.
func StoredLayers(ctx context.Context, s *Snapshotter) (blobs.Stored, error) {
	all, err := s.db.records(ctx)
	if err != nil {
		return nil, err
	}
	if !all.complete() {
		return nil, errors.New("metadata.db is damaged: until it is repaired (dedupctl fsck --repair) every blob is needed")
	}
	type held struct {
		layer content.LayerID
		since time.Time
	}
	places := map[chainPlace]held{}
	for _, sn := range all.whole {
		id, ok := layerOf(sn.Info)
		chain, named := chainOfName(sn.Name)
		if !ok || !named || sn.Kind != snapshots.KindCommitted {
			continue
		}
		place := chainPlace{sn.Labels[labelNamespace], chain}
		if have, twice := places[place]; !twice || have.since.Before(sn.Created) {
			places[place] = held{id, sn.Created}
		}
	}
	type tar struct {
		layer  content.LayerID
		diffID content.DiffID
	}
	tars := map[tar]bool{}
	for _, l := range s.layers.List() {
		for _, d := range l.DiffIDs {
			tars[tar{l.ID, d}] = true
		}
	}
	damaged := s.layers.Damaged()
	// What is listed above is on the disk after this.
	if err := layer.WriteOut(s.layers); err != nil {
		return nil, fmt.Errorf("layers are not on the disk: %w", err)
	}
	return func(namespace string, chain content.ChainID, d content.DiffID) (time.Time, error) {
		h, ok := places[chainPlace{namespace, chain}]
		if _, bad := damaged[h.layer]; ok && bad {
			return h.since, errDamaged
		}
		if !ok || !tars[tar{h.layer, d}] {
			return h.since, errNotStored
		}
		return h.since, nil
	}, nil
}
