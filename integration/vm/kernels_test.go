package vm

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

//go:embed switch.sh
var switchScript string

// nodeFiles are what a node needs: containerd, runc with its libraries, the daemon and its tools; path -> file here.
func nodeFiles(t *testing.T) map[string]string {
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
	for _, name := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		files["cache/tools/"+filepath.Base(tools.Dir)+"/"+name] = filepath.Join(tools.Dir, name)
	}
	mod := "integration/tools/containerd-" + node.DefaultVersion + "/go.mod"
	files["repo/go.mod"], files["repo/"+mod] = filepath.Join(root, "go.mod"), filepath.Join(root, mod)
	built := t.TempDir()
	for _, name := range []string{"containerd-dedup-grpc", "dedupctl"} {
		files["repo/bin/"+name] = filepath.Join(built, name)
		build(t, filepath.Join(built, name), "build", "./cmd/"+name)
	}
	if err := node.Require(t.Context(), func(s string) { t.Log(s) }, node.Runc); err != nil {
		t.Skip(err)
	}
	runc, err := node.LookPath(node.Runc.Name)
	if err != nil {
		t.Fatal(err)
	}
	files["usr/sbin/runc"] = runc
	libraries, err := exec.CommandContext(t.Context(), "ldd", runc).Output()
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
	return files
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
	{"TestEqualityTorture", "TestEqualityTorture/apply", "equal: torture"},
	{"TestReboot", "TestReboot", "reboot"},
	{"TestRestart", "TestRestart", "restart, kill -9"},
	{"TestDaemonKilledDuringPull", "TestDaemonKilledDuringPull", "kill -9 in a pull"},
	{"TestManyImages", "TestManyImages", "back after removal"},
}

// With a real containerd and runc, a node on each of Debian's kernels serves images, or refuses with a word. What is
// seen comes out as a line of the table in docs/kernels.md, which begins with "table: ".
func TestKernels(t *testing.T) {
	for _, row := range []struct{ suite, mode string }{
		{Bullseye, "refused"}, {Bookworm, "private, loop"}, {Trixie, "shared, file"}, {Sid, "shared"},
	} {
		t.Run(row.suite, func(t *testing.T) {
			opts := Options{Kernel: kernelFor(t, row.suite), Dir: t.TempDir(), Files: nodeFiles(t)}
			itest := filepath.Join(t.TempDir(), "itest")
			build(t, itest, "test", "-c", "./integration")
			opts.Files["repo/integration/itest"] = itest
			opts.Script = "export DEDUP_SLOW=1 DEDUP_CACHE=/cache DEDUP_SCALE=" + os.Getenv("DEDUP_SCALE") + "\nset -e\n" +
				"mkdir -p /tmp /var/tmp; cd /repo/integration\necho \"row: kernel=$(uname -r)\"\n" +
				"/repo/bin/dedupctl doctor | grep -A1 kernel || true\n./itest -test.v -test.run '^TestKernelNode$'\n"
			if row.mode != "refused" {
				for _, k := range kernelTests {
					opts.Script += fmt.Sprintf("./itest -test.v -test.parallel 1 -test.run '^%s' || true\n", k.run)
				}
			}
			out := runVM(t, opts, time.Hour)
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
				}
				if cells = append(cells, k.column+": "+result); result != "pass" && row.mode != "refused" {
					t.Errorf("%s: %s", k.name, result)
				}
			}
			t.Logf("table: %s", strings.Join(append(cells, seen["scale"]), " | "))
		})
	}
}

// A node's store goes from Linux 6.1 to 6.12 and back, by real reboots: containers start with what they had written,
// nothing is ingested again, and chain images are rebuilt where the mode changes.
func TestSwitchKernels(t *testing.T) {
	opts := Options{Dir: t.TempDir(), Files: nodeFiles(t)}
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
