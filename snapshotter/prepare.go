package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) (_ []mount.Mount,
	err error) {
	defer s.explain(&err)
	base, err := clientLabels(opts)
	if err != nil {
		return nil, err
	}
	_, named := base.Labels[labelRef]
	if isExtraction(key, base.Labels) {
		s.cancelBuild(parent)
		if !named {
			s.counters.answer(doorPrepare, false, reasonUnnamed)
		}
	}
	return s.lost.retry(ctx, parent, func() ([]mount.Mount, error) {
		if named {
			if mounts, err := s.serveKnown(ctx, key, parent, base.Labels); mounts != nil || err != nil {
				return mounts, err
			}
		}
		return s.create(ctx, snapshots.KindActive, key, parent, base.Labels)
	})
}

func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) (_ []mount.Mount,
	err error) {
	defer s.explain(&err)
	base, err := clientLabels(opts)
	if err != nil {
		return nil, err
	}
	return s.lost.retry(ctx, parent, func() ([]mount.Mount, error) {
		return s.create(ctx, snapshots.KindView, key, parent, base.Labels)
	})
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string,
	labels map[string]string) (_ []mount.Mount, err error) {
	labels = maps.Clone(labels) // another try begins anew
	c := creation{parent: parent, extraction: isExtraction(key, labels), view: kind == snapshots.KindView}
	var id string
	size, err := s.limits.take(ctx, key, c, labels)
	if err != nil {
		return nil, fmt.Errorf("create snapshot %q: %w", key, err)
	}
	err = s.db.update(ctx, func(ctx context.Context) (err error) {
		if c.ids, err = (idMapper{s.kernel.NoIDMap}).maps(ctx, key, parent, labels); err != nil {
			return err
		}
		if c.ids != (idMap{}) {
			labels[labelIDMap] = c.ids.uids + " " + c.ids.gids
			s.mapped.Store(true)
		}
		if !c.extraction && c.ids == (idMap{}) && !s.kernel.Metacopy {
			if c.over, err = stepsOn(ctx, parent); err != nil {
				return err
			}
			if len(c.over) > 0 {
				labels[labelOver] = strings.Join(c.over, " ")
			}
		}
		if id, err = createSnapshot(ctx, kind, key, parent, labels); err == nil {
			s.ids.add(id, key)
			s.steps.use(id, c.over)
			s.limits.keep(id, size)
		}
		return err
	})
	c.id = id
	if err != nil {
		idle, gone := s.steps.takeBack(id, c.over)
		s.discardSteps(ctx, gone)
		s.ingestIdle(idle)
		s.limits.giveBack(id, size)
		return nil, fmt.Errorf("create snapshot %q: %w", key, err)
	}
	s.putOff(c.over)
	defer func() {
		if err != nil {
			// The caller's ctx may be what failed.
			err = errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
		}
	}()
	s.step("prepare.recorded")
	if !c.view && !c.extraction {
		if err := s.checkRoom(); err != nil {
			return nil, fmt.Errorf("create snapshot %q: %w", key, err)
		}
	}
	l, late, err := s.belowSoon(ctx, key, c)
	if err != nil {
		return nil, fmt.Errorf("parent of snapshot %q: %w", key, err)
	}
	// Without its directories nobody can mount one that is late: Mounts makes them.
	if !c.view && !late {
		if err := s.restoreDirs(id, l); err != nil {
			return nil, fmt.Errorf("create snapshot %q: %w", key, err)
		}
	}
	s.step("prepare.made")
	return s.mounts(ctx, kind, id, l)
}

// restoreDirs creates the directories of an active snapshot where they are missing: metadata.db is durable before
// them, so a power cut may leave it without, and one whose chain image took long has none yet. The work directory,
// without which nothing mounts, comes last.
func (m *mounter) restoreDirs(id string, l below) error {
	m.restoring.Lock()
	defer m.restoring.Unlock()
	if _, err := os.Stat(m.work(id)); !errors.Is(err, os.ErrNotExist) {
		return errors.Join(err, m.limits.makeRoom(id))
	}
	err := m.limits.enforce(id)
	if err == nil {
		err = m.makeDir(m.upper(id), 0o755)
	}
	if err == nil && (l.chain && l.mounted || len(l.steps) > 0 || l.ids != (idMap{})) {
		err = copyRoot(l.top(), m.upper(id), l.ids)
	}
	if err != nil {
		return err
	}
	return m.makeDir(m.work(id), 0o711)
}

