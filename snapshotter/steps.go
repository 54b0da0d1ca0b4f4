package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// A step is a committed snapshot whose directory somebody wrote through a container: a RUN of a build, a commit. What
// is put on it at once lies over its directory, as with overlayfs, and waits neither for an ingest nor for a chain
// image. Its directory is ingested when nothing has lain on it for a while, or when somebody needs its layer. While an
// active snapshot or a view lies on the directory, it stays, ingested or not: its own record names the directories
// below it (labelOver).
const (
	// pendingStep is labelPending of a step; other pending snapshots are ingested right after their commit.
	pendingStep = "step"
	// maxSteps is how many directories may lie over a chain image. With more, all of them are ingested.
	maxSteps = 24
	// stepIdle is how long nothing lies on a step before its directory is ingested. A build puts the next step on it in
	// much less, and a push compares it.
	stepIdle = 10 * time.Second
	// dirViews holds, below the run directory, the mount points of views that lie over steps.
	dirViews = "v"
)

// steps are the directories of steps, and who lies over them. Safe for concurrent use.
type steps struct {
	mu sync.Mutex // guards what follows
	// users are the ids of snapshots, by the id of a step that they lie over; over is the way back.
	users map[string]map[string]bool
	over  map[string][]string
	// done are the steps that need their directory no more, and keep it for its users.
	done map[string]bool
}

func newSteps() *steps {
	return &steps{users: map[string]map[string]bool{}, over: map[string][]string{}, done: map[string]bool{}}
}

// use notes that a snapshot lies over the directories of steps.
func (st *steps) use(user string, ids []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, id := range ids {
		if st.users[id] == nil {
			st.users[id] = map[string]bool{}
		}
		st.users[id][user] = true
	}
	if len(ids) > 0 {
		st.over[user] = ids
	}
}

// unuse takes a use back. idle are the steps on which nothing lies any more; of these, gone need no directory.
func (st *steps) unuse(user string) (idle, gone []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	ids := st.over[user]
	delete(st.over, user)
	return st.drop(user, ids)
}

// takeBack is unuse for a snapshot that could not be stored after it had begun to use ids. Another one may have got its
// id since, and keeps what it uses itself.
func (st *steps) takeBack(user string, ids []string) (idle, gone []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	now := st.over[user]
	if len(now) > 0 && len(ids) > 0 && &now[0] == &ids[0] { // it is the same use
		delete(st.over, user)
		now = nil
	}
	return st.drop(user, slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return slices.Contains(now, id) }))
}

// drop removes a user of steps. Under mu.
func (st *steps) drop(user string, ids []string) (idle, gone []string) {
	for _, id := range ids {
		delete(st.users[id], user)
		if len(st.users[id]) > 0 {
			continue
		}
		delete(st.users, id)
		idle = append(idle, id)
		if st.done[id] {
			delete(st.done, id)
			gone = append(gone, id)
		}
	}
	return idle, gone
}

// keep tells whether the directory of a step that needs it no more has to stay for those who lie over it. It goes with
// the last of them.
func (st *steps) keep(id string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.users[id]) == 0 {
		return false
	}
	st.done[id] = true
	return true
}

// kept tells whether a directory stays that keep was asked for.
func (st *steps) kept(id string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.done[id]
}

func (st *steps) inUse(id string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return len(st.users[id]) > 0
}

// overOf returns the ids of the steps that a stored snapshot lies over, the topmost first.
func overOf(info snapshots.Info) []string { return strings.Fields(info.Labels[labelOver]) }

// stepsOn returns the ids of the steps that what is put on name lies over, the topmost first: none where they are too
// many. In a transaction.
func stepsOn(ctx context.Context, name string) (ids []string, err error) {
	if ids, err = allSteps(ctx, name); len(ids) > maxSteps {
		return nil, err
	}
	return ids, err
}

// allSteps returns the ids of the steps that lie on top of each other, name the topmost. In a transaction.
func allSteps(ctx context.Context, name string) (ids []string, err error) {
	for name != "" {
		id, info, _, err := getInfo(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("snapshot %q: %w", name, err)
		}
		if info.Labels[labelPending] != pendingStep {
			break
		}
		ids = append(ids, id)
		name = info.Parent
	}
	return ids, nil
}

// lieOver has something that is no stored snapshot lie over the steps below name, until leave.
func (g *ingester) lieOver(ctx context.Context, user, name string) (ids []string, err error) {
	look := func() (now []string, err error) {
		if g.kernel.Metacopy { // a kernel before this one let others lie over it
			return nil, nil
		}
		err = g.db.view(ctx, func(ctx context.Context) error {
			now, err = stepsOn(ctx, name)
			return err
		})
		return now, err
	}
	if ids, err = look(); err != nil {
		return nil, err
	}
	for {
		g.steps.use(user, ids)
		// An ingest that ends from here on sees the use. One that ended before shows in the records.
		now, err := look()
		if err != nil || slices.Equal(now, ids) {
			return ids, err
		}
		g.ingestIdle(g.leave(ctx, user))
		ids = now
	}
}

// leave ends the use that a snapshot, or something else, makes of steps, and returns those on which nothing lies any
// more, the topmost first.
func (g *ingester) leave(ctx context.Context, user string) (idle []string) {
	idle, gone := g.steps.unuse(user)
	g.discardSteps(ctx, gone)
	return idle
}

