package layer

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// largeStore has the trees of 100 layers of 20,000 files, half of which a layer shares with its neighbours, and none of
// the 1,000,000 objects, which the reports do not look at.
func largeStore(b *testing.B) *Store {
	root := b.TempDir()
	if err := os.MkdirAll(filepath.Join(root, dirLayers), 0o700); err != nil {
		b.Fatal(err)
	}
	var live []content.LayerID
	for l := range 100 {
		entries := []*content.Entry{{Kind: content.Dir, Mode: 0o755}}
		for i := range 20_000 {
			payload := fmt.Sprint(l*10_000 + i)
			entries = append(entries, &content.Entry{
				Path: fmt.Sprintf("m%05d.py", i), Kind: content.Regular, Mode: 0o644, Size: int64(1000 + i),
				Object: content.ObjectID{Sum: sha256.Sum256([]byte(payload))},
			})
		}
		enc := tree.Encode(content.Python, entries)
		file, err := enc.Marshal(tree.Facts{Fidelity: content.Python, Entries: int64(len(entries))})
		if err == nil {
			err = os.WriteFile(filepath.Join(root, dirLayers, enc.ID.Hex()), file, 0o600)
		}
		if err != nil {
			b.Fatal(err)
		}
		live = append(live, enc.ID)
	}
	s, err := Open(b.Context(), Options{Root: root, Fidelity: content.Python}, live)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.closeFiles() })
	return s
}

// peak runs report and tells how much the heap grew meanwhile.
func peak(b *testing.B, report func()) {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	runtime.GC()
	before, most := heap(), uint64(0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		report()
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(10 * time.Millisecond):
		}
		most = max(most, heap())
	}
	b.ReportMetric(float64(most-min(most, before))/1e6, "MB-peak")
}

// BenchmarkSharing is what dedupctl images takes in a store with a million objects.
func BenchmarkSharing(b *testing.B) {
	s := largeStore(b)
	for b.Loop() {
		peak(b, func() {
			if _, err := s.Sharing(b.Context()); err != nil {
				b.Error(err)
			}
		})
	}
}

// BenchmarkDuplicates is what dedupctl duplicates takes there.
func BenchmarkDuplicates(b *testing.B) {
	s := largeStore(b)
	for b.Loop() {
		peak(b, func() {
			if _, err := s.Duplicates(b.Context(), 10); err != nil {
				b.Error(err)
			}
		})
	}
}
