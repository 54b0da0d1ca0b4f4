package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// benchLayer is a layer like a site-packages: 2,000 files of 0.1 to 64 KiB, or the
// uncompressed or compressed layer tar that DEDUP_BENCH_LAYER names.
func benchLayer(b *testing.B) (open func() io.ReadCloser) {
	if path := os.Getenv("DEDUP_BENCH_LAYER"); path != "" {
		return func() io.ReadCloser {
			f, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			return f
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	var m []member
	for i := range 2000 {
		words := make([]string, 10+r.IntN(1+1<<r.IntN(13)))
		for j := range words {
			words[j] = fmt.Sprint("word", r.IntN(5000))
		}
		m = append(m, member{fmt.Sprintf("m%d.py", i), strings.Join(words, " "), 1, 0})
	}
	blob := compress(b, makeTar(b, m...), 6)
	return func() io.ReadCloser { return io.NopCloser(strings.NewReader(string(blob))) }
}

func benchIngest(b *testing.B, fresh bool) {
	open := benchLayer(b)
	s := openStore(b, b.TempDir(), content.Python)
	blob := func(i int) Blob {
		return Blob{Digest: digest.FromString(fmt.Sprint(i)), Open: func(context.Context) (io.ReadCloser, error) {
			return open(), nil
		}}
	}
	hold, err := s.IngestBlob(b.Context(), blob(-1))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(hold.TarSize)
	facts, err := s.Facts(hold.Layer)
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(facts.Entries), "ns/file")
	}()
	for i := 0; b.Loop(); i++ {
		if fresh {
			b.StopTimer()
			s.Release(hold.Layer)
			s.gc.Wait()
			b.StartTimer()
		}
		in, err := s.IngestBlob(b.Context(), blob(i))
		if err != nil {
			b.Fatal(err)
		}
		if !fresh {
			s.Release(in.Layer)
		}
	}
}

// BenchmarkIngestNew stores a layer of which nothing is known.
func BenchmarkIngestNew(b *testing.B) { benchIngest(b, true) }

// BenchmarkIngestKnown ingests another blob of a layer of which everything is known.
func BenchmarkIngestKnown(b *testing.B) { benchIngest(b, false) }

// BenchmarkLookup finds a layer by its diffID.
func BenchmarkLookup(b *testing.B) {
	open := benchLayer(b)
	s := openStore(b, b.TempDir(), content.Python)
	in, err := s.IngestBlob(b.Context(),
		Blob{Digest: digest.FromString("blob"), Open: func(context.Context) (io.ReadCloser, error) {
			return open(), nil
		}})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		id, ok := s.Lookup(in.DiffID)
		if !ok {
			b.Fatal("a layer is not known")
		}
		s.Release(id)
	}
}

// BenchmarkDurability ingests new layers one after the other, each on the disk before it is served, or later, or with
// fs-verity too, where the file system of TMPDIR has it.
func BenchmarkDurability(b *testing.B) {
	for name, opts := range map[string]Options{"strict": {}, "deferred": {Durability: Deferred},
		"strict+verity": {Verity: true}} {
		b.Run(name, func(b *testing.B) {
			open := benchLayer(b)
			opts.Root = b.TempDir()
			if err := verity.Probe(opts.Root); opts.Verity && err != nil {
				b.Skip(err)
			}
			s, err := Open(b.Context(), opts, nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { closeStore(b, s) })
			for i := 0; b.Loop(); i++ {
				in, err := s.IngestBlob(b.Context(), Blob{Digest: digest.FromString(fmt.Sprint(i)),
					Open: func(context.Context) (io.ReadCloser, error) {
						return open(), nil
					}})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				b.SetBytes(in.TarSize)
				b.ReportMetric(float64(in.Added.Bytes), "disk-bytes")
				s.Release(in.Layer)
				s.gc.Wait()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkRemove removes one layer of 750 files, 500 of which others have too, from stores of different sizes.
// DEDUP_LONG adds one of 1,000,000 objects in 2,000 layers; what opening it takes, and its memory, is reported beside.
func BenchmarkRemove(b *testing.B) {
	sizes := []int{20, 200}
	if os.Getenv("DEDUP_LONG") != "" {
		sizes = append(sizes, 2000)
	}
	for _, layers := range sizes {
		b.Run(fmt.Sprintf("layers=%d", layers), func(b *testing.B) { benchRemove(b, layers) })
	}
}

// manyFiles is layer i: 250 files that layer i-1 has as well, and 250 that layer i+1 has; an odd one has 250 to itself
// on top.
func manyFiles(b *testing.B, i int) []byte {
	var m []member
	for f := range 500 {
		owner := i
		if f%2 == 1 {
			owner = i + 1
		}
		m = append(m, member{name: fmt.Sprintf("f%d", f), data: strings.Repeat(fmt.Sprintf("%d of layer %d\n", f/2, owner),
			60)})
	}
	for f := range 250 * (i % 2) {
		m = append(m, member{name: fmt.Sprintf("own-%d", f), data: strings.Repeat(fmt.Sprintf("own %d of layer %d\n", f, i),
			60)})
	}
	return makeTar(b, m...)
}

func benchRemove(b *testing.B, layers int) {
	root := b.TempDir()
	s, err := Open(b.Context(), Options{Root: root, Durability: Deferred}, nil)
	if err != nil {
		b.Fatal(err)
	}
	var ids []content.LayerID
	for i := range layers {
		// Twice as far apart as the layers that share, so that there are 500 objects for each.
		ids = append(ids, ingest(b, s, manyFiles(b, 2*i)).Layer)
	}
	objects := s.Objects()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	s.rootFd = -1
	runtime.GC()
	runtime.GC() // empties the pools of buffers
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	opened := time.Now()
	s = openStore(b, root, content.Python, ids...)
	took := time.Since(opened)
	runtime.GC()
	runtime.ReadMemStats(&after)
	// What a start takes after a crash.
	if err := errors.Join(s.Close(), os.Remove(filepath.Join(root, fileClean))); err != nil {
		b.Fatal(err)
	}
	s.rootFd = -1
	opened = time.Now()
	s = openStore(b, root, content.Python, ids...)
	crashed := time.Since(opened)
	var cpu [2]unix.Rusage
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		// Layer 2k+1 shares half of its objects with 2k, and half with 2k+2.
		in := ingest(b, s, manyFiles(b, 2*(i%(layers-1))+1))
		_ = unix.Getrusage(unix.RUSAGE_SELF, &cpu[0])
		b.StartTimer()
		s.Release(in.Layer)
		s.gc.Wait()
		b.StopTimer()
		_ = unix.Getrusage(unix.RUSAGE_SELF, &cpu[1])
		b.StartTimer()
	}
	b.ReportMetric(float64(cpu[1].Stime.Nano()+cpu[1].Utime.Nano()-cpu[0].Stime.Nano()-cpu[0].Utime.Nano())/1e6, "cpu-ms")
	b.ReportMetric(float64(objects), "objects")
	b.ReportMetric(float64(took.Milliseconds()), "open-ms")
	b.ReportMetric(float64(crashed.Milliseconds()), "open-after-crash-ms")
	b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/1e6, "heap-MB")
}
