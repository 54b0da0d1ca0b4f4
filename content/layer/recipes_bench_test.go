package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// manyTexts is a tar of n files of words, about 8 kB each.
func manyTexts(b *testing.B, n int) []byte {
	b.Helper()
	r := rand.New(rand.NewPCG(1, 1))
	var out, text bytes.Buffer
	w := tar.NewWriter(&out)
	for i := range n {
		text.Reset()
		for size := 200 + r.IntN(16_000); text.Len() < size; {
			fmt.Fprintf(&text, "word%d ", r.IntN(40_000))
		}
		h := &tar.Header{Name: fmt.Sprintf("usr/share/texts/%03d/file-%06d.txt", i/100, i), Mode: 0o644,
			Size: int64(text.Len()), ModTime: time.Unix(1_700_000_000+int64(r.IntN(1e7)), 0)}
		if err := w.WriteHeader(h); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(text.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return out.Bytes()
}

// BenchmarkRecipe makes recipes, and blobs of them. docs/blobs.md has what it says.
func BenchmarkRecipe(b *testing.B) {
	const files = 4000
	data := manyTexts(b, files)
	mb := float64(len(data)) / 1e6
	half := len(data) / 2
	for _, row := range []struct {
		name string
		blob []byte
	}{
		{"plain", data}, {"level=1", compress(b, data, 1)}, {"level=6", compress(b, data, 6)},
		{"level=9", compress(b, data, 9)},
		{"no encoder", append(compress(b, data[:half], 6), compress(b, data[half:], 6)...)},
	} {
		b.Run(row.name, func(b *testing.B) {
			s := openStore(b, b.TempDir(), content.Python)
			in := ingest(b, s, row.blob)
			var made, built time.Duration
			for b.Loop() {
				start := time.Now()
				err := MakeRecipe(b.Context(), s, in.DiffID, blobOf(row.blob))
				made += time.Since(start)
				if errors.Is(err, recipe.ErrNoEncoder) {
					continue
				}
				if err != nil {
					b.Fatal(err)
				}
				start = time.Now()
				if err := WriteBlob(b.Context(), s, blobOf(row.blob).Digest, io.Discard); err != nil {
					b.Fatal(err)
				}
				built += time.Since(start)
				b.StopTimer()
				b.ReportMetric(float64(s.RecipeUsage().Bytes)/files, "bytes/file")
				s.catalog.mu.Lock()
				s.removeRecipes(in.Layer)
				s.catalog.mu.Unlock()
				b.StartTimer()
			}
			n := float64(b.N)
			b.ReportMetric(made.Seconds()*1000/mb/n, "recipe-ms/MB")
			b.ReportMetric(built.Seconds()*1000/mb/n, "blob-ms/MB")
		})
	}
}

// BenchmarkRecipeMemory says what the entries of a layer take while a blob is made: recipeEntry counts that.
func BenchmarkRecipeMemory(b *testing.B) {
	const files = 200_000
	s := openStore(b, b.TempDir(), content.Python)
	in, err := s.IngestBlob(b.Context(), smallBlob(files, 700))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Release(in.Layer)
	for b.Loop() {
		var before, after runtime.MemStats
		mem, err := s.budget.share(b.Context(), false)
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&before)
		l, err := s.recipes.read(b.Context(), in.Layer, mem)
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/files, "heap-B/entry")
		b.ReportMetric(float64(mem.kept)/files, "counted-B/entry")
		runtime.KeepAlive(l)
		mem.end()
	}
}
