package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// layoutVersion is the version of the layout on disk, in the file "format". Any other one that is not in layouts is
// refused.
const layoutVersion = "6"

// layouts are the versions that are taken over, oldest first, each with what makes it the next. A step may be killed at
// any point: it is then done again from its beginning, so what it finds done it leaves alone. The version is noted
// after each.
var layouts = []struct {
	version string
	next    func(*Snapshotter, context.Context) error
}{
	{"2", (*Snapshotter).sealMetadata},
	{"3", (*Snapshotter).refuseFormer},
	{"4", (*Snapshotter).renewTrees},
	{"5", (*Snapshotter).refuseFormer},
}

func indexLayout(version string) int {
	for i, l := range layouts {
		if l.version == version {
			return i
		}
	}
	return -1
}

// upgrade makes the layout today's, before anything is opened but the lock.
func (s *Snapshotter) upgrade(ctx context.Context, version string) error {
	for i := indexLayout(version); i >= 0 && i < len(layouts); i++ {
		err := layouts[i].next(s, ctx)
		next := layoutVersion
		if i+1 < len(layouts) {
			next = layouts[i+1].version
		}
		if err == nil {
			err = s.noteFormat(next)
		}
		if err != nil {
			return fmt.Errorf("upgrade %s from layout %s to %s (it goes on where it stopped): %w", s.opts.Root,
				layouts[i].version, next, err)
		}
	}
	return nil
}

// sealMetadata gives metadata.db its seals.
func (s *Snapshotter) sealMetadata(ctx context.Context) error {
	return sealAll(ctx, s.path("metadata.db"))
}

// refuseFormer does nothing but move the version on, so that a build of before leaves the store alone: from layout 4 on
// payloads move into packs, and it would miss them; from layout 6 on packs may be dense, which it cannot read.
func (s *Snapshotter) refuseFormer(context.Context) error { return nil }

// renewTrees moves payloads into packs, has the timestamps of Python's files follow from their sources (layer.Upgrade),
// and gives snapshots the new ids of their layers. Chain images have other names then: the old ones are nobody's.
func (s *Snapshotter) renewTrees(ctx context.Context) (err error) {
	if err := s.openMetadata(ctx); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.db.close())
		s.db = nil
	}()
	stored, err := s.db.records(ctx)
	if err != nil {
		return err
	}
	former := layer.FormerStore{}
	names := map[content.LayerID][]string{}
	for _, sn := range stored.whole {
		if id, ok := layerOf(sn.Info); ok {
			names[id] = append(names[id], sn.Name)
			former.Live = append(former.Live, id)
		}
	}
	former.Users = stored.mounted()
	former.Renamed = func(ctx context.Context, from, to content.LayerID) error {
		return s.db.update(ctx, func(ctx context.Context) error {
			for _, name := range names[from] {
				id, _, _, err := getInfo(ctx, name)
				if err == nil {
					err = setPrivate(ctx, name, id, map[string]string{labelLayer: to.Hex()})
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	return layer.Upgrade(ctx, layer.Options{
		Root: s.opts.Root, Fidelity: s.opts.Fidelity, KeepUnnamed: !stored.complete(), Verity: s.kernel.NoVerity == nil,
		Dense: s.kernel.NoDense == nil, Step: s.opts.Step,
	}, former)
}

// mounted returns the layers below each snapshot that clients may have mounted, by its id.
func (r records) mounted() map[string][]content.LayerID {
	byName := map[string]storedSnapshot{}
	for _, sn := range r.whole {
		byName[sn.Name] = sn
	}
	below := map[string][]content.LayerID{}
	for _, sn := range r.whole {
		for p := sn.Parent; p != "" && sn.Kind != snapshots.KindCommitted; p = byName[p].Parent {
			if id, ok := layerOf(byName[p].Info); ok {
				below[sn.id] = append(below[sn.id], id)
			}
		}
	}
	return below
}

// mountedLayers returns the layers below snapshots that clients may have mounted; ok is false where not all snapshots
// are known.
func (s *store) mountedLayers(ctx context.Context) (layers []content.LayerID, ok bool, err error) {
	stored, err := s.db.records(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, chain := range stored.mounted() {
		layers = append(layers, chain...)
	}
	return layers, stored.complete(), nil
}

// uses tells whether there is a snapshot of this id that containers may have mounted.
func (r records) uses(id string) bool {
	return slices.ContainsFunc(r.whole, func(sn storedSnapshot) bool {
		return sn.id == id && sn.Kind != snapshots.KindCommitted
	})
}
