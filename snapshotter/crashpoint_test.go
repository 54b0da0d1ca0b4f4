package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Every named step of ingest, commit, removal, garbage collection, repair and the making of chain images is one at
// which a process kills itself: the first time that it comes by, in the middle and the last time. After each the store
// opens, shows all that was committed byte for byte, verifies, and holds nothing else. A step that the work does not
// come by fails the test.
func TestKilledAtEveryStep(t *testing.T) {
	needRoot(t)
	if raceDetector {
		t.Skip("runs without the race detector")
	}
	counts := crashSteps(t, t.TempDir(), "", 0, nil)
	for _, name := range stepNames {
		if counts[name] == 0 && (name != "chain.packs" || testPageCache() != lower.PageCachePrivate) {
			t.Errorf("nothing was killed at step %s: the work does not come by", name)
		}
	}
	kills := 0
	for name, n := range counts {
		if !slices.Contains(stepNames, name) {
			t.Errorf("step %s is not in the list", name)
		}
		at := []int{1, (n + 1) / 2, n}
		if os.Getenv("DEDUP_LONG") != "" {
			at = nil
			for i := range n {
				at = append(at, i+1)
			}
		}
		slices.Sort(at)
		for _, k := range slices.Compact(at) {
			t.Run(fmt.Sprintf("%s/%d of %d", name, k, n), func(t *testing.T) {
				root := t.TempDir()
				w := &crashWorld{root: root, have: map[string]crashSnapshot{}}
				t.Cleanup(func() { unmountAll(t, root) })
				if reached := crashSteps(t, root, name, k, w); reached == nil {
					w.check(t, 0)
				}
				// What was going on can be done again.
				crashSteps(t, root, "", 0, w)
				w.check(t, 0)
			})
			kills++
		}
	}
	t.Logf("%d kills at %d steps", kills, len(counts))
}

// stepNames are all there are; grep for step(" finds them.
var stepNames = []string{
	"prepare.recorded", "prepare.made", "view.mounted",
	"known.recorded", "applied.noted", "commit.recorded", "pending.ingested",
	"pending.noted",
	"compared.noted",
	"ingest.object", "ingest.tree", "ingest.synced", "ingest.renamed", "ingest.committed", "ingest.done",
	"facts.staged", "facts.renamed", "damaged.noted",
	"pack.sealed", "pack.renamed", "pack.removed", "merge.copied", "merge.synced", "merge.done",
	"chain.staged", "chain.renamed", "chain.mounting", "chain.packs", "chain.mounted", "chain.unmounted", "chain.dropped",
	"remove.recorded", "remove.tree", "remove.object", "remove.done", "discard.renamed", "discard.done", "open.sweep",
	"trim.released", "trim.collected",
	"recipe.staged", "recipe.renamed", "recipe.removed",
}

const stepEnv = "DEDUP_CRASH_STEP"

// crashSteps runs the work in a process that kills itself when it comes by a step for the nth time. It returns nil
// then, and how often each step was come by when the work went through.
func crashSteps(t *testing.T, root, step string, nth int, w *crashWorld) map[string]int {
	t.Helper()
	if w == nil {
		w = &crashWorld{root: root, have: map[string]crashSnapshot{}}
		defer unmountAll(t, root)
	}
	w.round++
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrashStepChild$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s\n%s\n%d\n%d", stepEnv, root, step, nth, w.round))
	counts := map[string]int{}
	w.steps = func(name string) { counts[name]++ }
	errs, killed := w.watch(t, cmd, 0)
	w.steps = nil
	if killed {
		return nil
	}
	if errs != "" {
		t.Logf("%s", errs)
	}
	if step != "" {
		t.Logf("the process did not come by %s %d times: it depends on what overtakes what", step, nth)
	}
	return counts
}

// TestCrashStepChild is the process that TestKilledAtEveryStep runs.
func TestCrashStepChild(t *testing.T) {
	text := os.Getenv(stepEnv)
	if text == "" {
		t.Skip("started by TestKilledAtEveryStep alone")
	}
	lines := strings.Split(text, "\n")
	nth, err := strconv.Atoi(lines[2])
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := 0
	hook := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf("step|%s\n", name)
		if name != lines[1] {
			return
		}
		if seen++; seen == nth {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // until it arrives
		}
	}
	if err := crashWork(ns(t, "crash"), lines[0], lines[3], hook); err != nil {
		fmt.Println("\nerror|" + strings.ReplaceAll(err.Error(), "\n", " "))
	}
	fmt.Println("\nended")
}

// crashWork comes by every step: layers from blobs and directories, known and new, large and small, their removal,
// damage and its repair, views, and a garbage collection.
func crashWork(ctx context.Context, root, round string, hook func(string)) error {
	s, err := New(ctx, Options{Root: root, RunDir: filepath.Join(root, "run"), Verity: testVerity(),
		PageCache: testPageCache(), noDense: testNoDense(), Step: hook})
	if err != nil {
		return err
	}
	fmt.Println("\nready")
	c := &crashChild{s: s, r: rand.New(rand.NewPCG(7, 3)), round: round, root: root, hook: hook}
	work := []func(context.Context) error{
		c.pull, c.pull, c.build, c.view, c.pullKnown, c.trim, c.pullLarge, c.harm, c.build, c.compare, c.view, c.merge,
		c.view, c.stay, c.remove, c.collect, c.remove, c.pull,
	}
	for _, do := range work {
		if err := do(ctx); err != nil {
			return err
		}
		s.layers.Wait()
	}
	for len(c.names) > 2 {
		if err := c.remove(ctx); err != nil {
			return err
		}
	}
	return s.Close()
}

