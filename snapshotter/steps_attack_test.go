package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
)

// openSteps is open for tests of steps that wait.
func openSteps(t *testing.T, root string) *Snapshotter {
	t.Helper()
	s := open(t, root)
	if s.kernel.Metacopy {
		t.Skip("with metacopy, steps are ingested at once")
	}
	return s
}

// A step that nobody comes to lie on is ingested all the same.
func TestStepsAreNotForgotten(t *testing.T) {
	for name, do := range map[string]func(t *testing.T, s *Snapshotter, steps []string){
		"a key that is taken": func(t *testing.T, s *Snapshotter, steps []string) {
			ctx := ns(t, "steps")
			_, err := s.Prepare(ctx, "taken", "")
			must(t, err)
			for _, key := range []string{"taken", "extract-1 taken"} {
				if key != "taken" {
					_, err := s.Prepare(ctx, key, "")
					must(t, err)
				}
				if _, err := s.Prepare(ctx, key, steps[1]); !errdefs.IsAlreadyExists(err) {
					t.Errorf("%s: %v", key, err)
				}
				must(t, s.Remove(ctx, key))
			}
		},
		"the step on top is removed": func(t *testing.T, s *Snapshotter, steps []string) {
			must(t, s.Remove(ns(t, "steps"), steps[1]))
		},
		"the step on top is ingested before": func(t *testing.T, s *Snapshotter, steps []string) {
			ctx := ns(t, "steps")
			_, err := s.Prepare(ctx, "user", steps[1])
			must(t, err)
			for _, p := range pendingOf(t, s) {
				if p.name == steps[1] {
					must(t, s.awaitIngest(ctx, p))
				}
			}
			must(t, s.Remove(ctx, "user"))
		},
		"an empty step is committed without having been mounted": func(t *testing.T, s *Snapshotter, steps []string) {
			ctx := ns(t, "steps")
			_, err := s.Prepare(ctx, "empty", steps[1])
			must(t, err)
			must(t, s.Commit(ctx, "empty step", "empty"))
		},
		"a view is removed": func(t *testing.T, s *Snapshotter, steps []string) {
			ctx := ns(t, "steps")
			_, err := s.View(ctx, "view", steps[0])
			must(t, err)
			must(t, s.Remove(ctx, "view"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, ctx := openSteps(t, t.TempDir()), ns(t, "steps")
			s.stepIdle = 300 * time.Millisecond
			one := addStep(t, s, ctx, stepBase(t, s, ctx), "one", file("one", "one"))
			two := addStep(t, s, ctx, one, "two", file("two", "two"))
			do(t, s, []string{one, two})
			for end := time.Now().Add(20 * s.stepIdle); len(pendingOf(t, s)) > 0; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("nobody ingests %v", pendingOf(t, s))
				}
			}
			holdsNoSteps(t, s)
		})
	}
}

func pendingOf(t *testing.T, s *Snapshotter) []pendingSnapshot {
	t.Helper()
	stored, err := s.db.records(t.Context())
	must(t, err)
	return stored.pending()
}

// holdsNoSteps: nothing is noted of steps once nothing lies over them.
func holdsNoSteps(t *testing.T, s *Snapshotter) {
	t.Helper()
	var left string
	for range 300 {
		s.mu.Lock()
		waiting := fmt.Sprint(s.waiting, len(s.jobs), len(s.ingests))
		s.mu.Unlock()
		s.steps.mu.Lock()
		left = fmt.Sprint(s.steps.users, s.steps.over, s.steps.done, waiting)
		s.steps.mu.Unlock()
		if left == "map[] map[] map[]map[] 0 0" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("noted of steps: %s", left)
}

// A step that cannot be ingested does not keep those below it from being ingested.
func TestIdleStepFails(t *testing.T) {
	for name, harm := range map[string]func(dir string) error{
		"its directory is gone": os.RemoveAll,
		"it has none": func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, ctx := openSteps(t, t.TempDir()), ns(t, "steps")
			s.stepIdle = time.Hour
			top := stepBase(t, s, ctx)
			for i := range 3 {
				top = addStep(t, s, ctx, top, fmt.Sprint("step ", i), file("new", fmt.Sprint(i)))
			}
			var id string
			for _, p := range pendingOf(t, s) {
				if p.name == top {
					id = p.id
				}
			}
			must(t, harm(s.upper(id)))
			s.stepIdle = 20 * time.Millisecond
			s.ingestIdle([]string{id})
			eventually(t, "the others are ingested", func() bool { return len(pendingOf(t, s)) == 1 })
			if left := pendingOf(t, s); left[0].name != top {
				t.Errorf("left: %v", left)
			}
			if got := read(t, s, "step 1", "new"); got != "1" {
				t.Errorf("new: %q", got)
			}
		})
	}
}

// What was written to a step whose record is damaged stays, also when those who lay over it are gone: somebody may put
// metadata.db back.
func TestDamagedStepKeepsItsFiles(t *testing.T) {
	root := t.TempDir()
	s, ctx := openSteps(t, root), ns(t, "steps")
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	_, err := s.View(ctx, "view", name)
	must(t, err)
	dir := stepBelow(t, s, ctx, "view")
	must(t, stop(s))
	damageRecords(t, filepath.Join(root, "metadata.db"), func(all, _ *bbolt.Bucket) error {
		return all.Bucket([]byte(name)).Put([]byte("inodes"), []byte{7})
	})
	s = open(t, root)
	_, err = s.Mounts(ctx, "view")
	if !errors.Is(err, errRecord) {
		t.Errorf("mounts over a damaged step: %v", err)
	}
	must(t, s.Remove(ctx, "view"))
	s.wg.Wait()
	if got, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
}

