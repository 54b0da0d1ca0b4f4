package snapshotter

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// A process that works on a store is killed at random moments, again and again. After each, the store opens, shows all
// that was committed byte for byte, and holds nothing else. DEDUP_LONG=1 kills 2,000 times, and DEDUP_KILLS=n that
// often.
func TestKilledAtAnyMoment(t *testing.T) {
	needRoot(t)
	if raceDetector {
		t.Skip("runs without the race detector")
	}
	kills := 25
	if os.Getenv("DEDUP_LONG") != "" {
		kills = 2000
	}
	if text := os.Getenv("DEDUP_KILLS"); text != "" {
		var err error
		if kills, err = strconv.Atoi(text); err != nil {
			t.Fatalf("DEDUP_KILLS: %v", err)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d, %d kills", seed, kills)
	r := rand.New(rand.NewPCG(seed, 0))
	root := t.TempDir()
	w := &crashWorld{root: root, have: map[string]crashSnapshot{}}
	t.Cleanup(func() { unmountAll(t, root) })
	for i := range kills {
		w.run(t, r.Uint64(), time.Duration(2+r.IntN(120))*time.Millisecond)
		w.check(t, i)
		if t.Failed() {
			t.Fatalf("after kill %d", i)
		}
	}
	t.Logf("%d commits, %d removals were acknowledged; %d snapshots at the end", w.commits, w.removals, len(w.have))
	if w.commits < kills/4 {
		t.Error("the process did too little to be worth killing")
	}
}

// crashSnapshot is one that a client was told of. Its content follows from the seed.
type crashSnapshot struct {
	parent string
	seed   uint64
	// going: its removal was asked for; it may be there or not.
	going bool
}

// crashWorld is what clients know.
type crashWorld struct {
	root              string
	have              map[string]crashSnapshot
	round             int
	commits, removals int
	steps             func(name string) // hears what the process comes by; may be nil
}

const crashEnv = "DEDUP_CRASH_CHILD"

// run starts the process and kills it.
func (w *crashWorld) run(t *testing.T, seed uint64, after time.Duration) {
	t.Helper()
	w.round++
	var known []string
	for name, s := range w.have {
		known = append(known, fmt.Sprintf("%s|%s|%d", name, s.parent, s.seed))
	}
	slices.Sort(known)
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$", "-test.v")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s\n%d\n%d\n%s", crashEnv, w.root, seed, w.round,
		strings.Join(known, "\n")))
	if errs, killed := w.watch(t, cmd, after); !killed {
		t.Fatalf("the process ended by itself: %s", errs)
	}
}

// watch runs the process, and kills it some time after it is ready, unless after is 0.
func (w *crashWorld) watch(t *testing.T, cmd *exec.Cmd, after time.Duration) (stderr string, killed bool) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	var kill <-chan time.Time
	for open := true; open; {
		select {
		case line, ok := <-lines:
			if open = ok; !ok {
				break
			}
			if line == "ready" && after > 0 {
				kill = time.After(after)
			}
			w.note(t, line)
		case <-kill:
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			kill = nil
		}
	}
	_ = cmd.Wait() // killed
	return errs.String(), !cmd.ProcessState.Exited()
}

// note takes what the process said.
func (w *crashWorld) note(t *testing.T, line string) {
	t.Helper()
	f := strings.Split(line, "|")
	switch f[0] {
	case "committed":
		var seed uint64
		if _, err := fmt.Sscan(f[3], &seed); err != nil {
			t.Fatal(err)
		}
		w.have[f[1]] = crashSnapshot{parent: f[2], seed: seed}
		w.commits++
	case "removing":
		s := w.have[f[1]]
		s.going = true
		w.have[f[1]] = s
	case "removed":
		delete(w.have, f[1])
		w.removals++
	case "step":
		if w.steps != nil {
			w.steps(f[1])
		}
	case "error":
		t.Error(line)
	}
}

