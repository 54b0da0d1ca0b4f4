package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	err := Require(t.Context(), suite, say)
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
func testBinary(t *testing.T, arch, dir, pkg string) (name, path string) {
	t.Helper()
	name = strings.ReplaceAll(pkg, "/", "-") + ".test"
	path = filepath.Join(dir, name)
	build(t, arch, path, "test", "-c", "./"+pkg)
	return name, path
}

// build runs go build, or go test -c, for a static program for a machine of some type.
func build(t *testing.T, arch, path string, args ...string) {
	t.Helper()
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	last := len(args) - 1
	cmd := exec.CommandContext(t.Context(), "go", append(args[:last:last], "-ldflags", "-s -w", "-o", path, args[last])...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

// The store's and the snapshotter's own tests pass on Linux 6.12, whose overlayfs wants metacopy=on for data-only lower
// layers, and on an ext4 with fs-verity, which other machines may lack; those that mount on Linux 6.1 too, from loop
// devices, and as it was before it mounted dense packs; those of fs-verity on the newest Linux, where overlayfs wants
// no metacopy, and on btrfs. What kills processes at some millisecond is left out: here a millisecond is nothing.
func TestUnitTests(t *testing.T) {
	packages := []string{"content/verity", "content/object", "content/layer", "snapshotter/lower", "snapshotter"}
	loops := []string{"content/verity", "snapshotter/lower", "snapshotter"}
	built := t.TempDir()
	for _, row := range []struct {
		suite    string
		fs       FS
		tests    string
		packages []string
	}{
		{Bookworm, Ext4, ".", loops},
		{BookwormCoarse, Ext4, "Dense|Enable|Verity|TestRestart|TestPacks|TestReopened|TestAllReaders", loops},
		{Trixie, Ext4, ".", packages},
		{Sid, Ext4, "Enable|Verity|TestRestart|TestPut", packages},
		{Trixie, Btrfs, "Enable|Verity|TestRestart|TestPut", packages},
	} {
		t.Run(fmt.Sprintf("%s on %s", row.suite, row.fs), func(t *testing.T) {
			opts := Options{Kernel: kernelFor(t, row.suite), Dir: t.TempDir(), FS: row.fs, Files: map[string]string{},
				Script: "set -e\nuname -r\n"}
			ran := []string{"TestEnable", "TestVerityRefusesOtherPacks", "TestVerityOnAndOff", "TestVerityDoesNotSealDamage",
				"TestVerityAfterRestore", "TestVerityCommit", "TestRestartAndReboot"}
			if row.fs == Ext4 {
				opts.Script += "export DEDUP_TEST_DISK=/dev/vda\n"
				ran = append(ran, "TestVerityRefusesFlippedBits")
			}
			if testing.Verbose() {
				opts.Output = os.Stderr
			}
			for _, pkg := range row.packages {
				name, path := testBinary(t, opts.Kernel.Arch, built, pkg)
				opts.Files[filepath.Join(pkg, name)] = path
				addTestdata(t, opts.Files, pkg)
				opts.Script += fmt.Sprintf("echo '== %[1]s'\n(cd %[1]s && ./%[2]s -test.v -test.run '%[3]s' "+
					"-test.skip 'TestKilled|TestCrash')\n", pkg, name, row.tests)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour) // a machine that hangs
			defer cancel()
			out, err := Run(ctx, opts)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, name := range ran {
				if !strings.Contains(out, "\n--- PASS: "+name+" ") {
					t.Errorf("%s did not run there", name)
				}
			}
			if row.tests == "." || row.suite == BookwormCoarse {
				dense := strings.Contains(out, "--- PASS: TestPacksFollowImages/private_looped_dense ")
				if want := row.suite != BookwormCoarse; dense != want {
					t.Errorf("tests with dense packs ran: %t, want %t", dense, want)
				}
			}
		})
	}
}

// On a disk with sectors of 4 KiB, images with blocks of 512 bytes are mounted like others: from files, and from loop
// devices, whose blocks are smaller than the disk's then.
func TestLargeSectors(t *testing.T) {
	for _, row := range []struct {
		suite string
		ran   []string
	}{
		{Bookworm, []string{"private_looped", "private_looped_dense"}},
		{Trixie, []string{"private_dense", "private_looped_dense", "shared_dense", "shared_looped_dense"}},
	} {
		t.Run(row.suite, func(t *testing.T) {
			opts := Options{Kernel: kernelFor(t, row.suite), Dir: t.TempDir(), FS: Ext4, Sectors: 4096}
			name, path := testBinary(t, opts.Kernel.Arch, t.TempDir(), "snapshotter/lower")
			opts.Files = map[string]string{name: path}
			opts.Script = "set -e\nuname -r\n[ $(cat /sys/block/vda/queue/logical_block_size) = 4096 ]\n" +
				"./" + name + " -test.v -test.run 'TestMountsDense|TestAllReaders|TestPacksFollow'\n"
			if testing.Verbose() {
				opts.Output = os.Stderr
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute) // a machine that hangs
			defer cancel()
			out, err := Run(ctx, opts)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, kind := range row.ran {
				if !strings.Contains(out, "--- PASS: TestAllReadersSeeTheSame/"+kind+" ") {
					t.Errorf("%s did not run there", kind)
				}
			}
		})
	}
}

// addTestdata adds what the tests of a package read, for a machine that runs them in a directory of the same name.
func addTestdata(t *testing.T, files map[string]string, pkg string) {
	t.Helper()
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(filepath.Join(root, pkg, "testdata"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, path)
		files[name] = path
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// readAll are the tests of content/erofs that run on each kernel which mounts images from files, after
// "TestKernelReads".
func readAll() (names []string) {
	for _, blocks := range []string{"coarse", "dense"} {
		for _, way := range []string{"file", "loop"} {
			names = append(names, "Pack/"+blocks+"/"+way, "ChainOverPacks/"+blocks+"/private_"+way,
				"ChainOverPacks/"+blocks+"/shared_"+way, "TortureOverPacks/"+blocks+"/private_"+way,
				"TortureOverPacks/"+blocks+"/shared_"+way, "LargePayloads/"+blocks+"/"+way+"/overlay")
		}
	}
	return names
}

// readLooped are those that run on a kernel which mounts images from loop devices alone, in private mode.
func readLooped(blocks string) []string {
	return []string{"Pack/" + blocks + "/loop", "ChainOverPacks/" + blocks + "/private_loop",
		"TortureOverPacks/" + blocks + "/private_loop"}
}

// Packs and chain images over them are read right by older kernels: Linux 6.1 mounts both from loop devices, and
// images over packs by themselves; 6.12 mounts them from files, and as data-only lower layers with metacopy=on. All
// mount blocks of 512 bytes, but for 6.1 as it was before 6.1.115, which refuses them.
func TestImages(t *testing.T) {
	for _, row := range []struct {
		suite string
		ran   []string
		// refused are those that skip, since the kernel does not mount blocks of 512 bytes.
		refused []string
	}{
		{BookwormCoarse, readLooped("coarse"), readLooped("dense")},
		{Bookworm, slices.Concat(readLooped("coarse"), readLooped("dense"), []string{"LargePayloads/coarse/loop/chain",
			"LargePayloads/dense/loop/chain"}), nil},
		{TrixieArm, readAll(), nil},
		{TrixieArm16K, readAll(), nil},
		{SidPower, readAll(), nil},
		{Trixie, append(readAll(), "ChainOverManyPacks/coarse", "ChainOverManyPacks/dense"), nil},
		{Sid, readAll(), nil},
	} {
		t.Run(strings.ReplaceAll(row.suite, "/", "-"), func(t *testing.T) {
			opts := Options{Kernel: kernelFor(t, row.suite), Dir: t.TempDir(), FS: Ext4, Files: map[string]string{}}
			if testing.Verbose() {
				opts.Output = os.Stderr
			}
			name, path := testBinary(t, opts.Kernel.Arch, t.TempDir(), "content/erofs")
			opts.Files[name] = path
			opts.Script = fmt.Sprintf("uname -r\n./%s -test.v -test.run '^TestKernel'\n", name)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute) // a machine that hangs
			defer cancel()
			out, err := Run(ctx, opts)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, name := range row.ran {
				if !strings.Contains(out, "--- PASS: TestKernelReads"+name+" ") {
					t.Errorf("TestKernelReads%s did not run there", name)
				}
			}
			for _, name := range row.refused {
				if !strings.Contains(out, "--- SKIP: TestKernelReads"+name+" ") {
					t.Errorf("TestKernelReads%s was not refused", name)
				}
			}
			const word = "this kernel does not mount blocks of 512 bytes: "
			if n := strings.Count(out, word); n < len(row.refused) || n > 0 && len(row.refused) == 0 {
				t.Errorf("%q is there %d times, for %d tests", word, n, len(row.refused))
			}
		})
	}
}
