package vm

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// nodeFiles are what a node needs: containerd, runc with its libraries, the daemon and its tools; path -> file here.
func nodeFiles(t *testing.T, k Kernel) map[string]string {
	t.Helper()
	files := map[string]string{}
	tools, err := node.Build(t.Context(), node.DefaultVersion, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := tools.Dir
	if k.Arch != runtime.GOARCH {
		dir = crossBuild(t, k.Arch)
	}
	for _, name := range containerdTools {
		files["cache/tools/"+filepath.Base(tools.Dir)+"/"+name] = filepath.Join(dir, name)
	}
	mod := "integration/tools/containerd-" + node.DefaultVersion + "/go.mod"
	files["repo/go.mod"], files["repo/"+mod] = filepath.Join(root, "go.mod"), filepath.Join(root, mod)
	built := t.TempDir()
	for _, name := range []string{"containerd-dedup-grpc", "dedupctl"} {
		files["repo/bin/"+name] = filepath.Join(built, name)
		build(t, k.Arch, filepath.Join(built, name), "build", "./cmd/"+name)
	}
	addRunc(t, k, files)
	return files
}

var containerdTools = []string{"containerd", "ctr", "containerd-shim-runc-v2"}

// crossBuild builds containerd for machines of another type.
func crossBuild(t *testing.T, arch string) string {
	t.Helper()
	root, err := node.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}
	for _, name := range containerdTools {
		args = append(args, "github.com/containerd/containerd/v2/cmd/"+name)
	}
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = filepath.Join(root, "integration/tools/containerd-"+node.DefaultVersion)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build containerd for %s: %v\n%s", arch, err, out)
	}
	return dir
}

// addRunc adds runc and its libraries, and for a machine of another type busybox, of which images are made.
func addRunc(t *testing.T, k Kernel, files map[string]string) {
	t.Helper()
	if k.Arch != runtime.GOARCH {
		for name, at := range map[string]string{"runc": "usr/sbin/runc", "busybox": "usr/bin/busybox"} {
			path, err := k.Program(name)
			if err != nil {
				t.Fatal(err)
			}
			files[at] = path
		}
		libraries, err := filepath.Glob(filepath.Join(k.root, "usr/lib/*-linux-gnu/*.so.*"))
		older, oerr := filepath.Glob(filepath.Join(k.root, "lib/*-linux-gnu/*.so.*"))
		if err := errors.Join(err, oerr); err != nil {
			t.Fatal(err)
		}
		for _, path := range append(libraries, older...) {
			file, err := filepath.EvalSymlinks(path)
			if err != nil {
				t.Fatal(err)
			}
			files["lib/"+filepath.Base(path)] = file
		}
		addInterpreter(t, files, "usr/sbin/runc")
		return
	}
	if err := node.Require(t.Context(), func(s string) { t.Log(s) }, node.Runc); err != nil {
		t.Skip(err)
	}
	runc, err := node.LookPath(node.Runc.Name)
	if err != nil {
		t.Fatal(err)
	}
	addProgram(t, files, runc, "usr/sbin/runc")
}

// addInterpreter adds what loads a program's libraries, where the program looks for it.
func addInterpreter(t *testing.T, files map[string]string, program string) {
	t.Helper()
	f, err := elf.Open(files[program])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		at := strings.Trim(string(name), "/\x00")
		if files[at] = files["lib/"+filepath.Base(at)]; files[at] == "" {
			t.Fatalf("%s needs %s, which is not among its libraries", program, at)
		}
	}
}

// addProgram adds a program of this machine, and its libraries.
func addProgram(t *testing.T, files map[string]string, from, to string) {
	t.Helper()
	program, err := filepath.EvalSymlinks(from)
	if err != nil {
		t.Fatal(err)
	}
	files[to] = program
	libraries, err := exec.CommandContext(t.Context(), "ldd", from).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1) {
		file, err := filepath.EvalSymlinks(path)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(path, "/")] = file
	}
}

