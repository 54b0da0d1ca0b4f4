package integration

import (
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// An image whose config names the layer of another blob than its manifest is refused as with overlayfs, also where that
// layer is known.
func TestConfigOfAnotherBlob(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base, one, two := busybox(t), layer(t, payload("mismatch", "one", 9000)), layer(t, payload("mismatch", "two", 9000))
	good := push(t, r, "good:1", base, one, two)
	mixed := *one
	mixed.Diff = two.Diff
	bad := pushImageOf(t, r.Ref("bad:1"), base, &mixed)
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, good)
		err := n.Pull(testContext(t), snapshotter, bad)
		if err == nil || !strings.Contains(err.Error(), "wrong diff id") {
			t.Errorf("with %s: %v", snapshotter, err)
		}
	}
}

func pushImageOf(t *testing.T, ref string, layers ...*image.Layer) string {
	t.Helper()
	img, err := image.New(image.Options{}, layers...)
	must(t, err)
	must(t, image.Push(testContext(t), ref, img))
	return ref
}
