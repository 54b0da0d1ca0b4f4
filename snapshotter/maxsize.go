package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

// A client may ask for a container's snapshot to hold at most so many bytes. Where root's file system enforces project
// quotas, the snapshot's directory gets a project and the project a limit. Elsewhere the container runs without one, as
// containerd's contract of the label has it.
//
// Order, so that a crash leaves nothing behind: the record names the project first; the empty directory gets it before
// the project gets its limit; the limit goes before anything in the directory does, and the id is given out again when
// all of it is gone.

// labelLimit is the project of an active snapshot and how many bytes it may hold: "project bytes".
const labelLimit = labelPrefix + "max-size"

const limitFormat = "%d %d"

const (
	// minSize is less than any container needs.
	minSize = 1 << 20
	// mountRoom is what a mount needs for directories of its own. The kernel mounts an overlay read-only that has no room
	// for them.
	mountRoom = 256 << 10
)

type limit struct {
	project quota.Project
	bytes   uint64
}

// limits are those of all snapshots. Safe for concurrent use once open.
type limits struct {
	*root
	projects *quota.Projects
	why      error // why the file system limits nothing; nil when it does

	warned sync.Once
	mu     sync.Mutex // guards of
	of     map[string]limit
}

// open finds out what can be limited, and which projects are in use. An id below snapshots/ that no record names any
// more, and its limit, go with the directory.
func (ls *limits) open(ctx context.Context, in quota.Range, stored records) {
	if in == (quota.Range{}) {
		in = quota.DefaultRange
	}
	dir := ls.path(dirSnapshots)
	ls.of = map[string]limit{}
	ls.projects = quota.NewProjects(in, dir, func(p quota.Project) (bool, error) {
		u, err := quota.Look(dir, p)
		return u.Idle(), err
	})
	ls.why = quota.Probe(dir)
	for _, sn := range stored.whole {
		var l limit
		if _, err := fmt.Sscanf(sn.Labels[labelLimit], limitFormat, &l.project, &l.bytes); err == nil {
			ls.keep(sn.id, l)
		} else if sn.Labels[labelPending] != "" && ls.why == nil { // committed, it has the project until it is ingested
			ls.keep(sn.id, limit{project: ls.projectOf(filepath.Join(dir, sn.id))})
		}
	}
	if n := len(ls.of); n > 0 && ls.why != nil {
		log.G(ctx).WithError(ls.why).Warnf("nothing keeps %d containers to their label %s any more: %s", n,
			snapshots.LabelSnapshotMaxSize, quota.Remedy)
	}
}

// take returns the limit that a snapshot about to be created is to have, and notes it in its labels. What is not for a
// container has none: the labels of a layer can come from an image's annotations.
func (ls *limits) take(ctx context.Context, key string, c creation, labels map[string]string) (l limit, err error) {
	text, ok := labels[snapshots.LabelSnapshotMaxSize]
	if !ok || c.extraction || c.view {
		return limit{}, nil
	}
	if l.bytes, err = parseSize(text); err != nil {
		return limit{}, err
	}
	if ls.why != nil {
		ls.warned.Do(func() {
			log.G(ctx).WithError(ls.why).Warnf("nothing keeps snapshot %q, and others, to label %s: %s", key,
				snapshots.LabelSnapshotMaxSize, quota.Remedy)
		})
		return limit{}, nil
	}
	if l.project, err = ls.projects.Take(); err != nil {
		return limit{}, fmt.Errorf("label %s = %q: %w", snapshots.LabelSnapshotMaxSize, text, err)
	}
	labels[labelLimit] = fmt.Sprintf(limitFormat, l.project, l.bytes)
	return l, nil
}

