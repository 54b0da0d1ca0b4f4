package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Pair is what two sets of our mounts show, kept mounted until Close. Apart from what the layers and the upper
// directory name, both sides are equal, unless they are parted: a layer changes nothing that it does not name.
type Pair struct {
	// Lower and Upper are the root directories of the two sides. Character devices with the number 0 in them stand for
	// names that are not there.
	Lower, Upper string
	// Layers are those that only the upper side has.
	Layers []content.LayerID
	// Parted: the lower side has layers that the upper one does not have. Both can differ anywhere then, in what names of
	// one inode there are.
	Parted bool
	// UpperDir is the upper directory of the overlay that Upper shows, in overlayfs's own notation; "" for committed
	// snapshots.
	UpperDir string

	s      *Snapshotter
	upper  side
	cancel []func() error // in reverse order
}

// side is one set of mounts: a chain, and for an active snapshot a directory over it.
type side struct {
	snapshot string // the topmost snapshot: a committed one, or the active one; "" for an empty root
	id       string
	parent   string // what the chain is of
	chain    []content.LayerID
	dir      string // upper directory
}

// foreign is the answer to mounts that are not ours to compare, so that containerd asks its next differ.
func foreign(what string) error {
	return fmt.Errorf("dedup-diff does not compare %s: %w", what, errdefs.ErrNotImplemented)
}

