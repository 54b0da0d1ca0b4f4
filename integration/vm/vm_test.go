package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// kernelFor returns Debian's kernel, where DEDUP_VM asks for these tests: they download 100 MB and take minutes.
func kernelFor(t *testing.T, suite string) Kernel {
	t.Helper()
	if os.Getenv("DEDUP_VM") == "" {
		t.Skip("runs under QEMU for minutes: set DEDUP_VM=1, or make test-vm")
	}
	say := func(s string) { t.Log(s) }
	err := Require(t.Context(), say)
	var k Kernel
	if err == nil {
		k, err = Debian(t.Context(), suite, say)
	}
	if errors.Is(err, node.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// testBinary builds the tests of a package into one static program.
func testBinary(ctx context.Context, t *testing.T, dir, pkg string) (name, path string) {
	t.Helper()
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	name = strings.ReplaceAll(pkg, "/", "-") + ".test"
	path = filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-ldflags", "-s -w", "-o", path, "./"+pkg)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the tests of %s: %v\n%s", pkg, err, out)
	}
	return name, path
}

// The store's and the snapshotter's own tests pass on Linux 6.12, whose overlayfs wants metacopy=on for data-only lower layers, and
// on an ext4 with fs-verity, which other machines may lack; those of fs-verity on the newest Linux too, where overlayfs wants no metacopy, and on
// btrfs. What kills processes at some millisecond is left out: here a millisecond is nothing.
func TestUnitTests(t *testing.T) {
	packages := []string{"content/verity", "content/object", "content/layer", "snapshotter"}
	built := t.TempDir()
	for _, row := range []struct {
		suite         string
		fs            FS
		tests, option string
	}{
		{Trixie, Ext4, ".", "verity=on"},
		{Sid, Ext4, "Enable|Verity|TestRestart|TestPut", "verity=require"},
		{Trixie, Btrfs, "Enable|Verity|TestRestart|TestPut", "verity=on"},
	} {
		t.Run(fmt.Sprintf("%s on %s", row.suite, row.fs), func(t *testing.T) {
			opts := Options{Kernel: kernelFor(t, row.suite), Dir: t.TempDir(), FS: row.fs, Files: map[string]string{}, Script: "set -e\nuname -r\n"}
			ran := []string{"TestEnable", "TestVerityRefusesOtherBytes", "TestVerityOnAndOff", "TestVerityDoesNotSealDamage", "TestVerityAfterRestore", "TestVerityCommit", "TestRestartAndReboot"}
			if row.fs == Ext4 {
				opts.Script += "export DEDUP_TEST_DISK=/dev/vda\n"
				ran = append(ran, "TestVerityRefusesFlippedBits")
			}
			if testing.Verbose() {
				opts.Output = os.Stderr
			}
			for _, pkg := range packages {
				name, path := testBinary(t.Context(), t, built, pkg)
				opts.Files[name] = path
				opts.Script += fmt.Sprintf("echo '== %s'\n./%s -test.v -test.run '%s' -test.skip 'TestKilled|TestCrash'\n", pkg, name, row.tests)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // a machine that hangs
			defer cancel()
			out, err := Run(ctx, opts)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.Contains(out, "overlay with "+row.option) {
				t.Errorf("overlays were not mounted with %s", row.option)
			}
			for _, name := range ran {
				if !strings.Contains(out, "\n--- PASS: "+name+" ") {
					t.Errorf("%s did not run there", name)
				}
			}
		})
	}
}
