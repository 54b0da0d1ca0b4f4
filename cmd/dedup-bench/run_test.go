package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// built has the binaries that a run needs: the harness starts itself as a registry.
func built(t *testing.T) (bench, daemon string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd, mounts and runc do")
	}
	if err := node.Require(t.Context(), nil, node.Runc); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir+"/", ".", "../containerd-dedup-grpc")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "dedup-bench"), filepath.Join(dir, "containerd-dedup-grpc")
}

// userImages serves two images that share a layer, as a user's registry would.
func userImages(t *testing.T) (refs []string) {
	t.Helper()
	entries, err := inputs.Busybox(t.Context(), nil)
	if err != nil {
		t.Skip(err)
	}
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	layers := t.TempDir()
	base, err := image.FromEntries(layers, image.LayerOptions{}, entries...)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one", "two"} {
		app, err := image.FromEntries(layers, image.LayerOptions{}, image.File(name, name+strings.Repeat("x", 100_000)),
			image.File("same", strings.Repeat("y", 100_000)))
		if err != nil {
			t.Fatal(err)
		}
		img, err := image.New(image.Options{Env: []string{"PATH=/bin"}}, base, app)
		if err != nil {
			t.Fatal(err)
		}
		ref := r.Ref("team/" + name + ":1")
		if err := image.Push(t.Context(), ref, img); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref)
	}
	return refs
}

// shortDir is short enough for the sockets below it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "b-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// A run over a user's images: figures of every subject and scenario are in results.json, plots and
// tables are written, and nothing is left behind.
func TestRun(t *testing.T) {
	bench, daemon := built(t)
	refs, out, tmp := userImages(t), t.TempDir(), shortDir(t)
	cmd := exec.Command(bench, "run", "--scenario", "cold,rebuild,known,delete,start,read", "--subject",
		"overlayfs,dedup,limit", "--runs", "1",
		"--image", refs[0], "--image", refs[1], "--daemon", daemon, "--out", out, "--tmp", tmp, "--json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	var printed []report.Result
	if err := json.Unmarshal(stdout.Bytes(), &printed); err != nil {
		t.Fatalf("%v in\n%s", err, stdout.String())
	}
	find := func(scenario, subject, metric string) report.Result {
		i := slices.IndexFunc(printed, func(r report.Result) bool {
			return r.Scenario == scenario && r.Subject == subject && r.Metric == metric
		})
		if i < 0 {
			t.Errorf("no %s of %s in %s", metric, subject, scenario)
			return report.Result{}
		}
		return printed[i]
	}
	for _, subject := range []string{"overlayfs", "dedup"} {
		for _, x := range [][2]string{{"cold", "pull"}, {"rebuild", "pull"}, {"known", "pull"},
			{"delete", "the last images: space back"},
			{"start", "first container"}, {"start", "20 at once, all"}, {"read", "find, cold"},
			{"read", "read everything, warm"}} {
			if r := find(x[0], subject, x[1]); r.Median <= 0 || r.Unit != "s" || r.Runs != 1 {
				t.Errorf("%s of %s: %+v", x[1], subject, r)
			}
		}
	}
	if find("cold", "limit", "pull").Median <= 0 {
		t.Error("no limit")
	}
	// The two app layers have 100 kB in common: only who deduplicates saves it.
	ours, theirs := find("rebuild", "dedup", "disk"), find("rebuild", "overlayfs", "disk")
	if ours.Median >= theirs.Median || theirs.Median < 200_000 {
		t.Errorf("disk for the second image: dedup %.0f, overlayfs %.0f", ours.Median, theirs.Median)
	}
	for _, name := range []string{"results.json", "results.md", "about.json", "cold.svg", "ratios.svg"} {
		if info, err := os.Stat(filepath.Join(out, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	nothingLeft(t, tmp)
}

// An interrupted run ends soon, says so and leaves no mount, loop device, process or file.
func TestInterrupt(t *testing.T) {
	bench, daemon := built(t)
	refs, tmp := userImages(t), shortDir(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bench, "run", "--scenario", "start", "--subject", "dedup", "--runs", "50",
		"--image", refs[0], "--daemon", daemon, "--out", t.TempDir(), "--tmp", tmp)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for ctx.Err() == nil { // until containers run
		if tasks, _ := filepath.Glob(filepath.Join(tmp, "*/fs/dedup-node-*/runc/default/bench-*")); len(tasks) > 0 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if ctx.Err() != nil {
		t.Fatalf("no container came up\n%s", stderr.String())
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("ended with %v\n%s", err, stderr.String())
	}
	nothingLeft(t, tmp)
}

func nothingLeft(t *testing.T, tmp string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(tmp, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), tmp) {
		t.Error("a mount was left behind")
	}
	backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, path := range backing {
		if data, _ := os.ReadFile(path); strings.Contains(string(data), tmp) {
			t.Errorf("%s was left behind", path)
		}
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		if data, _ := os.ReadFile(path); strings.Contains(string(data), tmp) {
			t.Errorf("a process was left behind: %q", data)
		}
	}
}

// The tables of corpora in the docs are those of the figures kept beside them.
func TestCorporaInDocs(t *testing.T) {
	kept, err := report.Read("../../docs/benchmarks/corpora")
	if err != nil || len(kept.Results) == 0 {
		t.Fatal(len(kept.Results), err)
	}
	r := newReport(kept.Results, kept.About)
	for _, page := range []string{"../../docs/benchmarks.md", "../../README.md"} {
		want, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), filepath.Base(page))
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := r.WriteDocs(path); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s: run dedup-bench report --out docs/benchmarks/corpora --docs %s (-now +then):\n%s", page,
				strings.TrimPrefix(page, "../../"), diff)
		}
	}
}
