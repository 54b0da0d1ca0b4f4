package archive

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

type discarding struct{}

func (discarding) Put(e *content.Entry, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// benchTar is a tar like a site-packages: files of 4 KiB in the median, text of
// few words. ARCHIVE_BENCH_TAR names a real one to use instead.
func benchTar(b *testing.B) []byte {
	if name := os.Getenv("ARCHIVE_BENCH_TAR"); name != "" {
		data, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		return data
	}
	r := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 2000)
	for i := range words {
		words[i] = fmt.Sprintf("word%x ", r.Uint32()>>r.IntN(24))
	}
	var members []member
	for d := range 100 {
		members = append(members, dir(fmt.Sprintf("usr/lib/python3/dist-packages/package%d", d)))
		for f := range 50 {
			var body bytes.Buffer
			for size := 64 << r.IntN(12); body.Len() < size; {
				body.WriteString(words[r.IntN(len(words))])
			}
			members = append(members, file(fmt.Sprintf("usr/lib/python3/dist-packages/package%d/module%d.py", d, f),
				body.String()))
		}
	}
	return writeTar(b, members...)
}

func BenchmarkReadTar(b *testing.B) {
	data := benchTar(b)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		entries, err := ReadTar(b.Context(), bytes.NewReader(data), discarding{}, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(entries)), "entries")
	}
}

// BenchmarkDecompress reports MB of uncompressed tar per second.
func BenchmarkDecompress(b *testing.B) {
	data := benchTar(b)
	blobs := map[string][]byte{
		"gzip": gzipped(b, data), "zstd": zstded(b, data, zstd.WithEncoderLevel(zstd.SpeedDefault)), "plain": data,
	}
	paths := decompressors()
	if paths["igzip"] != "" {
		blobs["igzip"] = blobs["gzip"]
	}
	for name, blob := range blobs {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				r, err := decompressWith(paths[name], bytes.NewReader(blob), nil)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}