// OpenPair finds out what two sets of mounts show, and mounts it for reading. The upper side is a view or an active
// snapshot of s, the lower one a view or nothing; of anything else the error wraps errdefs.ErrNotImplemented.
func OpenPair(ctx context.Context, s *Snapshotter, lowerMounts, upperMounts []mount.Mount) (_ *Pair, err error) {
	defer s.explain(&err)
	below, err := sideOf(ctx, s, lowerMounts)
	if err != nil {
		return nil, fmt.Errorf("lower mounts: %w", err)
	}
	above, err := sideOf(ctx, s, upperMounts)
	if err != nil {
		return nil, fmt.Errorf("upper mounts: %w", err)
	}
	if below.dir != "" {
		return nil, foreign("an active snapshot with something else")
	}
	p := &Pair{s: s, upper: above, UpperDir: above.dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	common := 0
	for common < min(len(below.chain), len(above.chain)) && below.chain[common] == above.chain[common] {
		common++
	}
	p.Layers, p.Parted = above.chain[common:], common < len(below.chain)
	if p.Lower, _, err = p.mountChain(ctx, below); err != nil {
		return nil, err
	}
	var packs []string
	if p.Upper, packs, err = p.mountChain(ctx, above); err == nil && above.dir != "" {
		err = p.mountView(packs)
	}
	return p, err
}

// sideOf finds the snapshot that mounts belong to. Clients change options, but leave the directories in them.
func sideOf(ctx context.Context, s *Snapshotter, mounts []mount.Mount) (side, error) {
	if len(mounts) == 0 {
		return side{}, nil
	}
	if len(mounts) > 1 {
		return side{}, foreign("several mounts")
	}
	top := lower.ImageOf(mounts[0].Source)
	switch mounts[0].Type {
	case "bind", "rbind":
	case "overlay":
		var ok bool
		if top, ok = topDirectory(mounts[0].Options); !ok {
			return side{}, foreign("id-mapped mounts")
		}
	default:
		return side{}, foreign(fmt.Sprintf("a mount of type %q", mounts[0].Type))
	}
	if top == s.path(dirEmpty) {
		return side{}, nil
	}
	ids := s.chains.UsersAt(top)
	if id := idOfUpper(top); top == s.upper(id) {
		ids = []string{id}
	}
	return sideOfAny(ctx, s, ids, top)
}

// topDirectory returns the topmost directory that an overlay's options name, and false for what is id-mapped.
func topDirectory(options []string) (top string, ok bool) {
	upper := ""
	for o := range strings.SplitSeq(strings.Join(options, ","), ",") {
		switch key, value, _ := strings.Cut(o, "="); key {
		case "uidmap", "gidmap":
			return "", false
		case "upperdir":
			upper = value
		case "lowerdir": // the kernel takes the last one
			top, _, _ = strings.Cut(value, ":")
		}
	}
	return cmp.Or(upper, top), true
}

// sideOfAny looks at the snapshots with these ids, the newest first, for one that has the directory on top.
func sideOfAny(ctx context.Context, s *Snapshotter, ids []string, top string) (side, error) {
	slices.SortFunc(ids, func(a, b string) int {
		x, _ := strconv.Atoi(a)
		y, _ := strconv.Atoi(b)
		return y - x
	})
	for _, id := range ids {
		for _, key := range s.ids.get(id) {
			found, ok, err := sideOfSnapshot(ctx, s, id, key, top)
			if err != nil || ok {
				return found, err
			}
		}
	}
	return side{}, foreign("mounts of another snapshotter")
}

func sideOfSnapshot(
	ctx context.Context, s *Snapshotter, id, key, top string,
) (found side, ok bool, err error) {
	var info snapshots.Info
	err = s.db.view(ctx, func(ctx context.Context) (err error) {
		found.id, info, _, err = getInfo(ctx, key)
		return err
	})
	if errdefs.IsNotFound(err) || err == nil && found.id != id {
		return side{}, false, nil
	}
	if err != nil {
		return side{}, false, err
	}
	found.snapshot, found.parent = info.Parent, info.Parent
	if found.chain, err = s.resolve(ctx, info.Parent); err != nil {
		return side{}, false, err
	}
	if top != s.upper(id) {
		return side{snapshot: info.Parent, parent: info.Parent, chain: found.chain},
			info.Parent != "" && s.chains.MountPoint(s.chains.Name(found.chain, lower.Plain)) == top, nil
	}
	if _, applied := layerOf(info); applied || info.Kind != snapshots.KindActive || info.Labels[labelUIDMapping] != "" {
		return side{}, false, nil
	}
	if _, err := os.Stat(s.work(id)); err != nil { // it has not been mounted yet
		return side{}, false, nil
	}
	found.snapshot, found.dir = key, top
	return found, true, nil
}

// comparisons number the users of chains that are no snapshots.
var comparisons atomic.Int64

// mountChain makes sure that the chain of a side stays mounted, and returns where, and its packs.
func (p *Pair) mountChain(ctx context.Context, of side) (dir string, packs []string, err error) {
	use := fmt.Sprintf("compare-%d", comparisons.Add(1))
	p.cancel = append(p.cancel, func() error {
		p.s.unuse(context.WithoutCancel(ctx), use)
		return nil
	})
	l, err := p.s.below(ctx, creation{id: use, parent: of.parent})
	return l.dir, l.packs, err
}

// mountView mounts the upper directory over the chain, as its container sees it.
func (p *Pair) mountView(packs []string) error {
	options, err := p.s.kernel.Overlay(lower.Stack{Lower: []string{p.UpperDir, p.Upper}, Packs: packs})
	if err != nil {
		return err
	}
	view, err := os.MkdirTemp(p.s.opts.RunDir, viewPrefix)
	if err != nil {
		return err
	}
	p.Upper = view
	p.cancel = append(p.cancel, func() error { return os.Remove(view) })
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	if err := m.Mount(view); err != nil {
		return err
	}
	p.cancel = append(p.cancel, func() error { return mount.UnmountAll(view, 0) })
	return nil
}

// Names calls fn for each entry of the layers that only the upper side has.
func (p *Pair) Names(ctx context.Context, fn func(path string, kind content.Kind, flags content.Flags)) error {
	for _, id := range p.Layers {
		if err := layer.EachName(ctx, p.s.layers, id, fn); err != nil {
			return err
		}
	}
	return nil
}

// Keep notes the layer that the difference gives. It stays known for as long as the upper side's snapshot is there, so
// that a pull of it finds it. The hold that id carries passes to the snapshot, also when an error is returned.
func (p *Pair) Keep(ctx context.Context, id content.LayerID) error {
	release := id
	err := p.s.db.update(ctx, func(ctx context.Context) error {
		own, info, _, err := getInfo(ctx, p.upper.snapshot)
		if err != nil {
			return err
		}
		old, had := comparedOf(info)
		if err := setPrivate(ctx, p.upper.snapshot, own, map[string]string{labelCompared: id.Hex()}); err != nil || !had {
			release = content.LayerID{}
			return err
		}
		release = old
		return nil
	})
	if err != nil {
		release = id
	}
	p.s.step("compared.noted")
	if !release.IsZero() {
		p.s.layers.Release(release)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("note what snapshot %q was compared to: %w", p.upper.snapshot, err)
	}
	return nil
}

// Close unmounts what only the pair needed.
func (p *Pair) Close() (err error) {
	for _, cancel := range slices.Backward(p.cancel) {
		err = errors.Join(err, cancel())
	}
	p.cancel = nil
	return err
}

// comparedOf returns the layer that a snapshot keeps since it was compared.
func comparedOf(info snapshots.Info) (content.LayerID, bool) {
	sum, err := content.ParseSum(info.Labels[labelCompared])
	return content.LayerID{Sum: sum}, err == nil
}

// heldBy returns the layers that a stored snapshot holds.
func heldBy(info snapshots.Info) (ids []content.LayerID) {
	for _, of := range []func(snapshots.Info) (content.LayerID, bool){layerOf, comparedOf} {
		if id, ok := of(info); ok {
			ids = append(ids, id)
		}
	}
	return ids
}

// releaseAll gives up all that a removed snapshot held.
func releaseAll(s *Snapshotter, info snapshots.Info) {
	s.release(info.Labels)
	if id, ok := comparedOf(info); ok {
		s.layers.Release(id)
	}
}

// withCompared returns labels with what a stored snapshot keeps since it was compared.
func withCompared(labels, stored map[string]string) map[string]string {
	if id := stored[labelCompared]; id != "" {
		labels = maps.Clone(labels)
		labels[labelCompared] = id
	}
	return labels
}