// makeLate makes the directories of a snapshot that is committed without ever having been mounted.
func (m *mounter) makeLate(ctx context.Context, key, id string, active snapshots.Info) error {
	if err := m.settled(ctx, key); err != nil {
		return err
	}
	if _, err := os.Stat(m.work(id)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := m.below(ctx, recreation(id, key, active))
	if err != nil {
		return err
	}
	return m.restoreDirs(id, l)
}

// below is what lies below a snapshot.
type below struct {
	dir string
	// chain: dir is the mount point of a chain image.
	chain bool
	// mounted: the chain image is really there. An extraction that our diff service
	// fills does without.
	mounted bool
	// packs are where the packs are mounted over which it lies.
	packs []string
	// steps are the directories of steps above dir, the topmost first.
	steps []string
	// ids are how containerd is to map owners.
	ids idMap
}

// top is the topmost directory below.
func (l below) top() string { return l.stack().Lower[0] }

// stack is what lies below, as part of an overlay.
func (l below) stack() lower.Stack {
	return lower.Stack{Lower: append(slices.Clone(l.steps), l.dir), Packs: l.packs, UIDs: l.ids.uids, GIDs: l.ids.gids}
}

func (m *mounter) below(ctx context.Context, c creation) (below, error) {
	if c.parent == "" {
		return below{dir: m.path(dirEmpty), ids: c.ids}, nil
	}
	if len(c.over) > 0 {
		l, err := m.belowSteps(ctx, c)
		if !errors.Is(err, errNoSteps) {
			return l, err
		}
		log.G(ctx).WithError(err).Debugf("snapshot %s does not lie over the directories of steps", c.id)
		c.id += besideSteps
	}
	chain, err := m.resolve(ctx, c.parent)
	if err != nil {
		return below{}, err
	}
	flavour := lower.Flavour(c.ids != idMap{})
	name := m.chains.Name(chain, flavour)
	l := below{dir: m.chains.MountPoint(name), chain: true, ids: c.ids}
	if flavour == lower.Mapped {
		l.dir = m.path(linkMounts, name.Hex())
	}
	if c.extraction && m.known.usesApply() {
		return l, nil
	}
	if err := m.healthy(ctx, chain); err != nil {
		return below{}, err
	}
	m.chains.Users.Use(name, c.id)
	l.mounted = true
	have, err := m.chains.Ensure(ctx, chain, flavour)
	if errors.Is(err, layer.ErrDamaged) { // found out only now
		if err = m.healthy(ctx, chain); err == nil {
			have, err = m.chains.Ensure(ctx, chain, flavour)
		}
	}
	l.packs = have.Packs
	return l, err
}

// Mounts returns the mounts of an active snapshot or a view, and makes sure that what lies below
// is mounted, also after a reboot.
func (s *Snapshotter) Mounts(ctx context.Context, key string) (_ []mount.Mount, err error) {
	defer s.explain(&err)
	var id string
	var info snapshots.Info
	err = s.db.view(ctx, func(ctx context.Context) (err error) {
		id, info, _, err = getInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %q: %w", key, err)
	}
	if info.Kind == snapshots.KindCommitted {
		return nil, fmt.Errorf("mounts of snapshot %q: it is committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	if info.Labels[labelStaged] != "" {
		return s.stagedMounts(ctx, id)
	}
	defer func() {
		if s.vanished(ctx, key, id) { // whoever removed or committed it could not take back what follows
			err = errors.Join(fmt.Errorf("mounts of snapshot %q: it was removed or committed meanwhile: %w", key,
				errdefs.ErrNotFound), s.vacate(ctx, id, info.Kind))
		}
	}()
	l, err := s.below(ctx, recreation(id, key, info))
	if err != nil {
		return nil, fmt.Errorf("parent of snapshot %q: %w", key, err)
	}
	if info.Kind == snapshots.KindActive {
		if err := s.restoreDirs(id, l); err != nil {
			return nil, fmt.Errorf("mounts of snapshot %q: %w", key, err)
		}
	}
	return s.mounts(ctx, info.Kind, id, l)
}

// mounts are exactly one: containerd's applier and BuildKit have ways of their own to read one overlay, and CRI makes
// only one read-only. A view is a bind of one directory, which nobody needs to understand: BuildKit takes options out
// of an overlay, and fails where there are some that it does not know.
func (m *mounter) mounts(ctx context.Context, kind snapshots.Kind, id string, l below) ([]mount.Mount, error) {
	stack := l.stack()
	if kind == snapshots.KindView {
		dir, err := l.dir, error(nil)
		switch {
		case len(l.steps) > 0:
			dir = m.viewPoint(id)
			err = m.mountView(dir, stack)
		case len(l.packs) > 0:
			dir, err = m.chains.View(ctx, l.dir)
		}
		if err != nil {
			return nil, err
		}
		return []mount.Mount{{Type: "bind", Source: dir, Options: lower.Bind(stack)}}, nil
	}
	stack.Upper, stack.Work = m.upper(id), m.work(id)
	options, err := m.kernel.Overlay(stack)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, err
}

// mountView mounts a view over steps, once, whoever asks for it at the same time.
func (m *mounter) mountView(dir string, stack lower.Stack) error {
	m.restoring.Lock()
	defer m.restoring.Unlock()
	defer m.step("view.mounted")
	return m.kernel.MountView(dir, stack)
}

// copyRoot gives the upper directory the metadata of the root below, which it hides.
func copyRoot(from, to string, ids idMap) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("root of chain image: %w", err)
	}
	uid, gid, err := ids.owner(st.Uid, st.Gid)
	if err != nil {
		return err
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	return errors.Join(
		unix.Chown(to, uid, gid),
		unix.Chmod(to, st.Mode&0o7777),
		copyXattrs(from, to),
		unix.UtimesNanoAt(unix.AT_FDCWD, to, times, 0),
	)
}

func copyXattrs(from, to string) error {
	names := make([]byte, 64<<10)
	n, err := unix.Listxattr(from, names)
	if err != nil {
		return fmt.Errorf("xattrs of root: %w", err)
	}
	for _, name := range splitNul(names[:n]) {
		if strings.HasPrefix(name, "trusted.overlay.") {
			continue // it is about the directory of a step, which another overlay wrote
		}
		if name == "security.selinux" && lower.MountContext() != "" {
			continue // that of the mount: the directory has its own
		}
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(from, name, value)
		if err == nil {
			err = unix.Setxattr(to, name, value[:n], 0)
		}
		if err != nil {
			return fmt.Errorf("xattr %s of root: %w", name, err)
		}
	}
	return nil
}

func splitNul(b []byte) (names []string) {
	for start, i := 0, 0; i < len(b); i++ {
		if b[i] == 0 {
			names = append(names, string(b[start:i]))
			start = i + 1
		}
	}
	return names
}
