package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// found is a finding of dedupctl doctor.
type found struct{ Check, Severity, Message, Remedy string }

// diagnose runs dedupctl doctor and returns what is not as it should be. The exit code has to fit.
func diagnose(t *testing.T, n *node.Node, args ...string) []found {
	t.Helper()
	out, err := dedupctl(t, n, append([]string{"doctor", "--json", "--config", filepath.Join(n.Dir(), "dedup.toml")},
		args...)...)
	var d struct {
		Problems, Warnings int
		Findings           []found
	}
	if derr := json.NewDecoder(strings.NewReader(out)).Decode(&d); derr != nil {
		t.Fatalf("%v, %v: %s", err, derr, out)
	}
	code := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	problems := 0
	var list []found
	for _, f := range d.Findings {
		if f.Severity == "problem" {
			problems++
		}
		if f.Severity != "ok" && f.Check != "kernel.fs-verity" && f.Check != "disk.reflink" && f.Severity != "info" &&
			f.Remedy == "" {
			t.Errorf("%+v has no remedy", f)
		}
		list = append(list, f)
	}
	if want := 3 * min(problems, 1); code != want || d.Problems != problems {
		t.Errorf("exit code %d with %d problems (%d counted)", code, d.Problems, problems)
	}
	return list
}

// worse leaves out what is as it should be, and what depends on the machine.
func worse(list []found) (out []found) {
	for _, f := range list {
		if f.Severity == "problem" || f.Severity == "warning" {
			if !strings.HasPrefix(f.Check, "disk.") {
				out = append(out, f)
			}
		}
	}
	return out
}

