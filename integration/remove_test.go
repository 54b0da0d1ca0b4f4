package integration

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Right after a pull nothing of it is held for longer than its image: layers that were ingested ahead of their Apply go
// with it.
func TestRemoveRightAfterPull(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	var layers []*image.Layer
	for i := range 5 {
		name := fmt.Sprintf("layer-%d", i)
		layers = append(layers, layer(t, image.File(name, name+string(make([]byte, 5000)))))
	}
	ref := push(t, r, "short-lived:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	_, err := n.Ctr(ctx, "image", "rm", "--sync", ref)
	must(t, err)
	eventually(t, "the last layers and packs to go", func() bool {
		trees, err := filepath.Glob(filepath.Join(n.DedupRoot(), "layers", "*"))
		must(t, err)
		packs, err := filepath.Glob(filepath.Join(n.DedupRoot(), "packs", "*"))
		must(t, err)
		return len(trees)+len(packs) == 0
	})
}
