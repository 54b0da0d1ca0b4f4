package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// manySmall writes a layer of n files of size bytes each, a thousand to a directory. No two are alike.
func manySmall(w io.Writer, n, size int) error {
	tw := tar.NewWriter(w)
	body := make([]byte, size)
	for i := range n {
		name := fmt.Sprintf("usr/share/many/%04d/file-%07d.dat", i/1000, i)
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		copy(body, fmt.Sprintf("%08d", i))
		if _, err := tw.Write(body); err != nil {
			return err
		}
	}
	return tw.Close()
}

// smallBlob streams manySmall.
func smallBlob(n, size int) Blob {
	return Blob{Digest: digest.FromString(fmt.Sprint("small", n, size)),
		Open: func(context.Context) (io.ReadCloser, error) {
			r, w := io.Pipe()
			go func() { w.CloseWithError(manySmall(w, n, size)) }()
			return r, nil
		}}
}

// status reads one line of /proc/self/status that counts kB.
func status(tb testing.TB, name string) int64 {
	tb.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		tb.Skip(err)
	}
	_, rest, _ := strings.Cut(string(text), name+":")
	fields := strings.Fields(rest)
	kb, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		tb.Fatal(err)
	}
	return kb << 10
}

// peakOf returns by how much fn raises the resident memory of this process at most, and how much of it stays.
func peakOf(tb testing.TB, fn func()) (most, stays int64) {
	tb.Helper()
	debug.FreeOSMemory()
	debug.FreeOSMemory() // the pools too
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		tb.Skip("cannot reset the peak: ", err)
	}
	before := status(tb, "VmRSS")
	fn()
	return status(tb, "VmHWM") - before, status(tb, "VmRSS") - before
}

// BenchmarkMemory reports the peak of resident memory for each entry, of which inline data is part, of an ingest, of
// encoding, and of a chain build. DEDUP_LONG adds a layer of 600,000 files.
func BenchmarkMemory(b *testing.B) {
	counts := []int{100_000}
	if os.Getenv("DEDUP_LONG") != "" {
		counts = append(counts, 600_000)
	}
	for _, n := range counts {
		for _, size := range []int{0, content.InlineMax, content.InlineMax + 1} {
			if n > 100_000 && size > content.InlineMax {
				continue // that many objects are a benchmark of the disk
			}
			name := fmt.Sprintf("files=%d/bytes=%d/", n, size)
			s, err := Open(b.Context(), Options{Root: b.TempDir(), MaxMemory: 4 << 30}, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { closeStore(b, s) })
			var in Ingested
			b.Run(name+"ingest", func(b *testing.B) {
				perEntry(b, n, func() {
					var err error
					if in, err = s.IngestBlob(b.Context(), smallBlob(n, size)); err != nil {
						b.Fatal(err)
					}
				})
			})
			b.Run(name+"encode", func(b *testing.B) { benchEncodeMemory(b, s, in.Layer, n) })
			b.Run(name+"chain", func(b *testing.B) {
				perEntry(b, n, func() {
					root, err := s.Merge(b.Context(), []content.LayerID{in.Layer})
					if err != nil {
						b.Fatal(err)
					}
					placed, err := s.Places(b.Context(), root.Objects())
					if err != nil {
						b.Fatal(err)
					}
					_, err = erofs.WriteChain(b.Context(), io.Discard, root,
						erofs.Options{Place: placed.Place, Packs: placed.Packs(), Redirect: true})
					if err = errors.Join(err, placed.Release()); err != nil {
						b.Fatal(err)
					}
				})
			})
			s.Release(in.Layer)
			s.Wait()
		}
	}
}

// benchEncodeMemory is what encoding takes beside the entries themselves.
func benchEncodeMemory(b *testing.B, s *Store, id content.LayerID, n int) {
	_, entries, err := tree.Read(s.treePath(id), id)
	if err != nil {
		b.Fatal(err)
	}
	perEntry(b, n, func() {
		if _, err := tree.Encode(content.Python, entries).Marshal(tree.Facts{Fidelity: content.Python}); err != nil {
			b.Fatal(err)
		}
	})
}

func perEntry(b *testing.B, n int, fn func()) {
	var most, stays int64
	for range b.N {
		m, s := peakOf(b, fn)
		most, stays = max(most, m), max(stays, s)
	}
	b.ReportMetric(float64(most)/float64(n), "B/entry")
	b.ReportMetric(float64(stays)/float64(n), "stays-B/entry")
}

// BenchmarkPeak reports the peak of resident memory while the layers that DEDUP_BENCH_LAYERS names (files, separated
// by colons) are ingested side by side into an empty store, as in a pull, and the CPU time that it takes.
func BenchmarkPeak(b *testing.B) {
	paths := filepath.SplitList(os.Getenv("DEDUP_BENCH_LAYERS"))
	if len(paths) == 0 {
		b.Skip("DEDUP_BENCH_LAYERS names no layers")
	}
	var most int64
	var cpu time.Duration
	for range b.N {
		s := openStore(b, b.TempDir(), content.Python)
		var before, after [2]unix.Rusage
		for i, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			_ = unix.Getrusage(who, &before[i])
		}
		m, _ := peakOf(b, func() {
			var wg sync.WaitGroup
			for _, path := range paths {
				wg.Go(func() {
					open := func(context.Context) (io.ReadCloser, error) { return os.Open(path) }
					in, err := s.IngestBlob(b.Context(), Blob{Digest: digest.FromString(path), Open: open})
					if err != nil {
						b.Error(err)
						return
					}
					s.Release(in.Layer)
				})
			}
			wg.Wait()
		})
		for i, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			_ = unix.Getrusage(who, &after[i])
			cpu += time.Duration(after[i].Utime.Nano() + after[i].Stime.Nano() - before[i].Utime.Nano() - before[i].Stime.Nano())
		}
		most = max(most, m)
		closeStore(b, s)
	}
	b.ReportMetric(float64(most)/1e6, "peak-MB")
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
}
