package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// stepNode is a committed step, or the image below all.
type stepNode struct {
	name   string
	parent *stepNode
	files  map[string]string
	busy   int // who uses it, and its children
	gone   bool
}

// kept is an active snapshot or a view that stays.
type kept struct {
	key    string
	on     *stepNode
	mounts []mount.Mount
}

// stepWorld is what clients know who work on steps at random.
type stepWorld struct {
	s  *Snapshotter
	at string // for mount points

	mu    sync.Mutex // guards what follows
	n     int
	nodes []*stepNode
	kept  []*kept
	did   map[string]int
}

// take picks a step, which stays until give.
func (w *stepWorld) take(r *rand.Rand, leaf bool) (n *stepNode, key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	for range 20 {
		n := w.nodes[r.IntN(len(w.nodes))]
		if !n.gone && (!leaf || n.busy == 0 && n.parent != nil) {
			n.busy++
			n.gone = leaf
			return n, fmt.Sprint("key-", w.n)
		}
	}
	return nil, ""
}

func (w *stepWorld) give(n *stepNode) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n.busy--
}

func (w *stepWorld) count(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.did[what]++
}

// shows compares what mounts show.
func (w *stepWorld) shows(mounts []mount.Mount, want map[string]string) error {
	return w.in(mounts, func(root string) error {
		got := map[string]string{}
		err := filepath.Walk(root, func(path string, fi os.FileInfo, err error) error {
			if err != nil || !fi.Mode().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			got[strings.TrimPrefix(path, root+"/")] = string(data)
			return err
		})
		if err == nil && !maps.Equal(got, want) {
			err = fmt.Errorf("%v shows %v, want %v", mounts, got, want)
		}
		return err
	})
}

func (w *stepWorld) in(mounts []mount.Mount, do func(root string) error) error {
	at, err := os.MkdirTemp(w.at, "")
	if err != nil {
		return err
	}
	if err := mount.All(mounts, at); err != nil {
		return fmt.Errorf("%v: %w", mounts, err)
	}
	return errors.Join(do(at), mount.UnmountAll(at, 0), os.Remove(at))
}

// commit puts a step on another.
func (w *stepWorld) commit(ctx context.Context, r *rand.Rand) error {
	on, key := w.take(r, false)
	mounts, err := w.s.Prepare(ctx, key, on.name)
	if err != nil {
		return err
	}
	n := &stepNode{name: "step-" + key, parent: on, files: maps.Clone(on.files)}
	err = w.in(mounts, func(root string) (err error) {
		for range r.IntN(4) {
			name := fmt.Sprint("f", r.IntN(6))
			if r.IntN(3) == 0 {
				name = fmt.Sprint("d", r.IntN(2))
				for path := range n.files {
					if strings.HasPrefix(path, name+"/") {
						delete(n.files, path)
					}
				}
				err = errors.Join(err, os.RemoveAll(filepath.Join(root, name)), os.Mkdir(filepath.Join(root, name), 0o755))
				name += "/f"
			}
			delete(n.files, name)
			err = errors.Join(err, os.RemoveAll(filepath.Join(root, name)))
			if r.IntN(3) > 0 {
				n.files[name] = key
				err = errors.Join(err, os.WriteFile(filepath.Join(root, name), []byte(key), 0o644))
			}
		}
		return err
	})
	if err == nil {
		err = w.s.Commit(ctx, n.name, key)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes = append(w.nodes, n)
	return err
}

// look looks at a step through a view or a container.
func (w *stepWorld) look(ctx context.Context, r *rand.Rand) error {
	on, key := w.take(r, false)
	do := w.s.View
	if r.IntN(2) == 0 {
		do = w.s.Prepare
	}
	mounts, err := do(ctx, key, on.name)
	if err != nil {
		return err
	}
	if err := w.shows(mounts, on.files); err != nil {
		return err
	}
	if _, err := w.s.Usage(ctx, key); err != nil {
		return err
	}
	if r.IntN(3) == 0 {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.kept = append(w.kept, &kept{key, on, mounts})
		return nil
	}
	err = w.s.Remove(ctx, key)
	w.give(on)
	return err
}

// leave looks at what stayed, and takes it away.
func (w *stepWorld) leave(ctx context.Context, r *rand.Rand) error {
	w.mu.Lock()
	if len(w.kept) == 0 {
		w.mu.Unlock()
		return nil
	}
	i := r.IntN(len(w.kept))
	k := w.kept[i]
	w.kept = append(w.kept[:i:i], w.kept[i+1:]...)
	w.mu.Unlock()
	if err := w.shows(k.mounts, k.on.files); err != nil {
		return fmt.Errorf("as it was told: %w", err)
	}
	mounts, err := w.s.Mounts(ctx, k.key)
	if err == nil {
		err = w.shows(mounts, k.on.files)
	}
	if err == nil {
		err = w.s.Remove(ctx, k.key)
	}
	w.give(k.on)
	return err
}

func (w *stepWorld) remove(ctx context.Context, r *rand.Rand) error {
	n, _ := w.take(r, true)
	if n == nil {
		return nil
	}
	if err := w.s.Remove(ctx, n.name); err != nil {
		return err
	}
	w.give(n.parent)
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, m := range w.nodes {
		if m == n {
			w.nodes = append(w.nodes[:i:i], w.nodes[i+1:]...)
			break
		}
	}
	return nil
}

// compare opens a pair of a step and another one, its parent mostly.
func (w *stepWorld) compare(ctx context.Context, r *rand.Rand) error {
	on, key := w.take(r, false)
	defer w.give(on)
	upper, err := w.s.View(ctx, key, on.name)
	if err != nil {
		return err
	}
	var below []mount.Mount
	under := on.parent
	if r.IntN(3) == 0 { // or any other step
		under, _ = w.take(r, false)
		defer w.give(under)
	}
	if under != nil {
		if below, err = w.s.View(ctx, key+"-below", under.name); err != nil {
			return err
		}
	}
	p, err := OpenPair(ctx, w.s, below, upper)
	if err != nil {
		return err
	}
	for dir, of := range map[string]*stepNode{p.Upper: on, p.Lower: under} {
		if of != nil {
			err = errors.Join(err, w.shows([]mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}},
				of.files))
		}
	}
	err = errors.Join(err, p.Close(), w.s.Remove(ctx, key))
	if below != nil {
		err = errors.Join(err, w.s.Remove(ctx, key+"-below"))
	}
	return err
}