// expect fails unless exactly these checks are worse than they should be: check -> severity, and words of it.
func expect(t *testing.T, list []found, want map[string][2]string) {
	t.Helper()
	seen := map[string]bool{}
	for _, f := range worse(list) {
		w, ok := want[f.Check]
		if !ok || f.Severity != w[0] || !strings.Contains(f.Message+" > "+f.Remedy, w[1]) {
			t.Errorf("%+v, want %q", f, w)
		}
		seen[f.Check] = true
	}
	for check := range want {
		if !seen[check] {
			t.Errorf("%s is not found in %+v", check, list)
		}
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	pull(t, n, node.Snapshotter, push(t, r, "app:1", layer(t, image.File("app", string(make([]byte, 5000))))))
	settle(t, n)
	t.Run("healthy", func(t *testing.T) { doctorIsContent(t, n) })
	t.Run("rights", func(t *testing.T) {
		for path, check := range map[string]string{
			n.DedupAddress(): "daemon.socket", filepath.Dir(n.DedupAddress()): "daemon.socket-directory",
			n.DedupRoot(): "daemon.root",
		} {
			fi, err := os.Stat(path)
			must(t, err)
			must(t, os.Chmod(path, 0o777))
			expect(t, diagnose(t, n), map[string][2]string{check: {"problem", "chmod 0"}})
			must(t, os.Chmod(path, fi.Mode().Perm()))
		}
	})
	t.Run("leaked mounts", func(t *testing.T) { doctorFindsMounts(t, n) })
	t.Run("containerd's config", func(t *testing.T) { doctorReadsConfig(t, n) })
	t.Run("a stranger", func(t *testing.T) {
		cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", copyOfDedupctl(t), "doctor")
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 ||
			!strings.Contains(string(out), "sudo dedupctl doctor") {
			t.Errorf("%s", out)
		}
	})
	must(t, n.StopDaemon())
	t.Run("no daemon", func(t *testing.T) {
		expect(t, diagnose(t, n), map[string][2]string{"daemon.runs": {"problem", "systemctl start containerd-dedup-grpc"}})
	})
	must(t, n.StopContainerd())
	t.Run("no containerd", func(t *testing.T) {
		expect(t, diagnose(t, n), map[string][2]string{"daemon.runs": {"problem", ""},
			"containerd.runs": {"problem", "containerd_address"}})
	})
	out, err := dedupctl(t, n, "doctor", "--config", n.Dir())
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 ||
		!strings.Contains(out, "is a directory") {
		t.Errorf("a config that cannot be read: %v: %s", err, out)
	}
}

func doctorIsContent(t *testing.T, n *node.Node) {
	list := diagnose(t, n)
	expect(t, list, nil)
	for _, check := range []string{
		"daemon.runs", "daemon.socket", "daemon.socket-directory", "daemon.root", "daemon.damage", "daemon.reserve",
		"kernel.erofs", "kernel.upper", "kernel.dense-packs", "kernel.data-only", "kernel.nested", "kernel.id-mapped",
		"kernel.fs-verity", "kernel.hole-punching", "kernel.selinux", "kernel.user-namespaces", "kernel.mode",
		"disk.type", "disk.space", "disk.inodes", "disk.d_type", "disk.reflink", "disk.quota",
		"containerd.version", "containerd.mount-namespace", "containerd.reached", "containerd.config",
		"containerd.snapshotter", "containerd.exports-root",
		"containerd.capabilities", "containerd.remap-ids", "containerd.differ", "containerd.differ-order",
		"containerd.unpack-config", "containerd.cri", "mounts.leaked",
	} {
		if !slices.ContainsFunc(list, func(f found) bool { return f.Check == check }) {
			t.Errorf("%s was not looked at", check)
		}
	}
	for _, f := range diagnose(t, n, "--quiet") {
		if f.Severity == "ok" {
			t.Errorf("--quiet shows %+v", f)
		}
	}
	if left, err := filepath.Glob(filepath.Join(n.DedupRoot(), "probe-*")); err != nil || len(left) > 0 {
		t.Errorf("doctor leaves %v, %v", left, err)
	}
}

func doctorFindsMounts(t *testing.T, n *node.Node) {
	chains, err := filepath.Glob(filepath.Join(n.DedupRoot(), "chains/*.erofs"))
	must(t, err)
	if len(chains) != 1 {
		t.Fatalf("there are %d chain images", len(chains))
	}
	idle := filepath.Join(filepath.Dir(n.DedupAddress()), "chains", strings.TrimSuffix(filepath.Base(chains[0]), ".erofs"))
	gone := filepath.Join(filepath.Dir(idle), strings.Repeat("0", 64))
	probe, overlay, upper := filepath.Join(n.DedupRoot(), "probe-1"), filepath.Join(n.Dir(), "mnt/leak"),
		filepath.Join(n.DedupRoot(), "snapshots/4711")
	for _, dir := range []string{idle, gone, probe, overlay, upper + "/fs", upper + "/work"} {
		must(t, os.MkdirAll(dir, 0o700))
	}
	must(t, unix.Mount("tmpfs", probe, "tmpfs", 0, ""))
	must(t, unix.Mount(chains[0], idle, "erofs", unix.MS_RDONLY, ""))
	must(t, unix.Mount(chains[0], gone, "erofs", unix.MS_RDONLY, ""))
	must(t, unix.Mount("overlay", overlay, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/fs,workdir=%s/work", n.Dir(),
		upper, upper)))
	must(t, os.RemoveAll(upper))
	list := diagnose(t, n)
	for _, point := range []string{probe, gone, overlay} {
		if !slices.ContainsFunc(list, func(f found) bool {
			return f.Check == "mounts.leaked" && f.Severity == "warning" && strings.HasPrefix(f.Message, point+": ") &&
				f.Remedy == "umount -l "+point
		}) {
			t.Errorf("%s is not found in %+v", point, list)
		}
	}
	if !slices.ContainsFunc(list, func(f found) bool {
		return f.Check == "mounts.idle" && strings.HasPrefix(f.Message, idle+": ")
	}) {
		t.Errorf("%s is not found in %+v", idle, list)
	}
	for _, point := range []string{probe, idle, gone, overlay} {
		must(t, unix.Unmount(point, unix.MNT_DETACH))
		must(t, os.Remove(point))
	}
	expect(t, diagnose(t, n), nil)
}

// doctorReadsConfig looks at wrong versions of the file that containerd was started with.
func doctorReadsConfig(t *testing.T, n *node.Node) {
	b, err := os.ReadFile(filepath.Join(n.Dir(), "containerd.toml"))
	must(t, err)
	for _, row := range []struct {
		name, old, new string
		want           map[string][2]string
	}{
		{"walking first", `default = ['dedup-diff', `, `default = ['walking', 'dedup-diff', `,
			map[string][2]string{"containerd.differ-order": {"warning", "asks walking first"}}},
		{"no dedup-diff", `default = ['dedup-diff', `, `default = [`,
			map[string][2]string{"containerd.differ-order": {"warning", "has no dedup-diff"}}},
		{"another differ unpacks", `differ = 'dedup-diff'`, `differ = 'walking'`,
			map[string][2]string{"containerd.unpack-config": {"warning", "unpacks for dedup with walking"}}},
		{"nobody unpacks", `snapshotter = 'dedup'`, `snapshotter = 'other'`,
			map[string][2]string{"containerd.unpack-config": {"warning", "no entry for dedup"}}},
		{"overlayfs is forgotten", `snapshotter = 'overlayfs'`, `snapshotter = 'other'`,
			map[string][2]string{"containerd.unpack-config": {"warning", "no entry for overlayfs"}}},
		{"no TOML", `version = 3`, `version =`, map[string][2]string{"containerd.config": {"warning", "config.toml: line "}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := strings.ReplaceAll(string(b), row.old, row.new)
			if text == string(b) {
				t.Fatalf("%q is not in\n%s", row.old, b)
			}
			path := filepath.Join(t.TempDir(), "config.toml")
			must(t, os.WriteFile(path, []byte(text), 0o600))
			expect(t, diagnose(t, n, "--containerd-config", path), row.want)
		})
	}
}

