package vm

import (
	_ "embed"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

//go:embed selinux.sh
var selinuxScript string

func TestSELinux(t *testing.T) {
	opts := nodeOptions(t, Trixie)
	tree, err := SELinuxTree(t.Context(), Trixie, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	for name := range opts.Files { // the tree has its own runc
		if !strings.HasPrefix(name, "repo/") && !strings.HasPrefix(name, "cache/") {
			delete(opts.Files, name)
		}
	}
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	opts.Files["label.sh"] = filepath.Join(root, "deploy/selinux/label.sh")
	opts.Tree, opts.Append = tree, "security=selinux"
	opts.Script = selinuxScript
	runVM(t, opts, 30*time.Minute)
}