// giveUp asks for a snapshot, and does not wait for the answer.
func (w *stepWorld) giveUp(ctx context.Context, r *rand.Rand) error {
	on, key := w.take(r, false)
	defer w.give(on)
	short, cancel := context.WithTimeout(ctx, time.Duration(r.IntN(5000))*time.Microsecond)
	defer cancel()
	do := w.s.View
	if r.IntN(2) == 0 {
		do = w.s.Prepare
	}
	_, err := do(short, key, on.name)
	if rerr := w.s.Remove(ctx, key); rerr != nil && (err == nil || !errdefs.IsNotFound(rerr)) {
		return rerr
	}
	return nil
}

// care is what somebody does who looks after a store.
func (w *stepWorld) care(ctx context.Context, r *rand.Rand) (err error) {
	switch r.IntN(4) {
	case 0:
		_, err = w.s.Check(ctx, CheckOptions{Repair: true})
	case 1:
		_, err = w.s.GC(ctx, GCOptions{Chains: true})
	case 2:
		err = w.s.Cleanup(ctx)
	case 3:
		err = w.s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
			_, err := w.s.Stat(ctx, info.Name)
			_, uerr := w.s.Usage(ctx, info.Name)
			if err = errors.Join(err, uerr); errdefs.IsNotFound(err) {
				err = nil
			}
			return err
		})
	}
	return err
}

// work does things at random.
func (w *stepWorld) work(ctx context.Context, r *rand.Rand, things int) error {
	all := []struct {
		name string
		do   func(context.Context, *rand.Rand) error
	}{
		{"commit", w.commit}, {"commit", w.commit}, {"look", w.look}, {"look", w.look}, {"leave", w.leave},
		{"leave", w.leave}, {"remove", w.remove}, {"remove", w.remove}, {"compare", w.compare}, {"give up", w.giveUp},
		{"care", w.care},
	}
	for range things {
		what := all[r.IntN(len(all))]
		if err := what.do(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", what.name, err)
		}
		w.count(what.name)
	}
	return nil
}

// Whatever many clients do with steps at once, every view and container shows what was committed, also over restarts
// while they are there, and nothing is left of what is gone.
func TestStepsAtRandom(t *testing.T) {
	rounds, things := 3, 25
	if os.Getenv("DEDUP_LONG") != "" {
		rounds, things = 30, 100
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	root := t.TempDir()
	s, ctx := open(t, root), ns(t, "steps")
	base := stepBase(t, s, ctx)
	w := &stepWorld{s: s, at: t.TempDir(), did: map[string]int{}, nodes: []*stepNode{
		{name: base, files: map[string]string{"etc/base": "base", "etc/gone": "gone"}},
	}}
	for round := range rounds {
		w.s.stepIdle = []time.Duration{time.Millisecond, 30 * time.Millisecond, time.Hour}[round%3]
		errs := make(chan error)
		for i := range 4 {
			r := rand.New(rand.NewPCG(seed, uint64(4*round+i)))
			go func() { errs <- w.work(ctx, r, things) }()
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			return
		}
		must(t, w.s.Close())
		w.s = open(t, root)
	}
	r := rand.New(rand.NewPCG(seed, 99))
	for len(w.kept) > 0 {
		must(t, w.leave(ctx, r))
	}
	for len(w.nodes) > 1 {
		must(t, w.remove(ctx, r))
	}
	must(t, w.s.Remove(ctx, base))
	t.Log(w.did)
	holdsNoSteps(t, w.s)
	holdsNothingElse(t, w.s, ctx)
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("mounted: %v", left)
	}
	if left, err := filepath.Glob(filepath.Join(root, "run", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("below the run directory: %v, %v", left, err)
	}
}
