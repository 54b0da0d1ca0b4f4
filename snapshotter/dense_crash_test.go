package snapshotter

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// denseSteps are those at which the first start under an older kernel is killed; each comes by more than once.
var denseSteps = []string{
	"merge.copied", "pack.sealed", "pack.renamed", "merge.synced", "pack.removed", "merge.done", "chain.staged",
	"chain.renamed", "chain.mounting", "chain.mounted", "open.sweep",
}

const (
	denseEnv  = "DEDUP_DENSE_CHILD"
	childView = "view of the child"
)

// A daemon is killed at every step of its first start under an older kernel: while dense images go, packs are copied
// for containers, and the rest of them in the background. After each the store opens under either kernel with all that
// was there.
func TestKilledCopyingDensePacks(t *testing.T) {
	needDense(t)
	if raceDetector {
		t.Skip("runs without the race detector")
	}
	first := newDenseWorld(t, testPageCache(), testVerity())
	first.open(false)
	first.fill()
	must(t, stop(first.s))
	n := 0
	for _, step := range denseSteps {
		for _, nth := range []int{1, 3} {
			if step == "open.sweep" && nth > 1 {
				continue
			}
			n++
			older := n%2 == 0
			t.Run(fmt.Sprintf("%s %d older %v", step, nth, older), func(t *testing.T) {
				w := newDenseWorld(t, testPageCache(), testVerity())
				w.views, w.active = maps.Clone(first.views), maps.Clone(first.active)
				must(t, os.Remove(w.root))
				out, err := exec.CommandContext(t.Context(), "cp", "-a", first.root, w.root).CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCopyingChild$", "-test.v")
				names := slices.Concat(slices.Collect(maps.Keys(w.views)), slices.Collect(maps.Keys(w.active)))
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s\n%s\n%d\n%s", denseEnv, w.root, step, nth,
					strings.Join(names, "\n")))
				if out, err := cmd.CombinedOutput(); err == nil || cmd.ProcessState.Exited() {
					t.Fatalf("it was not killed: %v: %s", err, out)
				}
				unmountAll(t, w.root)
				s := w.open(older)
				if err := s.Remove(ns(t, "dense"), childView); err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
				w.check()
				if older {
					w.becomesCoarse()
				}
				w.reboot(!older)
				w.check()
				left := slices.Concat(mustGlob(t, filepath.Join(w.root, "ingest/*")),
					mustGlob(t, filepath.Join(w.root, "rm-*")))
				if len(left) > 0 {
					t.Errorf("left: %q", left)
				}
			})
		}
	}
}

// TestCopyingChild is the process that TestKilledCopyingDensePacks kills.
func TestCopyingChild(t *testing.T) {
	text := os.Getenv(denseEnv)
	if text == "" {
		t.Skip("started by TestKilledCopyingDensePacks alone")
	}
	lines := strings.Split(text, "\n")
	nth, err := strconv.Atoi(lines[2])
	must(t, err)
	var mu sync.Mutex
	hook := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if name != lines[1] {
			return
		}
		if nth--; nth == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // until it arrives
		}
	}
	s, err := New(t.Context(), Options{Root: lines[0], RunDir: filepath.Join(lines[0], "run"), Verity: testVerity(),
		PageCache: testPageCache(), Step: hook, noDense: errNoDense})
	must(t, err)
	ctx := ns(t, "dense")
	for _, name := range lines[3:] {
		if _, active := strings.CutPrefix(name, "container of "); active {
			_, err = s.Mounts(ctx, name)
		} else {
			_, err = s.View(ctx, childView, name)
			err = errors.Join(err, s.Remove(ctx, childView))
		}
		must(t, err)
	}
	must(t, s.layers.Compact(ctx))
	must(t, s.Close())
}

// A store of layout 5 has coarse packs only. It is served as it is, and new packs are dense. A build of before does not
// open it any more.
func TestUpgradeFromLayout5(t *testing.T) {
	onDense(t, func(t *testing.T, w *denseWorld) {
		w.open(true) // what a build of layout 5 wrote
		base := w.fill()
		w.check()
		must(t, stop(w.s))
		packs, images := w.densities()
		format := filepath.Join(w.root, "format")
		must(t, os.WriteFile(format, []byte("5\n"), 0o600))
		if _, err := OpenOffline(t.Context(), w.root, filepath.Join(w.root, "run")); err == nil ||
			!strings.Contains(err.Error(), `has layout "5"`) {
			t.Errorf("looked at without a daemon: %v", err)
		}
		// What a kill while the version is noted leaves.
		must(t, os.WriteFile(format+".new", []byte("6"), 0o600))
		s := w.open(false)
		if got, err := os.ReadFile(format); err != nil || string(got) != "6\n" {
			t.Errorf("format %q, %v", got, err)
		}
		if p, i := w.densities(); !maps.Equal(p, packs) || !maps.Equal(i, images) || p[true]+i[true] > 0 {
			t.Errorf("packs %v became %v, images %v became %v", packs, p, images, i)
		}
		builds := s.Stats().Builds
		w.check()
		if n := s.Stats().Builds - builds; n != 0 {
			t.Errorf("%d images were built again", n)
		}
		name, _ := unpack(t, s, "dense", base, layerTar(t, denseTexts(200, 230)), nil)
		w.views[name] = w.view(name)
		w.start("container of "+name, name)
		w.check()
		if p, i := w.densities(); p[true] < 1 || i[true] < 1 {
			t.Errorf("with one more image: packs %v, images %v", p, i)
		}
		w.reboot(true) // and back
		w.check()
		w.reboot(false)

		must(t, stop(w.s))
		for _, layout := range []string{"7", "6 "} {
			must(t, os.WriteFile(format, []byte(layout+"\n"), 0o600))
			o := Options{Root: w.root, RunDir: filepath.Join(w.root, "run"), Verity: w.verity, PageCache: w.cache}
			if s, err := New(t.Context(), o); err == nil || !strings.Contains(err.Error(), "use the build that wrote it") {
				t.Errorf("layout %q: %v, %v", layout, s, err)
			}
		}
		must(t, os.WriteFile(format, []byte("6\n"), 0o600))
		w.open(false)
		w.check()
	})
}
