package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

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
	// Dirs are the directories that only the upper side has, in overlayfs's own notation: those of steps that are not yet
	// ingested, and the upper directory of an active snapshot.
	Dirs []string
	// Parted: the lower side has layers that the upper one does not have. Both can differ anywhere then, in what names of
	// one inode there are.
	Parted bool

	layers []content.LayerID // those that only the upper side has, but for Dirs
	s      *Snapshotter
	upper  side
	cancel []func() error // in reverse order
}

// side is one set of mounts: committed snapshots, and for an active one a directory over them.
type side struct {
	snapshot string // the topmost snapshot: a committed one, or the active one; "" for an empty root
	id       string
	parent   string // the topmost committed one
	parts    []part
	use      string   // who uses what is mounted of it
	over     []string // steps whose directories it lies over
	dir      string   // upper directory
	// view is where it is mounted, when it is a view over steps, and viewOver are these.
	view     string
	viewOver []string
}

// part is a committed snapshot of a side.
type part struct {
	id    string
	layer content.LayerID // zero for a step that is not yet ingested
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
	p := &Pair{s: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	steps := true
	if err := p.take(ctx, &below, &above, steps); err != nil {
		return nil, err
	}
	common := commonParts(below.parts, above.parts)
	if p.Parted = common < len(below.parts); p.Parted {
		// Everything is compared, so both sides have to show it in the same form.
		steps = false
		if err := p.take(ctx, &below, &above, steps); err != nil {
			return nil, err
		}
		common = commonParts(below.parts, above.parts)
	}
	for _, own := range above.parts[common:] {
		if own.layer.IsZero() {
			p.Dirs = append(p.Dirs, s.upper(own.id))
		} else {
			p.layers = append(p.layers, own.layer)
		}
	}
	if above.dir != "" {
		p.Dirs = append(p.Dirs, above.dir)
	}
	p.upper = above
	if p.Lower, err = p.mount(ctx, below); err == nil {
		p.Upper, err = p.mount(ctx, above)
	}
	return p, err
}

// take looks at what both sides are made of, and has it stay until Close.
func (p *Pair) take(ctx context.Context, below, above *side, steps bool) error {
	for _, of := range []*side{below, above} {
		of.use, of.over = fmt.Sprintf("compare-%d", comparisons.Add(1)), nil
		if of.parent == "" {
			continue
		}
		use := of.use
		p.cancel = append(p.cancel, func() error {
			p.s.ingestIdle(p.s.leave(context.WithoutCancel(ctx), use))
			return nil
		})
		var err error
		if steps {
			of.over, err = p.s.lieOver(ctx, of.use, of.parent)
			p.s.putOff(of.over)
		}
		if err == nil {
			of.parts, err = p.s.partsOf(ctx, of.parent, of.over)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// partsOf returns the snapshots from the base up to name, of which those in over are not waited for.
func (g *ingester) partsOf(ctx context.Context, name string, over []string) (parts []part, err error) {
	err = g.db.view(ctx, func(ctx context.Context) error {
		for _, id := range over {
			_, info, _, err := getInfo(ctx, name)
			if err != nil {
				return err
			}
			name = info.Parent
			parts = append(parts, part{id: id})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if _, err := g.resolve(ctx, name); err != nil {
		return nil, err
	}
	err = g.db.view(ctx, func(ctx context.Context) error {
		for name != "" {
			id, info, _, err := getInfo(ctx, name)
			if err != nil {
				return err
			}
			own := part{id: id}
			own.layer, _ = layerOf(info)
			parts = append(parts, own)
			name = info.Parent
		}
		return nil
	})
	slices.Reverse(parts)
	return parts, err
}

// commonParts is how many parts of two sides are the same, from the base on.
func commonParts(a, b []part) (n int) {
	for n < min(len(a), len(b)) && (a[n].id == b[n].id || !a[n].layer.IsZero() && a[n].layer == b[n].layer) {
		n++
	}
	return n
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
	if id := filepath.Base(top); top == s.viewPoint(id) {
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
		x, _ := strconv.Atoi(strings.TrimSuffix(a, besideSteps))
		y, _ := strconv.Atoi(strings.TrimSuffix(b, besideSteps))
		return y - x
	})
	for _, id := range ids {
		id, onAll := strings.CutSuffix(id, besideSteps)
		for _, key := range s.ids.get(id) {
			found, ok, err := sideOfSnapshot(ctx, s, id, key, top, onAll)
			if err != nil || ok {
				return found, err
			}
		}
	}
	return side{}, foreign("mounts of another snapshotter")
}

// sideOfSnapshot looks at one snapshot. onAll: it uses the chain image of all below it, over whatever steps it lies.
func sideOfSnapshot(
	ctx context.Context, s *Snapshotter, id, key, top string, onAll bool,
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
	if top != s.upper(id) {
		if len(overOf(info)) > 0 && !onAll { // it uses a chain image, too, but shows more
			found.view, found.viewOver = top, overOf(info)
			return found, info.Kind == snapshots.KindView && top == s.viewPoint(id), nil
		}
		chain, err := s.resolve(ctx, info.Parent)
		if err != nil {
			return side{}, false, err
		}
		return found, info.Parent != "" && s.chains.MountPoint(s.chains.Name(chain, lower.Plain)) == top, nil
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

// mount shows a side, and returns where.
func (p *Pair) mount(ctx context.Context, of side) (dir string, err error) {
	p.cancel = append(p.cancel, func() error {
		p.s.unuse(context.WithoutCancel(ctx), of.use)
		return nil
	})
	if of.view != "" && slices.Equal(of.over, of.viewOver) {
		if dir, ok := p.hold(of.view); ok {
			return dir, nil
		}
	}
	l, err := p.s.below(ctx, creation{id: of.use, parent: of.parent, over: of.over})
	if err != nil {
		return "", err
	}
	stack := l.stack()
	if of.dir != "" {
		stack.Lower = slices.Insert(stack.Lower, 0, of.dir)
	}
	if len(stack.Lower) == 1 {
		return l.dir, nil
	}
	view, err := os.MkdirTemp(p.s.opts.RunDir, viewPrefix)
	if err != nil {
		return "", err
	}
	p.cancel = append(p.cancel, func() error { return os.Remove(view) })
	options, err := p.s.kernel.Overlay(stack)
	if err != nil {
		return "", err
	}
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	if err := m.Mount(view); err != nil {
		return "", err
	}
	p.cancel = append(p.cancel, func() error { return mount.UnmountAll(view, 0) })
	return view, nil
}

// hold keeps what is mounted at a view until Close, also when somebody removes the view: it shows what mount would.
func (p *Pair) hold(view string) (dir string, ok bool) {
	f, err := os.OpenFile(view, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", false
	}
	var st, above unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || unix.Stat(filepath.Dir(view), &above) != nil || st.Dev == above.Dev {
		f.Close() // nothing is mounted there
		return "", false
	}
	p.cancel = append(p.cancel, f.Close)
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), true
}

// Names calls fn for each entry of the layers that only the upper side has, but for Dirs.
func (p *Pair) Names(ctx context.Context, fn func(path string, kind content.Kind, flags content.Flags)) error {
	for _, id := range p.layers {
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

// Committed reports whether the upper side is a committed snapshot.
func (p *Pair) Committed() bool { return p.upper.dir == "" }

// Later runs fn in the background, with a ctx that ends when the daemon stops, and reports whether it does.
func (p *Pair) Later(fn func(context.Context)) bool { return p.s.background(fn) }

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
