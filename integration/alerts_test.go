package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// The alerts fire when they should and not before, says Prometheus's own promtool. What they may read is checked
// in cmd/containerd-dedup-grpc, without it.
func TestAlertsFire(t *testing.T) {
	t.Parallel()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if os.Getenv("DEDUP_LONG") == "" {
			t.Skip("needs promtool: install prometheus, or have it built for some minutes with DEDUP_LONG=1")
		}
		promtool, err = node.BuildPromtool(testContext(t), func(s string) { t.Log(s) })
		must(t, err)
	}
	root, err := node.ModuleRoot()
	must(t, err)
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		cmd := exec.CommandContext(testContext(t), promtool, args...)
		cmd.Dir = filepath.Join(root, "deploy")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}
