package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Remove removes a snapshot without children. Its layer goes when nothing else names it.
func (s *Snapshotter) Remove(ctx context.Context, key string) (err error) {
	defer s.explain(&err)
	var id string
	var info snapshots.Info
	var below []string // steps that were to be ingested with this one
	defer func() { s.going.Delete(id) }()
	err = s.db.update(ctx, func(ctx context.Context) (err error) {
		if id, info, err = removeSnapshot(ctx, key); err == nil {
			s.refs.remove(info.Labels[labelRef], key)
			s.going.Store(id, true)
		}
		if err == nil && info.Labels[labelPending] == pendingStep {
			below, _ = allSteps(ctx, info.Parent) // what is wrong with the parent does not concern this one
		}
		return err
	})
	if err != nil {
		if info.Kind == snapshots.KindCommitted && info.Labels[labelRef] != "" {
			s.refs.add(info.Labels[labelRef], key)
		}
		return fmt.Errorf("remove snapshot %q: %w", key, err)
	}
	s.step("remove.recorded")
	if id == "" { // what it said belongs to it may be another one's
		return nil
	}
	s.ids.remove(id, key)
	releaseAll(s, info)
	ctx = context.WithoutCancel(ctx)
	s.waitsNoMore(id)
	s.ingestIdle(below)
	s.abandon(key, func(context.Context) {
		if info.Kind != snapshots.KindCommitted {
			if err := s.vacate(ctx, id, info.Kind); err != nil {
				log.G(ctx).WithError(err).Warn("a view stays mounted until the next start")
			}
			if err := s.layers.Unused(id); err != nil {
				log.G(ctx).WithError(err).Warn("objects from before an upgrade stay until the next start")
			}
		}
	})
	if s.steps.keep(id) { // somebody compares it
		return nil
	}
	return s.discard(ctx, id)
}

// vacate takes back what is mounted and noted for a container or a view.
func (g *ingester) vacate(ctx context.Context, id string, kind snapshots.Kind) (err error) {
	g.unuse(ctx, id)
	if kind == snapshots.KindView {
		err = lower.UnmountView(g.viewPoint(id))
	}
	g.ingestIdle(g.leave(ctx, id))
	return err
}

// vanished tells whether a snapshot that was there is there no more. The caller's ctx may have ended.
func (s *store) vanished(ctx context.Context, key, id string) bool {
	now := ""
	err := s.db.view(context.WithoutCancel(ctx), func(ctx context.Context) (err error) {
		now, _, _, err = getInfo(ctx, key)
		return err
	})
	return errdefs.IsNotFound(err) || err == nil && now != id
}

// unuse unmounts a chain whose last user is gone; one that somebody else is building, after that. The caller's ctx may
// be why he gives it up, so it does not count.
func (t *tasks) unuse(ctx context.Context, id string) {
	for _, user := range []string{id, id + besideSteps} {
		n, orphaned, busy := t.chains.Users.Unuse(user)
		failed := func(err error) {
			t.counters.removeError()
			log.G(ctx).WithError(err).Warn("a chain image stays mounted until the next cleanup")
		}
		release := func(ctx context.Context) {
			if err := t.chains.Release(ctx, n); err != nil {
				failed(err)
			}
		}
		switch {
		case orphaned && t.opts.Linger > 0:
			t.chains.Leave(n, failed)
		case orphaned && busy:
			t.background(release)
		case orphaned:
			release(context.WithoutCancel(ctx))
		}
	}
}

// discard takes a snapshot's directory out of sight and deletes it in the background.
func (t *tasks) discard(ctx context.Context, id string) error {
	gone := t.path(dirSnapshots, goingPrefix+id)
	err := t.limits.move(t.path(dirSnapshots, id), gone)
	if errors.Is(err, os.ErrNotExist) {
		t.limits.free(id)
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove snapshot directory: %w", err)
	}
	t.step("discard.renamed")
	t.going.Store(filepath.Base(gone), true)
	t.background(func(context.Context) {
		defer t.going.Delete(filepath.Base(gone))
		defer t.step("discard.done")
		if err := t.limits.removeDir(filepath.Base(gone)); err != nil {
			t.counters.removeError()
			log.G(ctx).WithError(err).Warn("a removed snapshot's directory stays until the next cleanup")
		}
	})
	return nil
}