// Where options do not fit a mount, the steps below are ingested, and what lies on them can be compared, too.
func TestStepsDoNotFit(t *testing.T) {
	root := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	must(t, os.MkdirAll(root, 0o700))
	s, ctx := openSteps(t, root), ns(t, "steps")
	parent := stepBase(t, s, ctx)
	var view []mount.Mount
	for i := 0; ; i++ {
		parent = addStep(t, s, ctx, parent, fmt.Sprint("step ", i), file("last", fmt.Sprint(i)))
		var err error
		view, err = s.View(ctx, "view", parent)
		must(t, err)
		if !strings.Contains(view[0].Source, "/"+dirViews+"/") {
			break
		}
		must(t, s.Remove(ctx, "view"))
	}
	if stepBelow(t, s, ctx, "view") == "" {
		t.Fatal("too many steps are ingested, not those that do not fit")
	}
	for _, again := range []bool{false, true} {
		if again {
			must(t, s.Close())
			s = open(t, root)
		}
		p, err := OpenPair(ctx, s, nil, view)
		if err != nil {
			t.Errorf("compare %v: %v", view, err)
			continue
		}
		if _, err := os.Stat(filepath.Join(p.Upper, "last")); err != nil {
			t.Error(err)
		}
		must(t, p.Close())
	}
	must(t, s.Remove(ctx, "view"))
	holdsNoSteps(t, s)
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("mounted: %v", left)
	}
}

// Who asks for mounts while the snapshot is removed, or committed, leaves nothing mounted, and takes nothing away.
func TestMountsWhileItGoes(t *testing.T) {
	root := t.TempDir()
	s, ctx := openSteps(t, root), ns(t, "steps")
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	for key, do := range map[string]func(s *Snapshotter) error{
		"view":   func(s *Snapshotter) error { return s.Remove(ctx, "view") },
		"active": func(s *Snapshotter) error { return s.Commit(ctx, "committed", "active") },
	} {
		make := s.View
		if key == "active" {
			make = s.Prepare
		}
		mounts, err := make(ctx, key, name)
		must(t, err)
		if key == "active" {
			write(t, mounts, file("written", "written"))
		}
		must(t, stop(s))
		var once sync.Once
		hook := func(at string) {
			if at == "chain.mounting" {
				once.Do(func() { must(t, do(s)) })
			}
		}
		s, err = New(ctx, Options{Root: root, RunDir: filepath.Join(root, "run"), Step: hook, Verity: testVerity(),
			PageCache: testPageCache(), noDense: testNoDense()})
		must(t, err)
		t.Cleanup(func() { must(t, stop(s)) })
		if mounts, err := s.Mounts(ctx, key); !errdefs.IsNotFound(err) {
			t.Errorf("%v, %v", mounts, err)
		}
		eventually(t, "nothing is mounted", func() bool { return len(mountsBelow(t, root)) == 0 })
	}
	if got := read(t, s, "committed", "written"); got != "written" {
		t.Errorf("%q", got)
	}
}

// Many who ask for a view over steps at once get one mount.
func TestViewIsMountedOnce(t *testing.T) {
	root := t.TempDir()
	s, ctx := openSteps(t, root), ns(t, "steps")
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	view, err := s.View(ctx, "view", name)
	must(t, err)
	for range 5 {
		must(t, mount.UnmountAll(view[0].Source, 0)) // as after a reboot
		errs := make(chan error)
		for range 8 {
			go func() {
				_, err := s.Mounts(ctx, "view")
				errs <- err
			}()
		}
		for range 8 {
			must(t, <-errs)
		}
		if n := len(mountsBelow(t, filepath.Dir(view[0].Source))); n != 1 {
			t.Errorf("%d mounts", n)
		}
	}
	must(t, s.Remove(ctx, "view"))
}

// Where metadata.db cannot be written, the next snapshot gets the id of the one that was not stored. What it lies over
// stays.
func TestIDOfFailedSnapshot(t *testing.T) {
	st := newSteps()
	failed, next := []string{"3", "2", "1"}, []string{"2", "1"}
	st.use("7", failed)
	st.use("7", next)
	if idle, _ := st.takeBack("7", failed); !slices.Equal(idle, []string{"3"}) || !st.inUse("2") || !st.inUse("1") {
		t.Errorf("idle: %v; users %v", idle, st.users)
	}
	if idle, _ := st.unuse("7"); !slices.Equal(idle, next) {
		t.Errorf("idle: %v", idle)
	}
	st.use("8", failed)
	if idle, _ := st.takeBack("8", failed); !slices.Equal(idle, failed) {
		t.Errorf("idle: %v", idle)
	}
	if idle, _ := st.takeBack("", failed); len(st.users)+len(st.over)+len(st.done) > 0 {
		t.Errorf("idle: %v; %v, %v", idle, st.users, st.over)
	}
}
