package integration

import (
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Containers run on every supported containerd.
func TestPullAndRunOtherVersions(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		if version == node.DefaultVersion {
			continue // TestPullAndRun
		}
		t.Run(version, func(t *testing.T) {
			pullAndRun(t, startDedup(t, node.Options{Version: version}), node.Snapshotter)
		})
	}
}