// discardSteps discards the directories of steps that need them no more, and over which nothing lies any more.
func (g *ingester) discardSteps(ctx context.Context, gone []string) {
	for _, id := range gone {
		if err := g.discard(ctx, id); err != nil {
			g.counters.removeError()
			log.G(ctx).WithError(err).Warn("the directory of an ingested step stays until the next cleanup")
		}
	}
}

// idleJob names the job of an idle step. It is no snapshot's name: those have jobs of their own, and are used again.
func idleJob(id string) string { return "\x00" + id }

// ingestIdle ingests the first of these steps that waits, and all below it, if nothing lies on it in a while. Where
// that fails, those below are tried by themselves.
func (g *ingester) ingestIdle(ids []string) {
	id, name := g.firstWaiting(ids)
	if id == "" {
		return
	}
	g.startJob(g.ctx, idleJob(id), g.stepIdle, func(ctx context.Context) error {
		if g.steps.inUse(id) {
			return nil // who leaves last begins anew
		}
		_, err := g.resolve(ctx, name)
		if err == nil || isGone(err) { // it may have been faster than who noted that it waits
			g.waitsNoMore(id)
		}
		if err != nil && ctx.Err() == nil {
			g.ingestIdle(g.stepsBelow(ctx, name)) // nothing is wrong with these
		}
		return err // the log has it
	})
}

// stepsBelow returns the steps below a step, the topmost first. What is wrong with its record does not concern them:
// there are none then.
func (g *ingester) stepsBelow(ctx context.Context, name string) (ids []string) {
	_ = g.db.view(ctx, func(ctx context.Context) error {
		_, info, _, err := getInfo(ctx, name)
		if err == nil {
			ids, err = allSteps(ctx, info.Parent)
		}
		return err
	})
	return ids
}

// firstWaiting returns the first of these steps that waits for its ingest, and its name; "" for none.
func (g *ingester) firstWaiting(ids []string) (id, name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, id := range ids {
		if name, ok := g.waiting[id]; ok {
			return id, name
		}
	}
	return "", ""
}

// putOff keeps steps from being ingested for being idle, while something lies on them.
func (g *ingester) putOff(ids []string) {
	for _, id := range ids {
		g.cancelBuild(idleJob(id))
	}
	if len(ids) > 0 && !g.steps.inUse(ids[0]) { // any more
		g.ingestIdle(ids)
	}
}

// waits notes that a step waits for its ingest.
func (g *ingester) waits(p pendingSnapshot) {
	g.mu.Lock()
	g.waiting[p.id] = p.name
	g.mu.Unlock()
	g.ingestIdle([]string{p.id})
}

func (g *ingester) waitsNoMore(id string) {
	g.mu.Lock()
	delete(g.waiting, id)
	g.mu.Unlock()
	g.cancelBuild(idleJob(id))
}

// errNoSteps: what lies below cannot be shown as directories of steps.
var errNoSteps = errors.New("the steps below have to be ingested")

// belowSteps is below for what lies over steps: their directories, and the chain image below the lowest of them.
func (m *mounter) belowSteps(ctx context.Context, c creation) (below, error) {
	base := c
	base.over = nil
	err := m.db.view(ctx, func(ctx context.Context) error {
		for range c.over {
			_, info, _, err := getInfo(ctx, base.parent)
			if err != nil {
				return fmt.Errorf("snapshot %q: %w", base.parent, err)
			}
			base.parent = info.Parent
		}
		return nil
	})
	if err != nil {
		return below{}, err
	}
	l, err := m.below(ctx, base)
	if err != nil {
		return below{}, err
	}
	for _, id := range c.over {
		dir := m.upper(id)
		if _, err := os.Stat(dir); err != nil {
			return below{}, fmt.Errorf("%w: %w", errNoSteps, err)
		}
		l.steps = append(l.steps, dir)
	}
	stack := l.stack()
	stack.Upper, stack.Work = m.upper(c.id), m.work(c.id)
	if _, err := m.kernel.Overlay(stack); errors.Is(err, lower.ErrTooLong) {
		return below{}, fmt.Errorf("%w: %w", errNoSteps, err)
	}
	return l, nil
}

// besideSteps is added to the id of a snapshot that lies over steps, and uses the chain image of all below it, too.
const besideSteps = "+"

func (s *store) viewPoint(id string) string { return filepath.Join(s.opts.RunDir, dirViews, id) }

// clearViews unmounts the views over steps that no stored snapshot is.
func (s *store) clearViews(stored records) error {
	is := map[string]bool{}
	for _, sn := range stored.whole {
		is[sn.id] = sn.Kind == snapshots.KindView
	}
	files, err := os.ReadDir(filepath.Join(s.opts.RunDir, dirViews))
	if errors.Is(err, os.ErrNotExist) || !stored.complete() {
		return nil
	}
	for _, f := range files {
		if !is[f.Name()] {
			err = errors.Join(err, lower.UnmountView(s.viewPoint(f.Name())))
		}
	}
	return err
}

// loadSteps notes who lies over which steps.
func (s *Snapshotter) loadSteps(stored records) {
	ingested := map[string]bool{} // a step whose record is damaged may be none of them
	for _, sn := range stored.whole {
		s.steps.use(sn.id, overOf(sn.Info))
		_, ingested[sn.id] = layerOf(sn.Info)
	}
	for _, sn := range stored.whole {
		for _, id := range overOf(sn.Info) {
			if ingested[id] {
				s.steps.keep(id)
			}
		}
	}
}
