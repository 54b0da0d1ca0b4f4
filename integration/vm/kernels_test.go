package vm

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
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

//go:embed switch.sh
var switchScript string

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
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range libraries {
			file, err := filepath.EvalSymlinks(path)
			if err != nil {
				t.Fatal(err)
			}
			files["lib/"+filepath.Base(path)] = file
		}
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

// kernelTests are the integration tests that each kernel runs, and how the table calls them.
var kernelTests = []struct{ name, run, column string }{
	{"TestKernelVerity", "TestKernelVerity$", "fs-verity"},
	{"TestEqualityTorture", "TestEqualityTorture/apply", "equal: torture"},
	{"TestReboot", "TestReboot", "reboot"},
	{"TestRestart", "TestRestart", "restart, kill -9"},
	{"TestDaemonKilledDuringPull", "TestDaemonKilledDuringPull", "kill -9 in a pull"},
	{"TestManyImages", "TestManyImages", "back after removal"},
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
// seen comes out as a line of the table in docs/kernels.md, which begins with "table: ".
func TestKernels(t *testing.T) {
	for _, row := range []struct{ suite, mode string }{
		{Bullseye, "refused"}, {Bookworm, "private, loop"}, {Trixie, "shared, file"}, {Sid, "shared"},
		{TrixieArm, "shared, file"},
	} {
		t.Run(strings.ReplaceAll(row.suite, "/", "-"), func(t *testing.T) {
			opts := nodeOptions(t, row.suite)
			opts.Script += "echo \"row: kernel=$(uname -r)\"\n/repo/bin/dedupctl doctor | grep -A1 kernel || true\n" +
				"./itest -test.v -test.timeout 2h -test.run '^TestKernelNode$'\n"
			if row.mode != "refused" {
				for _, k := range kernelTests {
					opts.Script += fmt.Sprintf("./itest -test.v -test.parallel 1 -test.timeout 2h -test.run '^%s' || true\n", k.run)
				}
				opts.Script += loopsLeft
			}
			out := runVM(t, opts, 5*time.Hour) // emulated, beside other work
			rows := regexp.MustCompile(`row: ([a-z ]+)=(.*)`).FindAllStringSubmatch(out, -1)
			seen := map[string]string{}
			for _, r := range rows {
				seen[r[1]] = strings.TrimSpace(r[2])
			}
			if !strings.HasPrefix(seen["mode"], row.mode) {
				t.Errorf("mode %q, want %q", seen["mode"], row.mode)
			}
			cells := []string{row.suite, seen["kernel"], seen["mode"], seen["disk dedup"], seen["disk overlayfs"]}
			for _, k := range kernelTests {
				result := "not run"
				switch {
				case strings.Contains(out, "\n--- PASS: "+k.name+" "):
					result = "pass"
				case strings.Contains(out, "--- FAIL: "+k.name+" "):
					result = "FAIL"
				case strings.Contains(out, "--- SKIP: "+k.name+" "):
					result = "skipped"
				}
				if cells = append(cells, k.column+": "+result); result != "pass" && row.mode != "refused" {
					t.Errorf("%s: %s", k.name, result)
				}
			}
			if got := seen["loop devices left"]; got != "0" && row.mode != "refused" {
				t.Errorf("loop devices left: %q", got)
			}
			cells = append(cells, "loop devices left: "+seen["loop devices left"])
			for _, r := range rows {
				if r[1] == "scale" {
					cells = append(cells, strings.TrimSpace(r[2]))
				}
			}
			t.Logf("table: %s", strings.Join(cells, " | "))
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
	for _, what := range []string{"scale", "loop devices left"} {
		line := regexp.MustCompile(`row: ` + what + `=(.*)`).FindString(out)
		t.Logf("table: %s", strings.TrimSpace(strings.TrimPrefix(line, "row: ")))
	}
	if !strings.Contains(out, "row: loop devices left=0") {
		t.Error("loop devices are left")
	}
}

// The images of `make demo`, two of 400 MB each, are on each kernel what overlayfs makes of them. They are made here
// once, and put on the machines' disks.
func TestKernelDemo(t *testing.T) {
	for _, suite := range []string{Bookworm, Trixie, Sid} {
		t.Run(suite, func(t *testing.T) {
			opts := nodeOptions(t, suite)
			addDemo(t, opts.Files)
			opts.Script += "uname -r\n./itest -test.v -test.timeout 2h -test.run '^TestEqualityDemo$'\n"
			out := runVM(t, opts, 2*time.Hour)
			result := "FAIL"
			if strings.Contains(out, "\n--- PASS: TestEqualityDemo ") {
				result = "pass"
			} else {
				t.Error("TestEqualityDemo did not pass there")
			}
			cells := []string{suite, "equal: demo: " + result}
			for _, r := range regexp.MustCompile(`row: (demo [a-z]+=.*)`).FindAllStringSubmatch(out, -1) {
				cells = append(cells, strings.TrimSpace(r[1]))
			}
			t.Logf("table: %s", strings.Join(cells, " | "))
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

// A node's store goes from Linux 6.1 to 6.12 and back, by real reboots: containers start with what they had written,
// nothing is ingested again, and chain images are rebuilt where the mode changes.
func TestSwitchKernels(t *testing.T) {
	opts := Options{Dir: t.TempDir(), Files: nodeFiles(t, kernelFor(t, Bookworm))}
	tar := filepath.Join(t.TempDir(), "image.tar")
	saveImage(t, tar, image.File("payload", strings.Repeat("a line of the payload\n", 20000)))
	opts.Files["image.tar"] = tar
	opts.FS = Ext4
	disk, err := MakeDisk(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	opts.Disk, opts.Script = disk, switchScript
	var packs, chains []string
	for i, suite := range []string{Bookworm, Trixie, Bookworm, Bookworm} {
		opts.Kernel, opts.Dir = kernelFor(t, suite), t.TempDir()
		out := runVM(t, opts, 20*time.Minute)
		line := func(what string) string {
			m := regexp.MustCompile(`(?m)^switch: ` + what + `=(.*)$`).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("boot %d says nothing of %s", i+1, what)
			}
			return strings.TrimSpace(m[1])
		}
		if got, want := line("boots"), fmt.Sprint(i+1); got != want {
			t.Errorf("boot %d: the container has written %q lines, want %s", i+1, got, want)
		}
		packs, chains = append(packs, line("packs")), append(chains, line("chains"))
		t.Logf("table: switch | %s | %s | packs %s | chains %s", suite, line("mode"), packs[i], chains[i])
		if packs[i] != packs[0] {
			t.Errorf("boot %d: packs are others: %s", i+1, packs[i])
		}
	}
	if chains[0] == chains[1] || chains[2] != chains[3] {
		t.Errorf("chain images: %q", chains)
	}
}
