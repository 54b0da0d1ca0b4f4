package erofs

import (
	"fmt"
	"io"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// chains are those whose images are easily quadratic to make, in the sizes of which a node must not be afraid.
var chains = []struct {
	name   string
	layers func() [][]*content.Entry
}{
	{"400,000 files interleaved with 400,000 in one directory", func() [][]*content.Entry {
		return [][]*content.Entry{filesOf(400_000, 0, 2, 1), filesOf(400_000, 1, 2, 1)}
	}},
	{"20,000 hard links to a file of a directory of 200,000", func() [][]*content.Entry {
		links := filesOf(0, 0, 1, 1)
		for i := range 20_000 {
			links = append(links, &content.Entry{Path: fmt.Sprintf("d/l%08d", i), Kind: content.LowerLink, Target: "d/00000001",
				Mode: 0o644, Mtime: content.Time{Sec: int64(i)}})
		}
		return [][]*content.Entry{filesOf(200_000, 0, 1, 1), links}
	}},
	{"200,000 symlinks named *.py with bytecode", func() [][]*content.Entry {
		entries := append(filesOf(0, 0, 1, 1), &content.Entry{Path: "d/__pycache__", Kind: content.Dir, Mode: 0o755})
		for i := range 200_000 {
			entries = append(entries, &content.Entry{Path: fmt.Sprintf("d/m%08d.py", i), Kind: content.Symlink,
				Target: "../s.py"},
				&content.Entry{Path: fmt.Sprintf("d/__pycache__/m%08d.cpython-311.pyc", i), Kind: content.Regular, Mode: 0o644,
					Size: 1, Data: []byte("x")})
		}
		return [][]*content.Entry{append(entries, &content.Entry{Path: "s.py", Kind: content.Regular, Mode: 0o644, Size: 1,
			Data: []byte("x")})}
	}},
	{"100 layers that touch the same 10,000 files", func() (layers [][]*content.Entry) {
		for i := range 100 {
			layers = append(layers, filesOf(10_000, 0, 1, int64(i)))
		}
		return layers
	}},
}

// filesOf is a layer of small files in one directory.
func filesOf(n, from, step int, mtime int64) []*content.Entry {
	out := []*content.Entry{{Kind: content.Dir, Mode: 0o755}, {Path: "d", Kind: content.Dir, Mode: 0o755}}
	for i := range n {
		out = append(out, &content.Entry{Path: fmt.Sprintf("d/%08d", from+i*step), Kind: content.Regular, Mode: 0o644,
			Size: 20, Data: []byte("this is a small file"), Mtime: content.Time{Sec: mtime}})
	}
	return out
}

// BenchmarkChain makes chain images of tree files: read, merged, written. peak-MB is the most that the heap held at a
// time.
func BenchmarkChain(b *testing.B) {
	for _, c := range chains {
		b.Run(strings.ReplaceAll(c.name, " ", "_"), func(b *testing.B) {
			var ids []content.LayerID
			var files [][]byte
			for _, entries := range c.layers() {
				slices.SortFunc(entries, func(a, b *content.Entry) int { return content.ComparePaths(a.Path, b.Path) })
				enc := tree.Encode(content.Python, entries)
				file, err := enc.Marshal(tree.Facts{})
				if err != nil {
					b.Fatal(err)
				}
				ids, files = append(ids, enc.ID), append(files, file)
			}
			b.ReportAllocs()
			runtime.GC()
			stop := watchHeap(b)
			for b.Loop() {
				root, err := tree.MergeEach(b.Context(), func(yield func([]*content.Entry, error) bool) {
					for i, id := range ids {
						if _, entries, err := tree.Decode(files[i], id); !yield(entries, err) {
							return
						}
					}
				})
				if err == nil {
					_, err = WriteChain(b.Context(), io.Discard, root, options(root, coarse))
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			stop()
		})
	}
}

// watchHeap reports the largest heap between now and stop.
func watchHeap(b *testing.B) (stop func()) {
	quit, done := make(chan struct{}), make(chan uint64)
	go func() {
		sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		var most uint64
		for {
			metrics.Read(sample)
			most = max(most, sample[0].Value.Uint64())
			select {
			case <-quit:
				done <- most
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	return func() {
		close(quit)
		b.ReportMetric(float64(<-done)/(1<<20), "peak-MB")
	}
}