// parseSize reads the value of snapshots.LabelSnapshotMaxSize.
func parseSize(text string) (uint64, error) {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n < minSize || n > math.MaxInt64 {
		return 0, fmt.Errorf("label %s = %q: want a number of bytes in decimal digits, at least %d: %w",
			snapshots.LabelSnapshotMaxSize, text, minSize, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// keep notes the limit of a snapshot; one without project is none.
func (ls *limits) keep(id string, l limit) {
	if l.project == 0 {
		return
	}
	ls.projects.Keep(l.project)
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.of[id] = l
}

// giveBack undoes take and keep: nothing was made with them.
func (ls *limits) giveBack(id string, l limit) {
	if l.project == 0 {
		return
	}
	ls.mu.Lock()
	delete(ls.of, id)
	ls.mu.Unlock()
	ls.projects.Free(l.project)
}

// enforce makes the directory of a snapshot that has a limit, which counts for all that is made in there.
func (ls *limits) enforce(id string) error {
	ls.mu.Lock()
	l, ok := ls.of[id]
	ls.mu.Unlock()
	if !ok || ls.why != nil {
		return nil
	}
	dir := ls.path(dirSnapshots, id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := quota.Assign(dir, l.project); err != nil {
		return err
	}
	ls.step("limit.assigned")
	defer ls.step("limit.set")
	return quota.Limit(dir, l.project, l.bytes)
}

// makeRoom lets a container that has used up its limit be mounted again: with what a mount needs beyond it, so that it
// can remove files. Where root was copied to another disk, it puts the limit back first.
func (ls *limits) makeRoom(id string) error {
	ls.mu.Lock()
	l, ok := ls.of[id]
	ls.mu.Unlock()
	if !ok || ls.why != nil {
		return nil
	}
	dir := ls.path(dirSnapshots, id)
	u, err := quota.Look(dir, l.project)
	if err != nil {
		return err
	}
	if u, err = ls.restore(id, l, u); err != nil {
		return err
	}
	if want := max(l.bytes, u.Used+mountRoom); quota.Rounded(want) != u.Limit {
		return quota.Limit(dir, l.project, want)
	}
	return nil
}

// restore gives a snapshot's directory, and what it holds, the project that its record names. rsync, cp and tar copy no
// projects, and a new disk has no limits. The limit is set last: without one, what was interrupted begins anew.
func (ls *limits) restore(id string, l limit, u quota.Usage) (quota.Usage, error) {
	dir := ls.path(dirSnapshots, id)
	switch p, err := quota.Of(dir); {
	case err != nil:
		return u, err
	case p == l.project && u.Limit != 0:
		return u, nil
	case p != l.project && (u.Used != 0 || u.Inodes != 0):
		return u, fmt.Errorf("limit snapshot %s: project %d of %s has files of others: set project_ids to other ids, and "+
			"create the container anew: %w", id, l.project, dir, errdefs.ErrFailedPrecondition)
	}
	if err := errors.Join(quota.Limit(dir, l.project, 0), quota.AssignTree(dir, l.project)); err != nil {
		return u, err
	}
	ls.step("limit.assigned")
	return quota.Look(dir, l.project)
}

// projectOf returns the project that enforce has given to a snapshot's directory, or 0. Only what no container sees
// tells: its root may give its own directories other projects.
func (ls *limits) projectOf(dir string) quota.Project {
	parent, err := quota.Of(filepath.Dir(dir))
	if err != nil {
		return 0
	}
	for _, d := range []string{dir, filepath.Join(dir, "work")} { // to be moved, the first may have lost it
		if p, err := quota.Of(d); err == nil && p != 0 && p != parent {
			return p
		}
	}
	return 0
}

// removeDir deletes a directory below snapshots/ that no record names, and the limit that it may have.
func (ls *limits) removeDir(name string) error {
	dir := ls.path(dirSnapshots, name)
	if ls.why == nil {
		if p := ls.projectOf(dir); p != 0 {
			if err := quota.Limit(dir, p, 0); err != nil {
				return err
			}
			ls.step("limit.lifted")
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	ls.free(strings.TrimPrefix(name, goingPrefix))
	return nil
}

// free gives the project of a snapshot that has no directory, or none any more, to others.
func (ls *limits) free(id string) {
	ls.mu.Lock()
	l := ls.of[id]
	ls.mu.Unlock()
	ls.giveBack(id, l)
}

// move renames a directory below root, whatever project it has.
func (ls *limits) move(from, to string) error {
	err := quota.Rename(from, to)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("move %s: %w", from, err)
	}
	return err
}