// runVM runs a script with the disk as the root directory.
func runVM(t *testing.T, opts Options, limit time.Duration) string {
	t.Helper()
	opts.FS, opts.Root = Ext4, true
	if testing.Verbose() {
		opts.Output = os.Stderr
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit) // a machine that hangs
	defer cancel()
	out, err := Run(ctx, opts)
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return out
}

// kernelTests are the integration tests that each kernel runs, and what the table calls them.
type kernelTest struct{ name, run, row string }

var kernelTests = []kernelTest{
	{"TestKernelVerity", "TestKernelVerity$", "fs-verity"},
	{"TestEqualityTorture", "TestEqualityTorture/apply", "torture: equal to overlayfs"},
	{"TestReboot", "TestReboot", "reboot"},
	{"TestRestart", "TestRestart", "restarts and kill -9"},
	{"TestDaemonKilledDuringPull", "TestDaemonKilledDuringPull", "kill -9 in a pull"},
	{"TestManyImages", "TestManyImages", "many images: all back after removal"},
}

// tell logs a cell of the table in docs/kernels.md. The command in integration/vm/table draws it.
func tell(t *testing.T, suite, row, cell string) {
	t.Helper()
	t.Logf("table: %s | %s | %s", suite, row, cell)
}

// tellRows logs cells that a test in the machine has printed in lines that begin with "row: ", and returns them all.
func tellRows(t *testing.T, suite, out string) map[string]string {
	t.Helper()
	seen := map[string]string{}
	for _, r := range regexp.MustCompile(`row: ([a-z :,-]+)=(.*)`).FindAllStringSubmatch(out, -1) {
		if seen[r[1]] = strings.TrimSpace(r[2]); r[1] != "scale" {
			tell(t, suite, r[1], seen[r[1]])
		}
	}
	return seen
}

// result tells how a test ended in a machine.
func result(out, name string) string {
	switch {
	case strings.Contains(out, "\n--- PASS: "+name+" "):
		return "pass"
	case strings.Contains(out, "--- FAIL: "+name+" "):
		return "FAIL"
	case strings.Contains(out, "--- SKIP: "+name+" "):
		return "skipped"
	}
	return "not run"
}

// loopsLeft counts the loop devices that are attached when all tests have ended. The kernel frees them a moment after
// their last mount.
const loopsLeft = `for i in $(seq 60); do
	left=$(ls -d /sys/block/loop*/loop 2>/dev/null | wc -l)
	[ "$left" = 0 ] && break
	sleep 1
done
echo "row: loop devices left=$left"
`

// With a real containerd and runc, a node on each of Debian's kernels serves images, or refuses with a word. What is
// seen comes out as lines of the table in docs/kernels.md, which begin with "table: ". DEDUP_KERNEL_TEST has a kernel
// run one of the tests again, by its name.
func TestKernels(t *testing.T) {
	t.Parallel()
	nearly := kernelTest{name: "TestKernelNode", row: "two nearly equal images: equal to overlayfs"}
	var chosen []kernelTest
	for _, k := range kernelTests {
		if strings.Contains(k.name, os.Getenv("DEDUP_KERNEL_TEST")) {
			chosen = append(chosen, k)
		}
	}
	for _, row := range []struct{ suite, mode string }{
		{Bullseye, "refused"}, {Bookworm, "private, loop"}, {Trixie, "shared, file"}, {Sid, "shared"},
		{TrixieArm, "shared, file"},
	} {
		t.Run(strings.ReplaceAll(row.suite, "/", "-"), func(t *testing.T) {
			t.Parallel() // a machine has one CPU
			opts := nodeOptions(t, row.suite)
			opts.Script += "echo \"row: kernel=$(uname -r)\"\n/repo/bin/dedupctl doctor | grep -A1 kernel || true\n" +
				"./itest -test.v -test.timeout 2h -test.run '^TestKernelNode$'\n"
			if row.mode != "refused" {
				for _, k := range chosen {
					opts.Script += fmt.Sprintf("./itest -test.v -test.parallel 1 -test.timeout 2h -test.run '^%s' || true\n", k.run)
				}
				opts.Script += loopsLeft
			}
			out := runVM(t, opts, 5*time.Hour) // emulated, beside other work
			seen := tellRows(t, row.suite, out)
			if !strings.HasPrefix(seen["mode"], row.mode) {
				t.Errorf("mode %q, want %q", seen["mode"], row.mode)
			}
			if row.mode == "refused" {
				return
			}
			for _, k := range append(chosen, nearly) {
				got := result(out, k.name)
				if tell(t, row.suite, k.row, got); got != "pass" {
					t.Errorf("%s: %s", k.name, got)
				}
			}
			if got := seen["loop devices left"]; got != "0" {
				t.Errorf("loop devices left: %q", got)
			}
		})
	}
}

