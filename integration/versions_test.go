package integration

import (
	"os"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Other containerd versions than the default one. Each takes a minute or two to build the
// first time, so they are run on demand: DEDUP_CONTAINERD="1.7.35 2.2.9" or "all".
func TestPullAndRunOtherVersions(t *testing.T) {
	wanted := strings.Fields(os.Getenv("DEDUP_CONTAINERD"))
	if len(wanted) == 0 {
		t.Skip(`set DEDUP_CONTAINERD to versions with a directory in integration/tools, or to "all"`)
	}
	if wanted[0] == "all" {
		var err error
		wanted, err = node.Versions()
		must(t, err)
	}
	for _, version := range wanted {
		t.Run(version, func(t *testing.T) {
			t.Run("overlayfs", func(t *testing.T) {
				pullAndRun(t, startNode(t, node.Options{Version: version, NoDedup: true}), "overlayfs")
			})
			t.Run("dedup", func(t *testing.T) {
				pullAndRun(t, startDedup(t, node.Options{Version: version}), node.Snapshotter)
			})
		})
	}
}