// check opens the store and compares it with what clients know.
func (w *crashWorld) check(t *testing.T, kill int) {
	t.Helper()
	s, err := New(t.Context(), Options{Root: w.root, RunDir: filepath.Join(w.root, "run"), Verity: testVerity(),
		PageCache: testPageCache(), noDense: testNoDense()})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := ns(t, "crash")
	dropStrays(t, s, ctx, w.have)
	names := map[string]bool{}
	if err := s.Walk(ctx, func(_ context.Context,
		info snapshots.Info) error {
		names[info.Name] = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for name, known := range w.have {
		if known.going && !names[name] {
			delete(w.have, name)
			continue
		}
		known.going = false
		w.have[name] = known
		if !names[name] {
			t.Errorf("%s was committed, and is gone", name)
			continue
		}
		if kill%4 == 0 || known.seed%4 == 0 { // a look at all each time would be most of the test
			if got, want := files(t, s, ctx, name), w.content(name); !equalFiles(got, want) {
				t.Errorf("%s shows %d files, want %d", name, len(got), len(want))
			}
		}
	}
	holdsNothingElse(t, s, ctx)
	if kill%4 == 0 {
		if found, err := s.Check(ctx, CheckOptions{}); err != nil || len(found) > 0 {
			t.Errorf("fsck: %+v, %v", found, err)
		}
	}
}

// dropStrays removes what a client that died never heard of: active ones, and committed ones without an answer.
func dropStrays(t *testing.T, s *Snapshotter, ctx context.Context, have map[string]crashSnapshot) {
	t.Helper()
	for range 10 { // children before parents
		var stray []string
		if err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			if _, ok := have[info.Name]; !ok {
				stray = append(stray, info.Name)
			}
			if info.Kind == snapshots.KindCommitted {
				return nil
			}
			mounts, err := s.Mounts(ctx, info.Name)
			if err != nil {
				return err
			}
			return mount.WithReadonlyTempMount(ctx, mounts, func(string) error { return nil })
		}); err != nil {
			t.Fatal(err)
		}
		if len(stray) == 0 {
			return
		}
		for _, name := range stray {
			_ = s.Remove(ctx, name) // one that has children goes in the next round
		}
	}
	t.Error("some snapshots cannot be removed")
}

func (w *crashWorld) content(name string) map[string]string {
	all := map[string]string{}
	for ; name != ""; name = w.have[name].parent {
		for path, data := range crashFiles(w.have[name].seed) {
			if _, hidden := all[path]; !hidden {
				all[path] = data
			}
		}
	}
	return all
}

func equalFiles(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for path, data := range b {
		if a[path] != data {
			return false
		}
	}
	return true
}

