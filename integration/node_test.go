package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A node leaves nothing behind: not in order, not when containerd was killed under a
// running container.
func TestNodeCleansUp(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		end  func(n *node.Node) error
	}{
		{"in order", func(*node.Node) error { return nil }},
		{"containerd killed", func(n *node.Node) error { return n.KillContainerd() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("needs root: containerd, mounts and runc do")
			}
			ctx, r := testContext(t), startRegistry(t)
			n, err := node.Start(ctx, node.Options{NoDedup: true})
			must(t, err)
			ref := push(t, r, "test/app:1", busybox(t))
			pull(t, n, "overlayfs", ref)
			_, err = n.RunDetached(ctx, "overlayfs", ref, "sleep", "12345")
			must(t, err)
			dir := n.Dir()
			must(t, tt.end(n))
			if err := n.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(dir); !os.IsNotExist(err) {
				t.Errorf("the node's directory is still there: %v", err)
			}
			mounts, err := os.ReadFile("/proc/self/mountinfo")
			must(t, err)
			if strings.Contains(string(mounts), dir) {
				t.Error("mounts of the node are still there")
			}
			for _, pid := range pidsNaming(t, dir) {
				t.Errorf("process %s of the node is still running", pid)
			}
		})
	}
}

// pidsNaming returns processes with dir in their command line, working directory or root.
func pidsNaming(t *testing.T, dir string) []string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	var pids []string
	for _, proc := range procs {
		cmdline, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
		cwd, _ := os.Readlink(filepath.Join(proc, "cwd"))
		if bytes.Contains(cmdline, []byte(dir)) || strings.HasPrefix(cwd, dir) ||
			bytes.Equal(cmdline, []byte("sleep\x0012345\x00")) {
			pids = append(pids, filepath.Base(proc))
		}
	}
	return pids
}

// containerd comes back with its images and containers after a restart.
func TestRestartContainerd(t *testing.T) {
	t.Parallel()
	n, r := startNode(t, node.Options{NoDedup: true}), startRegistry(t)
	ctx := testContext(t)
	ref := push(t, r, "test/app:1", busybox(t))
	pull(t, n, "overlayfs", ref)
	id, err := n.RunDetached(ctx, "overlayfs", ref, "sleep", "1000")
	must(t, err)
	must(t, n.RestartContainerd(ctx))
	out, err := n.Exec(ctx, id, "echo", "alive")
	must(t, err)
	if out != "alive\n" {
		t.Errorf("exec after a restart printed %q", out)
	}
}
