package vm

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// makers make the file systems that have project quotas.
var makers = []node.Command{{Name: "mkfs.xfs", Packages: "xfsprogs"}, {Name: "mkfs.ext4", Packages: "e2fsprogs"}}

// addMakers adds them to a machine's disk.
func addMakers(t *testing.T, files map[string]string) {
	t.Helper()
	err := node.Require(t.Context(), func(s string) { t.Log(s) }, makers...)
	if errors.Is(err, node.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range makers {
		path, err := node.LookPath(m.Name)
		if err != nil {
			t.Fatal(err)
		}
		addProgram(t, files, path, "usr/sbin/"+m.Name)
	}
}

// Project quotas, which this machine's kernel may lack, limit what a snapshot holds, on XFS and on ext4, also over
// kills at every step, and what a container of a real containerd writes.
func TestQuota(t *testing.T) {
	opts := nodeOptions(t, Trixie)
	addMakers(t, opts.Files)
	built := t.TempDir()
	for _, pkg := range []string{"snapshotter/quota", "snapshotter"} {
		name, path := testBinary(t, opts.Kernel.Arch, built, pkg)
		opts.Files[name] = path
		opts.Script += "/" + name + " -test.v -test.run 'Size|Limit|Project|Probe$|Range$'\n"
	}
	// Here steps of builds lie on each other's directories: no overlay needs metacopy=on.
	opts.Script += "DEDUP_TEST_PAGE_CACHE=private /snapshotter.test -test.v -test.run 'MaxSize'\n"
	opts.Script += "./itest -test.v -test.run '^TestMaxSize$'\n"
	out := runVM(t, opts, 30*time.Minute)
	for _, name := range []string{"TestLimit/xfs", "TestLimit/ext4", "TestRenameBelowProject/xfs",
		"TestRenameBelowProject/ext4", "TestProbe", "TestMaxSize/xfs", "TestMaxSize/ext4", "TestMaxSizeKilled/xfs",
		"TestMaxSizeKilled/ext4", "TestMaxSizeCopied/xfs", "TestMaxSizeCopied/ext4"} {
		want := 1
		switch {
		case strings.HasPrefix(name, "TestMaxSize/"):
			want = 3 // the snapshotter's twice, and the node's
		case strings.HasPrefix(name, "TestMaxSizeKilled/"), strings.HasPrefix(name, "TestMaxSizeCopied/"):
			want = 2
		}
		if got := strings.Count(out, "--- PASS: "+name+" "); got != want {
			t.Errorf("%s passed %d times there, want %d", name, got, want)
		}
	}
}
