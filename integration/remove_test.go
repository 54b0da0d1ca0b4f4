package integration

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Right after a pull nothing of it is held for longer than its image: layers that were
// ingested ahead of their Apply are let go once they are applied, not ten seconds later.
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
	// What is left is removed in the background, in milliseconds; 7 s is far from both.
	for deadline := time.Now().Add(7 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		trees, err := filepath.Glob(filepath.Join(n.DedupRoot(), "layers", "*"))
		must(t, err)
		packs, err := filepath.Glob(filepath.Join(n.DedupRoot(), "packs", "*"))
		must(t, err)
		if len(trees)+len(packs) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("seconds after the image was removed there are still %d layers and %d packs", len(trees), len(packs))
		}
	}
}
