package dedup

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dedup-snapshotter/dedup-snapshotter"

// layers are the parts of the product, lowest first. A package imports only packages of lower rows, or below itself;
// packages of one row do not know each other. The longest entry that a package is below is its own. All may import
// /content and /proto.
var layers = [][]string{
	{"/content/archive", "/content/tree", "/content/verity"},
	{"/content/erofs", "/content/recipe"},
	{"/content/object"},
	{"/content/layer"},
	{"/content/forecast"},
	{"/snapshotter/blobs", "/snapshotter/lower", "/snapshotter/quota"},
	{"/snapshotter"},
	{"/snapshotter/apply", "/snapshotter/compare", "/snapshotter/control", "/snapshotter/source"},
	{"/cmd/containerd-dedup-grpc", "/cmd/dedupctl"},
}

// unknownToContent are what nothing below content may import, directly or through others.
var unknownToContent = []string{
	"github.com/containerd/containerd/v2", "google.golang.org/grpc", "github.com/prometheus", module + "/snapshotter",
	module + "/cmd",
}

// lab is what measures and tests the product, and is in no product's binary.
var lab = []string{module + "/integration", module + "/cmd/dedup-bench"}

type goPackage struct {
	ImportPath    string
	Imports, Deps []string
}

// Imports point one way: content knows nothing of containerd's snapshotter API, gRPC or Prometheus, not even through a
// library; snapshotter stands on content; only cmd wires; and no product holds what tests it.
func TestImports(t *testing.T) {
	seen := 0
	for _, pkg := range listPackages(t) {
		path, ours := strings.CutPrefix(pkg.ImportPath, module)
		if !ours || isBelow(pkg.ImportPath, lab...) {
			continue
		}
		seen++
		for _, dep := range pkg.Deps {
			if isBelow(dep, lab...) {
				t.Errorf("%s depends on %s, which is not part of the product", pkg.ImportPath, dep)
			}
			if isBelow(path, "/content") && isBelow(dep, unknownToContent...) {
				t.Errorf("%s depends on %s", pkg.ImportPath, dep)
			}
		}
		for _, imp := range pkg.Imports {
			checkImport(t, path, strings.TrimPrefix(imp, module))
		}
	}
	if seen < 8 {
		t.Errorf("only %d packages were looked at", seen)
	}
}

func listPackages(t *testing.T) (all []goPackage) {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg goPackage
		if err := d.Decode(&pkg); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, pkg)
	}
}

// isBelow reports whether a package is one of these, or below one.
func isBelow(path string, prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return path == p || strings.HasPrefix(path, p+"/") })
}

// checkImport compares the rows of two packages of ours.
func checkImport(t *testing.T, from, to string) {
	t.Helper()
	if !strings.HasPrefix(to, "/") || to == "/content" || isBelow(to, "/proto") {
		return
	}
	a, roomA := place(from)
	b, roomB := place(to)
	if roomA == "" || roomB == "" || b > a || a == b && roomA != roomB {
		t.Errorf("%s imports %s (imports_test.go has the order)", from, to)
	}
}

// place is the row of a package, and the entry there.
func place(path string) (row int, room string) {
	for i, entries := range layers {
		for _, entry := range entries {
			if isBelow(path, entry) && len(entry) > len(room) {
				row, room = i, entry
			}
		}
	}
	return row, room
}
