package tree

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// sitePackages is a layer of about 50 files for each package, a third of them inline.
func sitePackages(packages int) []*content.Entry {
	const root = "usr/lib/python3"
	entries := []*content.Entry{{Kind: content.Dir, Mode: 0o755}}
	for _, dir := range []string{"usr", "usr/lib", root} {
		entries = append(entries, &content.Entry{Path: dir, Kind: content.Dir, Mode: 0o755})
	}
	for p := range packages {
		dir := fmt.Sprintf("%s/package_%d", root, p)
		entries = append(entries, &content.Entry{Path: dir, Kind: content.Dir, Mode: 0o755})
		for f := range 50 {
			e := &content.Entry{Path: fmt.Sprintf("%s/module_%d.py", dir, f), Kind: content.Regular, Mode: 0o644,
				Mtime: content.Time{Sec: int64(p)}}
			if f%3 == 0 {
				e.Data = []byte("from . import everything\n")
				e.Size = int64(len(e.Data))
			} else {
				e.Size, e.Object = int64(2000+f), object(e.Path)
			}
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b *content.Entry) int { return content.ComparePaths(a.Path, b.Path) })
	return entries
}

// BenchmarkMerge merges a chain of three layers of 10,000 files each.
func BenchmarkMerge(b *testing.B) {
	layers := [][]*content.Entry{sitePackages(200), sitePackages(150), sitePackages(200)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Merge(b.Context(), layers...); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkEncode encodes a layer of 10,000 files and makes its file.
func BenchmarkEncode(b *testing.B) {
	entries := sitePackages(200)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Encode(content.Python, entries).Marshal(Facts{Fidelity: content.Python}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRead reads the file of such a layer: all of it, and only what a start needs.
func BenchmarkRead(b *testing.B) {
	enc := Encode(content.Python, sitePackages(200))
	file, err := enc.Marshal(Facts{Fidelity: content.Python})
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(b.TempDir(), enc.ID.Hex())
	if err := os.WriteFile(path, file, 0o600); err != nil {
		b.Fatal(err)
	}
	b.Run("entries", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := Read(path, enc.ID); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("facts", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := ReadFacts(path, enc.ID); err != nil {
				b.Fatal(err)
			}
		}
	})
}