// nodeOptions are a machine with a node and the integration tests, in whose directory the script begins.
func nodeOptions(t *testing.T, suite string) Options {
	t.Helper()
	k := kernelFor(t, suite)
	opts := Options{Kernel: k, Dir: t.TempDir(), Files: nodeFiles(t, k)}
	itest := filepath.Join(t.TempDir(), "itest")
	build(t, k.Arch, itest, "test", "-c", "./integration")
	opts.Files["repo/integration/itest"] = itest
	opts.Script = "set -e\nexport DEDUP_SLOW=1 DEDUP_CACHE=/cache\nmkdir -p /tmp /var/tmp; cd /repo/integration\n"
	return opts
}

// On Linux 6.1, where each chain image and each pack has a loop device, 200 images and 100 containers at a time start,
// outlive a daemon that is killed, and leave neither mounts nor loop devices. It takes half an hour. DEDUP_SCALE sets
// other numbers.
func TestKernelScale(t *testing.T) {
	opts := nodeOptions(t, Bookworm)
	opts.Script += "export DEDUP_SCALE=" + cmp.Or(os.Getenv("DEDUP_SCALE"), "200,100") +
		"\n./itest -test.v -test.timeout 3h -test.run '^TestManyImages$/^disk$'\n" + loopsLeft
	out := runVM(t, opts, 3*time.Hour)
	if line := regexp.MustCompile(`row: scale=(.*)`).FindStringSubmatch(out); line != nil {
		tell(t, Bookworm, "many images at a time", strings.TrimSpace(line[1]))
	}
	if !strings.Contains(out, "row: loop devices left=0") {
		t.Error("loop devices are left")
	}
}

// The images of `make demo`, two of 400 MB each, are on each kernel what overlayfs makes of them. They are made here
// once, and put on the machines' disks.
func TestKernelDemo(t *testing.T) {
	t.Parallel()
	for _, suite := range []string{Bookworm, Trixie, Sid} {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			opts := nodeOptions(t, suite)
			addDemo(t, opts.Files)
			opts.Script += "uname -r\n./itest -test.v -test.timeout 2h -test.run '^TestEqualityDemo$'\n"
			out := runVM(t, opts, 2*time.Hour)
			tellRows(t, suite, out)
			got := result(out, "TestEqualityDemo")
			if tell(t, suite, "demo images: equal to overlayfs", got); got != "pass" {
				t.Errorf("TestEqualityDemo: %s", got)
			}
		})
	}
}

// addDemo adds the layers of the demo's images, where inputs.Open looks for them.
func addDemo(t *testing.T, files map[string]string) {
	t.Helper()
	set, err := inputs.Open(func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"debian", "app-1", "app-2"} {
		var l *image.Layer
		if name == "debian" {
			l, err = set.Debian(t.Context())
		} else {
			l, err = set.App(t.Context(), int(name[len(name)-1]-'0'))
		}
		if errors.Is(err, node.ErrMissing) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(filepath.Dir(l.File))
		to := filepath.Join("cache/inputs", filepath.Base(dir))
		files[filepath.Join(to, name+".json")] = filepath.Join(dir, name+".json")
		files[filepath.Join(to, "sha256", filepath.Base(l.File))] = l.File
	}
}