// pullKnown is a hit in Prepare on the last layer that was pulled, and another blob of the same content.
func (c *crashChild) pullKnown(ctx context.Context) error {
	c.n++
	seed := c.lastSeed
	blob, err := tarOfFiles(crashFiles(seed))
	if err != nil {
		return err
	}
	in, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
	if err != nil {
		return err
	}
	c.s.Layers().Release(in.Layer)
	c.known = blob
	target := content.ChainID(in.DiffID)
	key := fmt.Sprintf("crash/%s-%d/extract-known", c.round, c.n)
	name := hitName("crash", "", target.Digest().String())
	_, err = c.s.Prepare(ctx, key, "", snapshots.WithLabels(map[string]string{labelRef: target.Digest().String()}))
	if !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("%s is not known: %w", target, err)
	}
	for _, have := range c.names {
		if have == name {
			return nil
		}
	}
	c.committed(name, "", seed)
	return nil
}

// stay has a view and a container lie over a step's directory while it is ingested.
func (c *crashChild) stay(ctx context.Context) error {
	if err := c.build(ctx); err != nil {
		return err
	}
	name, key := c.names[len(c.names)-1], fmt.Sprintf("crash/%s-%d/stays", c.round, c.n)
	_, err := c.s.View(ctx, key+"-view", name)
	if err == nil {
		_, err = c.s.Prepare(ctx, key, name)
	}
	if err == nil {
		_, err = c.s.resolve(ctx, name)
	}
	if err != nil {
		return err
	}
	return errors.Join(c.s.Remove(ctx, key+"-view"), c.s.Remove(ctx, key))
}

// compare notes what a snapshot was compared to, and then something else in its place.
func (c *crashChild) compare(ctx context.Context) error {
	c.n++
	name := c.names[len(c.names)-1]
	key := fmt.Sprintf("crash/%s-%d/compared-view", c.round, c.n)
	mounts, err := c.s.View(ctx, key, name)
	if err != nil {
		return err
	}
	pair, err := OpenPair(ctx, c.s, nil, mounts)
	if err != nil {
		return err
	}
	for _, data := range []string{"once", "again"} {
		blob, err := tarOfFiles(map[string]string{"compared": strings.Repeat(data, 1000)})
		if err != nil {
			return err
		}
		in, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
		if err == nil {
			err = pair.Keep(ctx, in.Layer)
		}
		if err != nil {
			return errors.Join(err, pair.Close())
		}
	}
	return errors.Join(pair.Close(), c.s.Remove(ctx, key))
}

// pullLarge ingests a payload that is staged in a file; the layer goes, and a recipe of its blob with it.
func (c *crashChild) pullLarge(ctx context.Context) error {
	blob, err := tarOfFiles(map[string]string{"large": strings.Repeat("large", 17<<20/5)})
	if err != nil {
		return err
	}
	in, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
	if err != nil {
		return err
	}
	defer c.s.Layers().Release(in.Layer)
	return layer.MakeRecipe(ctx, c.s.Layers(), in.DiffID, blobOfBytes(blob))
}

// merge has so many small packs that they are merged, while a view is mounted over some of them.
func (c *crashChild) merge(ctx context.Context) error {
	for c.s.layers.Packs().Stats().Packs < 10 {
		if err := c.pull(ctx); err != nil {
			return err
		}
	}
	key := fmt.Sprintf("crash/%s-%d/merged-view", c.round, c.n)
	if _, err := c.s.View(ctx, key, c.names[len(c.names)-1]); err != nil {
		return err
	}
	if err := c.s.layers.Compact(ctx); err != nil {
		return err
	}
	return c.s.Remove(ctx, key)
}

// harm damages an object and heals it by pulling again.
func (c *crashChild) harm(ctx context.Context) error {
	blob, err := tarOfFiles(map[string]string{"harmed": strings.Repeat("harmed", 1000)})
	if err != nil {
		return err
	}
	in, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
	if err != nil {
		return err
	}
	defer c.s.Layers().Release(in.Layer)
	place := placeOf(ctx, c.s, strings.Repeat("harmed", 1000))
	f, err := os.OpenFile(c.s.layers.Packs().Path(place.Pack), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 100), place.Offset+1000)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if found, err := c.s.Check(ctx, CheckOptions{}); err != nil || len(found) == 0 {
		return fmt.Errorf("found %v, %w", found, err)
	}
	again, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
	if err == nil {
		c.s.Layers().Release(again.Layer)
	}
	return err
}

func (c *crashChild) collect(ctx context.Context) error {
	_, err := c.s.GC(ctx, GCOptions{Chains: true})
	return err
}
