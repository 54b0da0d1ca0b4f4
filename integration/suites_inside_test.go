package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// suiteRun is one run of a suite on one snapshotter, in a cell.
type suiteRun struct {
	Suite, Snapshotter string
	Only               string // the test to run; "" is all
	Dir                string
	// Where the programs are.
	Suites, Critest, CNI, Runc string
}

// suiteVariable holds a suiteRun as JSON for the process in the cell.
const suiteVariable = "DEDUP_SUITE_RUN"

// shortTemp is the suites' directory for temporary files: their containerds have sockets below the names of tests.
const shortTemp = "/var/lib/t"

func (s suiteRun) path(name string) string { return filepath.Join(s.Dir, name) }

// TestInsideCell is what runs in a cell for TestContainerdSuites and TestCritest: a registry that answers as the public
// ones, containerd with a snapshotter, and a suite on it. What the suite says goes to a file.
func TestInsideCell(t *testing.T) {
	if os.Getenv(suiteVariable) == "" {
		t.Skip("runs in a cell, for make test-containerd")
	}
	var s suiteRun
	must(t, json.Unmarshal([]byte(os.Getenv(suiteVariable)), &s))
	must(t, machine.LoopbackUp())
	named := pushSuiteImages(t, s.registry(t))
	s.network(t)
	var err error
	if s.Suite == "client" {
		err = s.run(t, nil, named)
	} else {
		err = s.onNode(t, named)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
}

// onNode runs the suite on the containerd of a node.
func (s suiteRun) onNode(t *testing.T, named []string) error {
	opts := node.Options{
		Parent: s.Dir, Runc: s.Runc, CRI: true, NoDedup: s.Snapshotter != node.Snapshotter, LogLevel: "debug",
		PauseImage: "registry.k8s.io/pause:3.10.2", Plugins: s.plugins(),
	}
	n, err := node.Start(testContext(t), opts)
	must(t, err)
	if !opts.NoDedup {
		must(t, n.StartDaemon(testContext(t)))
	}
	reachable(t, n)
	for _, name := range []string{"containerd-shim-runc-fp-v1", "runc-fp", "loopback-v2"} {
		must(t, os.Symlink(filepath.Join(s.Suites, name), filepath.Join(n.Dir(), "bin", name)))
	}
	for _, name := range []string{"iptables", "ip6tables"} { // for portmap
		path, err := node.LookPath(name)
		must(t, err)
		must(t, os.Symlink(path, filepath.Join(n.Dir(), "bin", name)))
	}
	// The suites end containerd, and wait until something starts it again.
	stop := n.KeepContainerd(t.Context(), 4*time.Second)
	err = s.run(t, n, named)
	stop()
	// The cell's end is the node's; its logs stay for whoever looks into a failure.
	for _, name := range []string{"containerd", "dedup"} {
		if log, err := os.ReadFile(n.LogPath(name)); err == nil {
			must(t, os.WriteFile(s.path(name+".log"), log, 0o600))
		}
	}
	return err
}

// registry answers as all public registries, whose names the cell finds here.
func (s suiteRun) registry(t *testing.T) *registry.Registry {
	t.Helper()
	r, err := registry.Start(registry.Options{Dir: s.path("registry")})
	must(t, err)
	certificate, text := selfSigned(t, publicHosts...)
	must(t, r.ServeTLS("127.0.0.1:443", certificate))
	must(t, os.WriteFile(s.path("ca.pem"), []byte(text), 0o600))
	must(t, os.Setenv("SSL_CERT_FILE", s.path("ca.pem")))
	hosts := fmt.Sprintf("127.0.0.1 localhost %s\n::1 localhost\n", strings.Join(publicHosts, " "))
	must(t, os.WriteFile("/etc/hosts", []byte(hosts), 0o644))
	return r
}

// network puts CNI's plugins and a bridge's configuration where each containerd looks, those of the suites too.
func (s suiteRun) network(t *testing.T) {
	t.Helper()
	const bridge = `{"cniVersion": "1.0.0", "name": "%s", "plugins": [
		{"type": "%s", "bridge": "%s", "isGateway": true, "ipMasq": false, "promiscMode": true,
		 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}%s},
		{"type": "portmap", "capabilities": {"portMappings": true}}]}`
	const failpoints = `, "capabilities": {"io.kubernetes.cri.pod-annotations": true}`
	for dir, text := range map[string]string{
		"/etc/cni/net.d":    fmt.Sprintf(bridge, "containerd-net", "bridge", "cni0", ""),
		"/etc/cni/fp-net.d": fmt.Sprintf(bridge, "containerd-net-failpoint", "cni-bridge-fp", "cni-fp", failpoints),
	} {
		must(t, os.MkdirAll(dir, 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "10-containerd-net.conflist"), []byte(text), 0o600))
	}
	// The suites look at the file system of containerd-test.
	for _, dir := range []string{"/opt/cni/bin", "/var/lib/containerd-test", shortTemp} {
		must(t, os.MkdirAll(dir, 0o755))
	}
	for _, path := range []string{"bridge", "loopback", "host-local", "portmap"} {
		must(t, os.Symlink(filepath.Join(s.CNI, path), filepath.Join("/opt/cni/bin", path)))
	}
	must(t, os.Symlink(filepath.Join(s.Suites, "cni-bridge-fp"), "/opt/cni/bin/cni-bridge-fp"))
	must(t, os.MkdirAll("/usr/local/bin", 0o755))
	must(t, os.Symlink(filepath.Join(s.Suites, "loopback-v2"), "/usr/local/bin/loopback-v2"))
}

