package integration

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A layer that the node knows is not downloaded again, from whatever registry, on whatever
// parent and in whatever compression it comes.
func TestKnownLayersAreNotDownloaded(t *testing.T) {
	t.Parallel()
	n, first := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	bb := busybox(t)
	other := layer(t, image.Dir("other"), image.File("other/file", "other"))
	entries := []image.Entry{image.Dir("app"), image.File("app/file", string(make([]byte, 5000)))}
	app := layer(t, entries...)
	again, err := image.FromEntries(t.TempDir(), image.LayerOptions{Compression: image.Zstd}, entries...)
	must(t, err)
	if again.Diff != app.Diff || again.Hash == app.Hash {
		t.Fatal("the layer in another compression is not what the test needs")
	}
	pull(t, n, node.Snapshotter, push(t, first, "app:1", bb, app))
	pull(t, n, node.Snapshotter, push(t, first, "other:1", bb, other))

	second := startRegistry(t)
	for name, layers := range map[string][]*image.Layer{
		"same:1":         {bb, app},
		"parent:1":       {bb, other, app},
		"recompressed:1": {bb, other, again},
	} {
		ref := push(t, second, name, layers...)
		pull(t, n, node.Snapshotter, ref)
		out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", "wc -c < /app/file")
		must(t, err)
		if diff := cmp.Diff("5000\n", out); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	fetched, err := second.Fetched()
	must(t, err)
	for _, h := range fetched {
		for _, l := range []*image.Layer{bb, other, app, again} {
			if h == l.Hash {
				t.Errorf("blob %s of a known layer was downloaded", h)
			}
		}
	}
}
