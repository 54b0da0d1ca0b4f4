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

// Imports point one way: content/** knows nothing of containerd's snapshotter API, gRPC or
// Prometheus; snapshotter talks to content/layer; only cmd wires.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	order := []string{"/content", "/snapshotter", "/cmd"} // each may import what stands before it
	forbidden := []string{
		"github.com/containerd/containerd/v2/core/snapshots", "github.com/containerd/containerd/v2/client",
		"google.golang.org/grpc", "github.com/prometheus",
	}
	seen := 0
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		rank := slices.IndexFunc(order, func(p string) bool { return strings.HasPrefix(pkg.ImportPath, module+p) })
		if rank < 0 {
			continue
		}
		seen++
		for _, imp := range pkg.Imports {
			for r, p := range order {
				if r > rank && strings.HasPrefix(imp, module+p) {
					t.Errorf("%s imports %s", pkg.ImportPath, imp)
				}
			}
			if rank == 0 && slices.ContainsFunc(forbidden, func(f string) bool { return strings.HasPrefix(imp, f) }) {
				t.Errorf("%s imports %s", pkg.ImportPath, imp)
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d packages were looked at", seen)
	}
}
