package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
)

// What a build without cache asks for each step: a snapshot over the one before, a file in it, and a commit. The base
// has as many files as an image of 420 MB. CPU-ms is of this process: what the kernel writes out later is not in it.
func BenchmarkSteps(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	const files = 26_000
	root := b.TempDir()
	s := openBench(b, root)
	b.Cleanup(func() { detachChains(b, root) })
	ctx := namespaces.WithNamespace(b.Context(), "steps")
	all := map[string]string{}
	for i := range files {
		all[fmt.Sprintf("usr/lib/p%d/module-%d.py", i%400, i)] = fmt.Sprintf("%0*d", 200+i%2000, i)
	}
	blob, err := tarOfFiles(all)
	if err != nil {
		b.Fatal(err)
	}
	in, err := s.layers.IngestBlob(ctx, blobOfBytes(blob))
	if err != nil {
		b.Fatal(err)
	}
	mounts, err := s.Prepare(ctx, "extract-base", "", snapshots.WithLabels(map[string]string{labelRef: "base"}))
	if err != nil {
		b.Fatal(err)
	}
	upper, _ := s.upperOf(mounts)
	if err := s.Applied(ctx, upper, in); err != nil {
		b.Fatal(err)
	}
	if err := s.Commit(ctx, "step-0", "extract-base"); err != nil {
		b.Fatal(err)
	}
	if err := benchStep(ctx, s, "step-0", "step-1"); err != nil { // its chain image is there for all
		b.Fatal(err)
	}
	n, before := 1, processTime(b)
	for b.Loop() {
		if err := benchStep(ctx, s, fmt.Sprint("step-", n), fmt.Sprint("step-", n+1)); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64((processTime(b)-before).Microseconds())/1000/float64(b.N), "CPU-ms/op")
}

// detachChains takes away what the snapshotter leaves mounted for clients.
func detachChains(b *testing.B, root string) {
	b.Helper()
	for _, pattern := range []string{"run/chains/*", "run/p/*", "run/v/*"} {
		points, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			b.Fatal(err)
		}
		for _, p := range points {
			if err := mount.UnmountAll(p, unix.MNT_DETACH); err != nil {
				b.Error(err)
			}
		}
	}
}

func benchStep(ctx context.Context, s *Snapshotter, parent, name string) error {
	key := "active-" + name
	mounts, err := s.Prepare(ctx, key, parent)
	if err != nil {
		return err
	}
	upper, _ := s.upperOf(mounts)
	if err := os.WriteFile(filepath.Join(upper, name), []byte(name), 0o644); err != nil {
		return err
	}
	return s.Commit(ctx, name, key)
}

func processTime(b *testing.B) time.Duration {
	b.Helper()
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}
