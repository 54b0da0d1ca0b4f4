package integration

import (
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// snapshotters whose view of an image is compared with overlayfs's. native copies trees
// and shares no code with overlayfs: it shows that the comparison itself is sound.
var compared = []string{"native", node.Snapshotter}

// tortureImage has every kind of entry over several layers.
func tortureImage(t *testing.T) []*image.Layer {
	t.Helper()
	layers := []*image.Layer{busybox(t)}
	for _, l := range torture.Layers() {
		layers = append(layers, layer(t, l.Entries...))
	}
	return layers
}

func TestEqualityTorture(t *testing.T) {
	t.Parallel()
	implied := torture.ImpliedParents()
	if len(implied) < 5 {
		t.Fatalf("the torture layers imply only %q", implied)
	}
	// Overlayfs shows the root directory of the topmost layer, whose entry is lower down:
	// there it is the image spec that dedup has to equal.
	opts := rootfs.DiffOptions{RootTime: true, Times: implied, Owners: implied}
	trees := equality(t, opts, tortureImage(t)...)
	if got, ok := trees[node.Snapshotter]; ok && !got["."].MTime.Equal(torture.RootTime) {
		t.Errorf("dedup: mtime of the root directory is %s, the image says %s", got["."].MTime, torture.RootTime)
	}
}

// equality pulls an image with overlayfs and with every other snapshotter, and compares
// what a View and a container's writable snapshot show. It returns the views.
func equality(t *testing.T, opts rootfs.DiffOptions, layers ...*image.Layer) map[string]rootfs.Tree {
	t.Helper()
	trees := map[string]rootfs.Tree{}
	r := startRegistry(t)
	ref := push(t, r, "equality/image:1", layers...)
	reference := startNode(t, node.Options{NoDedup: true})
	pull(t, reference, "overlayfs", ref)
	want := dump(t, reference, "overlayfs", ref)
	for _, snapshotter := range compared {
		t.Run(snapshotter, func(t *testing.T) {
			n := reference
			if snapshotter == node.Snapshotter {
				n = startDedup(t, node.Options{Daemon: map[string]any{"fidelity": "exact"}})
			}
			pull(t, n, snapshotter, ref)
			trees[snapshotter] = dump(t, n, snapshotter, ref)
			equal(t, want, trees[snapshotter], opts)
			must(t, n.Active(testContext(t), snapshotter, ref, func(root string) error {
				got, err := rootfs.Dump(root)
				if err == nil {
					equal(t, want, got, opts)
				}
				return err
			}))
		})
	}
	return trees
}