// plugins is containerd's configuration as its own scripts write it for the suites.
func (s suiteRun) plugins() map[string]map[string]any {
	return map[string]map[string]any{
		"io.containerd.nri.v1.nri": {
			"disable": false, "socket_path": "/var/run/nri-test.sock", "plugin_path": "/no/pre-launched/nri/plugins",
		},
		"io.containerd.snapshotter.v1.overlayfs": {"slow_chown": true},
		"io.containerd.cri.v1.runtime": {
			"drain_exec_sync_io_timeout": "10s",
			"cni":                        map[string]any{"bin_dirs": []string{"/opt/cni/bin"}, "conf_dir": "/etc/cni/net.d"},
			"containerd": map[string]any{"default_runtime_name": "runc", "runtimes": map[string]any{
				"runc": map[string]any{"runtime_type": "io.containerd.runc.v2"},
				"runc-fp": map[string]any{
					"runtime_type": "io.containerd.runc-fp.v1", "cni_conf_dir": "/etc/cni/fp-net.d", "cni_max_conf_num": 1,
					"pod_annotations": []string{"io.containerd.runtime.v2.shim.failpoint.*"},
				},
			}},
		},
	}
}

// withDedup is what the client suite starts as containerd where dedup is the snapshotter. Each containerd gets a daemon
// of its own, since no two may share one.
const withDedup = `#!/bin/sh
set -eu
root= config= address= before=
for word; do
	case $before in
	--root) root=$word ;;
	--config | -c) config=$word ;;
	--address) address=$word ;;
	esac
	before=$word
done
if [ -n "$root" ] && [ -n "$config" ]; then
	dir=$DEDUP_DAEMONS/$(echo "$root" | md5sum | cut -c1-8)
	if [ ! -d "$dir" ]; then
		mkdir -p "$dir"
		printf 'root = "%s"\naddress = "%s"\ncontainerd_address = "%s"\n' \
			"$dir/root" "$dir/sock" "$address" >"$dir/toml"
		(setsid "$DEDUP_BIN/containerd-dedup-grpc" --config "$dir/toml" </dev/null >>"$DEDUP_DAEMONS/log" 2>&1 &)
	fi
	"$DEDUP_BIN/dedupctl" config containerd --containerd-version "$CONTAINERD_VERSION" \
		--root "$dir/root" --address "$dir/sock" | sed '/^version/d' >"$dir/containerd"
	grep -q '^.proxy_plugins' "$config" || cat "$dir/containerd" >>"$config"
fi
exec "$CONTAINERD" "$@"
`

// clientPath is where the client suite finds containerd, and the variables of that.
func (s suiteRun) clientPath(t *testing.T, tools string) (dir string, env []string) {
	t.Helper()
	if s.Snapshotter != node.Snapshotter {
		return tools, nil
	}
	root, err := node.ModuleRoot()
	must(t, err)
	dir = s.path("bin")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.MkdirAll(s.path("daemons"), 0o711))
	must(t, os.WriteFile(filepath.Join(dir, "containerd"), []byte(withDedup), 0o755))
	return dir + ":" + tools, []string{
		"DEDUP_BIN=" + filepath.Join(root, "bin"), "DEDUP_DAEMONS=" + s.path("daemons"),
		"CONTAINERD=" + filepath.Join(tools, "containerd"), "CONTAINERD_VERSION=" + node.DefaultVersion,
	}
}

// run runs the suite. Its output goes to "suite.log", critest's results to "report.json".
func (s suiteRun) run(t *testing.T, n *node.Node, named []string) error {
	t.Helper()
	out, err := os.Create(s.path("suite.log"))
	must(t, err)
	defer out.Close()
	tools, err := node.Build(testContext(t), node.DefaultVersion, nil)
	must(t, err)
	path, args := tools.Dir, []string(nil)
	switch s.Suite {
	case "client":
		args = []string{filepath.Join(s.Suites, "client.test"), "-test.root", "-no-criu"}
		var env []string
		path, env = s.clientPath(t, tools.Dir)
		named = append(append(named, env...), node.TestSnapshotter+"="+s.Snapshotter)
	case "cri":
		args = []string{filepath.Join(s.Suites, "cri.test"), "-cri-endpoint", "unix://" + n.Address(),
			"-containerd-bin", "containerd", "-build-dir", tools.Dir}
		named = append(named, node.VolumeSnapshotter+"="+s.Snapshotter)
	case "critest":
		args = []string{filepath.Join(s.Critest, "critest"), "--runtime-endpoint", "unix://" + n.Address(),
			"--image-endpoint", "unix://" + n.Address(), "--ginkgo.no-color", "--ginkgo.json-report", s.path("report.json"),
			"--ginkgo.timeout", suiteTime.String(), "--ginkgo.focus", s.Only}
	}
	if s.Suite != "critest" {
		args = append(args, "-test.v=test2json", "-test.timeout", suiteTime.String(), "-test.run", s.Only)
	}
	ctx, cancel := context.WithTimeout(t.Context(), suiteTime+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.Dir, out, out
	cmd.Env = append(os.Environ(), append(named, "TMPDIR="+shortTemp,
		"PATH="+strings.Join([]string{path, s.Suites, filepath.Dir(s.Runc), os.Getenv("PATH")}, ":"))...)
	_, _ = io.WriteString(out, strings.Join(args, " ")+"\n")
	return cmd.Run()
}
