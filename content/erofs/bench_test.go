package erofs

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// sitePackages is a tree like that of a Python image: 39 % of the files are small
// enough to lie in the image, and rows of them have mtimes of their own.
func sitePackages(entries int) *tree.Node {
	rnd := rand.New(rand.NewPCG(1, 2))
	var packages []*tree.Node
	for n := 0; n < entries; {
		var files []*tree.Node
		for i := range 5 + rnd.IntN(30) {
			e := &content.Entry{Kind: content.Regular, Mode: 0o644, Mtime: content.Time{Sec: 315_532_800}}
			if rnd.IntN(5) == 0 {
				e.Mtime.Sec += int64(rnd.IntN(1000))
			}
			if e.Size = rnd.Int64N(100_000); rnd.IntN(100) < 39 {
				e.Data = text(rnd.IntN(600), i)
				e.Size = int64(len(e.Data))
			} else {
				e.Object = content.ObjectID{Sum: sha256.Sum256(fmt.Append(nil, n))}
			}
			files = append(files, leaf(fmt.Sprintf("module_%d.cpython-311.pyc", i), e))
			n++
		}
		packages = append(packages, dir(fmt.Sprintf("package_%d", n), files...))
		n++
	}
	return dir("", packages...)
}

func BenchmarkWrite(b *testing.B) {
	const entries = 60_000
	root := sitePackages(entries)
	var length int64
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if length, err = Write(b.Context(), io.Discard, root); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(length)/entries, "image-B/entry")
}
