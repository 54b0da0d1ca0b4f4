package layer

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
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
		return Blob{Digest: digest.FromString(fmt.Sprint(i)), Open: func(context.Context) (io.ReadCloser, error) { return open(), nil }}
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
	in, err := s.IngestBlob(b.Context(), Blob{Digest: digest.FromString("blob"), Open: func(context.Context) (io.ReadCloser, error) { return open(), nil }})
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
