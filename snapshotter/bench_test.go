package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// benchTar is the tar of the i-th layer of a filled store.
func benchTar(b *testing.B, i int) []byte {
	b.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	data := fmt.Appendf(nil, "content of layer %d", i)
	err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("file-%d", i), Mode: 0o644, Size: int64(len(data))})
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes()
}

// filled returns a snapshotter on a disk with n layers of one small file and n committed snapshots.
// They are written to a tmpfs first, since n times waiting for a disk is not what is measured. It
// also returns the MB of heap and the time that opening it took.
func filled(b *testing.B, n int) (*Snapshotter, float64, time.Duration) {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("needs root")
	}
	fast, root := b.TempDir(), filepath.Join(b.TempDir(), "root")
	if err := unix.Mount("tmpfs", fast, "tmpfs", 0, "mode=0700"); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Unmount(fast, unix.MNT_DETACH) }()
	s := openBench(b, fast)
	ctx := namespaces.WithNamespace(b.Context(), "fill")
	for i := range n {
		blob := benchTar(b, i)
		in, err := s.layers.IngestBlob(ctx,
			layer.Blob{Digest: digest.FromBytes(blob), Open: func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(blob)), nil
			}})
		if err != nil {
			b.Fatal(err)
		}
		err = s.commitKnown(ctx, fmt.Sprint("fill-", i), "", map[string]string{labelRef: digest.FromBytes(blob).String()}, in)
		if !errdefs.IsAlreadyExists(err) {
			b.Fatal(err)
		}
	}
	for _, j := range s.jobs {
		j.stop()
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	if err := os.CopyFS(root, os.DirFS(fast)); err != nil {
		b.Fatal(err)
	}
	before := memory()
	start := time.Now()
	s = openBench(b, root)
	return s, float64(memory()-before) / 1e6, time.Since(start)
}

func openBench(b *testing.B, root string) *Snapshotter {
	b.Helper()
	s, err := New(b.Context(), Options{Root: root, RunDir: filepath.Join(root, "run")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

func memory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// latencies reports percentiles.
func latencies(b *testing.B, all []time.Duration) {
	b.Helper()
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
}

// A pull's Prepare on a node with many layers and snapshots: of a known layer on some parent (hit) with all that
// containerd asks after it, and of an unknown one (miss), with and without the label that tells the diffID.
func BenchmarkPrepare(b *testing.B) {
	for _, n := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("n=%d", n), func(b *testing.B) {
			s, heap, opened := filled(b, n)
			b.Run("open", func(b *testing.B) {
				for b.Loop() {
				}
				b.ReportMetric(heap, "heap-MB")
				b.ReportMetric(float64(opened.Milliseconds()), "open-ms")
			})
			for _, hit := range []bool{true, false} {
				for _, label := range []bool{true, false} {
					b.Run(fmt.Sprintf("hit=%v/label=%v", hit, label), func(b *testing.B) { benchPrepare(b, s, n, hit, label) })
				}
			}
		})
	}
}

func benchPrepare(b *testing.B, s *Snapshotter, n int, hit, label bool) {
	ctx := namespaces.WithNamespace(b.Context(), "bench")
	parent := adoptBench(b, s, ctx)
	sum, err := content.ParseSum(digest.FromBytes(benchTar(b, 0)).String())
	if err != nil {
		b.Fatal(err)
	}
	chain := content.ChainID{Sum: sum}
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		d := content.DiffID{Sum: mustDiff(b, benchTar(b, 1+i%(n-1)))}
		if !hit {
			d.Sum[0] ^= 0xff
		}
		target := chain.Chain(d).Digest().String()
		labels := map[string]string{labelRef: target}
		if label {
			labels[labelDiffID] = d.Digest().String()
		}
		key := fmt.Sprintf("bench/%d/extract-%s", i, target)
		start := time.Now()
		_, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		if errdefs.IsAlreadyExists(err) != hit || !hit && err != nil {
			b.Fatal(err)
		}
		if hit {
			key = ""
			err = s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				key = info.Name
				return nil
			}, fmt.Sprintf(`labels.%q==%s,parent==%q`, labelRef, target, parent))
			if err != nil || key == "" {
				b.Fatal("not found", err)
			}
		}
		took = append(took, time.Since(start))
		if err := s.Remove(ctx, key); err != nil {
			b.Fatal(err)
		}
	}
	latencies(b, took)
}

// adoptBench returns the snapshot that layer 0 is served as.
func adoptBench(b *testing.B, s *Snapshotter, ctx context.Context) string {
	b.Helper()
	target := digest.FromBytes(benchTar(b, 0)).String()
	_, err := s.Prepare(ctx, "bench/0/extract-base", "", snapshots.WithLabels(map[string]string{labelRef: target}))
	if !errdefs.IsAlreadyExists(err) {
		b.Fatal(err)
	}
	return hitName("bench", "", target)
}

func mustDiff(b *testing.B, blob []byte) content.Sum {
	b.Helper()
	sum, err := content.ParseSum(digest.FromBytes(blob).String())
	if err != nil {
		b.Fatal(err)
	}
	return sum
}

// Verifying metadata.db of a node with many snapshots, as every start does.
func BenchmarkCheckMetadata(b *testing.B) {
	path := filepath.Join(b.TempDir(), "metadata.db")
	if err := createMetadata(path); err != nil {
		b.Fatal(err)
	}
	db, err := openMetadata(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	defer db.close()
	err = db.update(b.Context(), func(ctx context.Context) error {
		for i := range 10000 {
			ref := digest.FromString(fmt.Sprint(i))
			labels := map[string]string{labelRef: ref.String(), labelLayer: ref.Encoded(), labelNamespace: "default"}
			if _, err := createSnapshot(ctx, snapshots.KindView, ref.String(), "", labels); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		data, err := os.ReadFile(path)
		if err == nil {
			_, err = checkBolt(data)
		}
		err = errors.Join(err, db.view(b.Context(), func(ctx context.Context) error {
			_ = checkLinks(ctx, readRecords(ctx))
			return nil
		}))
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(data)))
	}
}

// What containerd asks for after each of its garbage collections, on a node with 1,000 images of ten layers, and a
// container of each.
func BenchmarkCleanup(b *testing.B) {
	const images, depth = 1000, 10
	s, _, _ := filled(b, depth)
	ids := s.layers.List()
	err := s.db.update(b.Context(), func(ctx context.Context) error {
		for i := range images {
			parent := ""
			for l := range depth {
				key, name := fmt.Sprintf("active-%d-%d", i, l), fmt.Sprintf("committed-%d-%d", i, l)
				if _, err := createSnapshot(ctx, snapshots.KindActive, key, parent, nil); err != nil {
					return err
				}
				labels := map[string]string{labelLayer: ids[l].ID.Hex(), labelRef: digest.FromString(name).String(),
					labelNamespace: "default"}
				if err := commitActive(ctx, key, name, "", snapshots.Usage{}, labels); err != nil {
					return err
				}
				parent = name
			}
			if _, err := createSnapshot(ctx, snapshots.KindActive, fmt.Sprint("container-", i), parent, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := s.Cleanup(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