// A containerd that does not know the daemon, then does not know it yet, and then does.
func TestDoctorFollowsConfig(t *testing.T) {
	t.Parallel()
	n := startNode(t, node.Options{NoDedup: true})
	ctx := testContext(t)
	must(t, n.StartDaemon(ctx))
	expect(t, diagnose(t, n), map[string][2]string{
		"containerd.snapshotter":  {"problem", "dedupctl config containerd --write"},
		"containerd.differ":       {"problem", "plain files first"},
		"containerd.differ-order": {"warning", ""}, "containerd.unpack-config": {"warning", ""},
	})
	_, err := dedupctl(t, n, "images")
	if err == nil {
		t.Error("dedupctl images knows images of a containerd that does not know the daemon")
	}
	_, err = dedupctl(t, n, "config", "containerd", "--containerd-address", n.Address(), "--write", "--yes")
	must(t, err)
	expect(t, diagnose(t, n), map[string][2]string{
		"containerd.snapshotter": {"problem", "systemctl restart containerd"},
		"containerd.differ":      {"problem", "systemctl restart containerd"},
	})
	must(t, n.RestartContainerd(ctx))
	expect(t, diagnose(t, n), nil)
}

// A node with any containerd that is as it should be has nothing to mend.
func TestDoctorVersions(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			expect(t, diagnose(t, startDedup(t, node.Options{Version: version, CRI: true})), nil)
		})
	}
}

// An older containerd with settings for a newer one, and for another root.
func TestDoctorOldContainerd(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{Version: "2.3.7"})
	path := filepath.Join(n.Dir(), "containerd.toml")
	b, err := os.ReadFile(path)
	must(t, err)
	text := strings.Replace(string(b), "capabilities = ['remap-ids']", "capabilities = ['rebase', 'remap-ids']", 1)
	text = strings.Replace(text, "root = '"+n.DedupRoot()+"'", "root = '/elsewhere'", 1)
	must(t, os.WriteFile(path, []byte(text), 0o600))
	must(t, n.RestartContainerd(testContext(t)))
	expect(t, diagnose(t, n), map[string][2]string{
		"containerd.capabilities": {"problem", "downloads and unpacks what is known"},
		"containerd.exports-root": {"warning", "/elsewhere"},
	})
}

// A daemon in a mount namespace of its own starts, pulls, and gives containers nothing to see.
func TestDoctorMountNamespace(t *testing.T) {
	t.Parallel()
	root, err := node.ModuleRoot()
	must(t, err)
	wrapper := filepath.Join(t.TempDir(), "daemon")
	must(t, os.WriteFile(wrapper, []byte("#!/bin/sh\nexec /usr/bin/unshare -m --propagation private "+root+
		"/bin/containerd-dedup-grpc \"$@\"\n"), 0o700))
	n := startDedup(t, node.Options{DaemonBinary: wrapper})
	expect(t, diagnose(t, n), map[string][2]string{"containerd.mount-namespace": {"problem", "PrivateTmp"}})
}

// A store that takes no new layers, and one that lost a payload.
func TestDoctorStore(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	file := payload("doctor", "file", 9000)
	pull(t, n, node.Snapshotter, push(t, r, "app:1", layer(t, file)))
	payloadOf(t, n, file.Content).flip(t)
	fsck(t, n, 3)
	must(t, n.StopDaemon())
	config := filepath.Join(n.Dir(), "dedup.toml")
	b, err := os.ReadFile(config)
	must(t, err)
	must(t, os.WriteFile(config, append([]byte("reserve_space = \"1000000TB\"\n"), b...), 0o600))
	must(t, n.StartDaemon(testContext(t)))
	expect(t, diagnose(t, n), map[string][2]string{"daemon.damage": {"problem", "dedupctl fsck --repair"},
		"daemon.reserve": {"problem", "reserve_space keeps"}})
}

// copyOfDedupctl lies where anybody can run it.
func copyOfDedupctl(t *testing.T) string {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	dir, err := os.MkdirTemp("", "dedupctl-")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	b, err := os.ReadFile(filepath.Join(root, "bin/dedupctl"))
	must(t, err)
	must(t, errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "dedupctl"), b, 0o755)))
	return filepath.Join(dir, "dedupctl")
}
