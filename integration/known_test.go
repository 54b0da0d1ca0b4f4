package integration

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
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

// Ten clients, ctr and CRI, that pull ten images with the same unknown layers at once: each layer is read once, is
// fetched at most once for each of the two namespaces (containerd's locks of downloads are a namespace's own) and
// once more for each client that is killed on the way; those harm nobody.
func TestClientsMeet(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{CRI: true, Daemon: map[string]any{"log_level": "debug"}}), startRegistry(t)
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()
	shared := []*image.Layer{busybox(t)}
	for i := range 3 {
		shared = append(shared, layer(t, payload("shared", fmt.Sprintf("shared-%d", i), 16<<20)))
	}
	refs := make([]string, 10)
	for i := range refs {
		own := layer(t, payload("own", fmt.Sprintf("own-%d", i), 9000))
		refs[i] = push(t, r, fmt.Sprintf("meet:%d", i), append(shared[:len(shared):len(shared)], own)...)
	}
	pushed, err := r.Log()
	must(t, err)
	clients := func(i int) (context.Context, func(context.Context, string) error) {
		if i%3 == 0 {
			return namespaces.WithNamespace(testContext(t), node.CRINamespace), c.Pull
		}
		return testContext(t), func(ctx context.Context, ref string) error { return n.Pull(ctx, node.Snapshotter, ref) }
	}
	const killed = 2
	var wg sync.WaitGroup
	for i, ref := range refs {
		ctx, pull := clients(i)
		wg.Go(func() {
			if i%4 == 3 { // one of each kind
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(i)*20*time.Millisecond)
				defer cancel()
			}
			if err := pull(ctx, ref); err != nil && ctx.Err() == nil {
				t.Errorf("image %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	for i, ref := range refs {
		ctx, pull := clients(i)
		if i%4 == 3 {
			must(t, pull(ctx, ref)) // who was killed comes again
		}
		out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", fmt.Sprintf("wc -c < /own-%d; cat /shared-* | wc -c", i))
		must(t, err)
		if diff := cmp.Diff(fmt.Sprintf("%d\n%d\n", 9000, 3*16<<20), out); diff != "" {
			t.Errorf("image %d (-want +got):\n%s", i, diff)
		}
	}
	log, err := r.Log()
	must(t, err)
	asked := registry.Blobs(log[len(pushed):])
	times := ingests(t, n)
	for _, l := range shared {
		if got := asked[l.Hash].Get; got < 1 || got > 2+killed {
			t.Errorf("the blob of a shared layer was fetched %d times", got)
		}
		if got := times[l.Hash.String()]; got != 1 {
			t.Errorf("the blob of a shared layer was read %d times", got)
		}
	}
}