// holdsNothingElse: files of the store belong to what is committed, once what goes on in the background, such as the
// merging of packs, is done.
func holdsNothingElse(t *testing.T, s *Snapshotter, ctx context.Context) {
	t.Helper()
	for _, wait := range []func(){func() { _ = s.Cleanup(ctx) }, s.wg.Wait, s.layers.Wait} {
		wait()
	}
	list := func(pattern string) []string {
		found, err := filepath.Glob(filepath.Join(s.opts.Root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	var wrong []string
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		wrong = nil
		if got, want := list("packs/*"), s.layers.Stats().Packs.Packs; len(got) != want {
			wrong = append(wrong, fmt.Sprintf("%d are packs of %q", want, got))
		}
		if found, err := s.layers.Orphans(ctx); err != nil || len(found) > 0 {
			wrong = append(wrong, fmt.Sprintf("files that nothing names: %v, %v", found, err))
		}
		if got, want := list("layers/*"), len(s.layers.List()); len(got) != want {
			wrong = append(wrong, fmt.Sprintf("%d are layers of %q", want, got))
		}
		if got := slices.Concat(list("ingest/*"), list("snapshots/*"), list("run/v/*")); len(got) > 0 {
			wrong = append(wrong, fmt.Sprintf("left: %q", got))
		}
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	t.Errorf("the store holds more than what is committed: %s", strings.Join(wrong, "; "))
}

// crashFiles are the files of a layer: some of its own, some that many layers have.
func crashFiles(seed uint64) map[string]string {
	r := rand.New(rand.NewPCG(seed, 1))
	all := map[string]string{}
	for range 1 + r.IntN(12) {
		which := r.IntN(40)
		size := 1 + int(rand.New(rand.NewPCG(uint64(which), 2)).Uint64()%40_000)
		name := fmt.Sprintf("shared-%d", which)
		if r.IntN(2) == 0 {
			name = fmt.Sprintf("own-%d", r.Uint64())
			which, size = r.IntN(1<<30), 1+r.IntN(60_000)
		}
		all[name] = strings.Repeat(fmt.Sprint(which, "."), size)[:size]
	}
	return all
}

// TestCrashChild is the process that TestKilledAtAnyMoment kills.
func TestCrashChild(t *testing.T) {
	text := os.Getenv(crashEnv)
	if text == "" {
		t.Skip("started by TestKilledAtAnyMoment alone")
	}
	lines := strings.Split(text, "\n")
	c := &crashChild{round: lines[2]}
	var seed uint64
	if _, err := fmt.Sscan(lines[1], &seed); err != nil {
		t.Fatal(err)
	}
	for _, known := range lines[3:] {
		if f := strings.Split(known, "|"); len(f) == 3 {
			c.names = append(c.names, f[0])
			c.parents = append(c.parents, f[1])
		}
	}
	c.r = rand.New(rand.NewPCG(seed, 3))
	s, err := New(t.Context(), Options{Root: lines[0], RunDir: filepath.Join(lines[0], "run"), Verity: testVerity(),
		PageCache: testPageCache(), noDense: testNoDense()})
	if err != nil {
		t.Fatal(err)
	}
	c.s = s
	fmt.Println("\nready")
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if err := c.step(ns(t, "crash")); err != nil {
			fmt.Println("error|" + strings.ReplaceAll(err.Error(), "\n", " "))
			return
		}
	}
}

type crashChild struct {
	s              *Snapshotter
	r              *rand.Rand
	round          string
	n              int
	names, parents []string
	lastSeed       uint64 // of pull
	known          []byte // of pullKnown
	root           string
	hook           func(string)
}

func (c *crashChild) step(ctx context.Context) error {
	const many = 60 // so that a long test does as much at its end as at its beginning
	switch n := c.r.IntN(10); {
	case n < 5 && len(c.names) > many:
		return c.remove(ctx)
	case n < 4:
		return c.pull(ctx)
	case n < 6:
		return c.build(ctx)
	case n < 7 && c.r.IntN(3) == 0:
		return c.stay(ctx)
	case n < 7:
		return c.view(ctx)
	case n < 9 && len(c.names) > 6:
		return c.remove(ctx)
	case n == 9 && c.r.IntN(2) == 0:
		return c.s.layers.Compact(ctx)
	case n == 9:
		return c.s.Cleanup(ctx)
	}
	return nil
}

// parent is nothing, or one of the snapshots.
func (c *crashChild) parent() string {
	if len(c.names) == 0 || c.r.IntN(3) == 0 {
		return ""
	}
	return c.names[c.r.IntN(len(c.names))]
}

func (c *crashChild) committed(name, parent string, seed uint64) {
	c.names, c.parents = append(c.names, name), append(c.parents, parent)
	fmt.Printf("committed|%s|%s|%d\n", name, parent, seed)
}

// pull is an extraction through the diff service.
func (c *crashChild) pull(ctx context.Context) error {
	c.n++
	parent, seed := c.parent(), c.r.Uint64()
	c.lastSeed = seed
	blob, err := tarOfFiles(crashFiles(seed))
	if err != nil {
		return err
	}
	key, name := fmt.Sprintf("crash/%s-%d/extract-x", c.round, c.n), fmt.Sprintf("crash/%s-%d/pulled", c.round, c.n)
	mounts, err := c.s.Prepare(ctx, key, parent)
	if err != nil {
		return fmt.Errorf("prepare on %q: %w", parent, err)
	}
	upper, ok, err := c.s.Extraction(ctx, mounts)
	if err != nil || !ok {
		return fmt.Errorf("extraction: %v, %w", ok, err)
	}
	in, err := c.s.Layers().IngestBlob(ctx, blobOfBytes(blob))
	if err != nil {
		return err
	}
	if err := c.s.Applied(ctx, upper, in); err != nil {
		return err
	}
	if err := c.s.Commit(ctx, name, key); err != nil {
		return err
	}
	c.committed(name, parent, seed)
	return nil
}

// build is a directory that somebody fills, and that is ingested after its commit.
func (c *crashChild) build(ctx context.Context) error {
	c.n++
	parent, seed := c.parent(), c.r.Uint64()
	key, name := fmt.Sprintf("crash/%s-%d/active", c.round, c.n), fmt.Sprintf("crash/%s-%d/built", c.round, c.n)
	mounts, err := c.s.Prepare(ctx, key, parent)
	if err != nil {
		return fmt.Errorf("prepare on %q: %w", parent, err)
	}
	upper, _ := c.s.upperOf(mounts)
	for path, data := range crashFiles(seed) {
		if err := os.WriteFile(filepath.Join(upper, path), []byte(data), 0o644); err != nil {
			return err
		}
	}
	if err := c.s.Commit(ctx, name, key); err != nil {
		return err
	}
	c.committed(name, parent, seed)
	return nil
}

func blobOfBytes(b []byte) layer.Blob {
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	return layer.Blob{Digest: digest.FromBytes(b), Size: int64(len(b)), Open: open}
}

func (c *crashChild) view(ctx context.Context) error {
	if len(c.names) == 0 {
		return nil
	}
	c.n++
	key := fmt.Sprintf("crash/%s-%d/view", c.round, c.n)
	if _, err := c.s.View(ctx, key, c.names[c.r.IntN(len(c.names))]); err != nil {
		return fmt.Errorf("view: %w", err)
	}
	return c.s.Remove(ctx, key)
}

// remove takes a snapshot without children away.
func (c *crashChild) remove(ctx context.Context) error {
	i := c.r.IntN(len(c.names))
	name := c.names[i]
	if slices.Contains(c.parents, name) {
		return nil
	}
	fmt.Println("removing|" + name)
	if err := c.s.Remove(ctx, name); err != nil {
		return err
	}
	fmt.Println("removed|" + name)
	c.names, c.parents = slices.Delete(c.names, i, i+1), slices.Delete(c.parents, i, i+1)
	return nil
}

func unmountAll(t *testing.T, root string) {
	t.Helper()
	var errs []error
	for _, point := range mountsBelow(t, root) {
		errs = append(errs, mount.UnmountAll(point, 0))
	}
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}
