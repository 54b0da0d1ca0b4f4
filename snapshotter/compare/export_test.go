package compare

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// What the export of a build asks for each step: two views, the layer between them, and the views' removal. The base
// has 5,000 files.
func BenchmarkExport(b *testing.B) {
	w := newWorld(b, content.Python, lower.PageCacheShared)
	names := []string{w.commit("", func(root string) {
		for i := range 5000 {
			dir := filepath.Join(root, fmt.Sprint("lib-", i%100))
			path := filepath.Join(dir, fmt.Sprint(i))
			check(os.MkdirAll(dir, 0o755), os.WriteFile(path, fmt.Appendf(nil, "%0*d", i, i), 0o644))
		}
	})}
	w.ingest()
	for i := range 10 {
		names = append(names, w.commit(names[i], func(root string) {
			check(os.WriteFile(filepath.Join(root, fmt.Sprint("step-", i)), []byte("step"), 0o644))
		}))
	}
	for n := 0; b.Loop(); n++ {
		i := n % 10
		lowerView, upperView := w.view(names[i]), w.view(names[i+1])
		_, err := w.ours.Compare(w.ctx, lowerView, upperView)
		w.must(err)
		for _, key := range []string{fmt.Sprint("view-", w.serial), fmt.Sprint("view-", w.serial-1)} {
			w.must(w.s.Remove(w.ctx, key))
		}
	}
}

// Steps are compared by their directories: neither they nor what lies below them become chain images for that.
func TestExportIngestsNothing(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	names := []string{w.commit("", plant)}
	w.ingest()
	base := w.view(names[0]) // of the base itself, beside those over it
	for i := range 3 {
		names = append(names, w.commit(names[i], func(root string) {
			check(os.WriteFile(filepath.Join(root, fmt.Sprint("step-", i)), []byte("step"), 0o644))
		}))
	}
	sides := [][]mount.Mount{base, w.view(names[1]), w.view(names[2]), w.view(names[3])}
	before := w.s.Stats()
	for i := range 3 {
		w.agree(names[i+1], sides[i], sides[i+1])
	}
	after := w.s.Stats()
	ingests := func(s snapshotter.Stats) (n int64) {
		for a, count := range s.Answers {
			if a.Door == "commit" {
				n += count
			}
		}
		return n
	}
	if after.Builds != before.Builds || ingests(after) != ingests(before) {
		t.Errorf("%d chain images built, %d directories ingested", after.Builds-before.Builds, ingests(after)-ingests(before))
	}
}
