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

// With Debian's policy, enforcing, a real containerd and the daemon in the domain that the policy has for container
// engines, containers that are confined read images, and nothing that they should not.
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
	for _, name := range []string{"label.sh", "dedup-debian.cil"} {
		opts.Files[name] = filepath.Join(root, "deploy/selinux", name)
	}
	opts.Tree, opts.Append = tree, "security=selinux"
	opts.Script = selinuxScript
	out := runVM(t, opts, 30*time.Minute)
	for _, want := range []string{"--- PASS: TestSELinux/private ", "--- PASS: TestSELinux/shared ",
		"SELinux is enforcing: images are mounted as system_u:object_r:container_file_t:s0, and root is labelled"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(out, "denied  { watch") {
		t.Error("the daemon may not see who reads blobs")
	}
}
