package integration

import (
	"fmt"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

var exact = node.Options{Daemon: map[string]any{"fidelity": "exact"}}

// noRootTime leaves out the mtime of the root directory: the image has no entry for it,
// so with overlayfs it is the time of the pull, and the image spec says nothing.
var noRootTime = rootfs.DiffOptions{RootTime: true}

// comparison says what counts as equal to overlayfs.
type comparison struct {
	ignore rootfs.DiffOptions
	// correct changes what overlayfs shows to what the image spec asks for, where
	// overlayfs is known to be wrong.
	correct func(rootfs.Tree)
	// local pulls with the client, which leaves all unpacking to differs.
	local bool
}

// equality pulls an image with overlayfs and with dedup, on one node, and compares what
// a View and a container's writable snapshot show. Whoever pulls first fetches the blobs.
func equality(t *testing.T, n *node.Node, ref string, c comparison, order ...string) {
	t.Helper()
	for _, snapshotter := range order {
		if c.local {
			must(t, n.PullLocal(testContext(t), snapshotter, ref))
			continue
		}
		pull(t, n, snapshotter, ref)
	}
	want := dump(t, n, "overlayfs", ref)
	if c.correct != nil {
		c.correct(want)
	}
	equal(t, want, dump(t, n, node.Snapshotter, ref), c.ignore)
	equal(t, want, dumpActive(t, n, node.Snapshotter, ref), c.ignore)
}

// fresh is equality on a new node where dedup fetches the blobs.
func fresh(t *testing.T, c comparison, layers ...*image.Layer) {
	t.Helper()
	r := startRegistry(t)
	must(t, image.Seed(r.Dir(), layers...)) // a push leaves non-distributable blobs out
	ref := push(t, r, "equality/image:1", layers...)
	equality(t, startDedup(t, exact), ref, c, node.Snapshotter, "overlayfs")
}

// dumpActive is dump of a new writable snapshot, as a container gets it.
func dumpActive(t *testing.T, n *node.Node, snapshotter, ref string) rootfs.Tree {
	t.Helper()
	var tree rootfs.Tree
	must(t, n.Active(testContext(t), snapshotter, ref, func(root string) (err error) {
		tree, err = rootfs.Dump(root)
		return err
	}))
	return tree
}

// blobKinds are the compressions and media types that a layer may come in.
var blobKinds = []image.LayerOptions{
	{},
	{Compression: image.Gzips},
	{Compression: image.Estargz, Docker: true},
	{Compression: image.Zstd},
	{Compression: image.Zstds},
	{Compression: image.None},
	{Compression: image.None, Docker: true},
	{Compression: image.Zstds, MediaType: "application/vnd.docker.image.rootfs.diff.tar.zstd"},
	{Docker: true},
	{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},
	{Compression: image.None, MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar"},
	{MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"},
	{Compression: image.Zstd, MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"},
	{Compression: image.None, MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar"},
}

// Every kind of blob in one image, each with files that cross the borders of its members.
func TestEqualityBlobs(t *testing.T) {
	t.Parallel()
	layers := []*image.Layer{busybox(t)}
	for i, opts := range blobKinds {
		entries := []image.Entry{image.Dir("blobs")}
		for size := 1; size < 1<<19; size *= 7 {
			name := fmt.Sprintf("blobs/kind-%d-size-%d", i, size)
			entries = append(entries, image.File(name, torture.Content(i, size)))
		}
		l, err := image.FromEntries(t.TempDir(), opts, entries...)
		must(t, err)
		layers = append(layers, l)
	}
	fresh(t, comparison{ignore: noRootTime}, layers...)
}

// tortureImage has every kind of entry over several layers, in blobs of all kinds.
func tortureImage(t *testing.T) []*image.Layer {
	t.Helper()
	layers := []*image.Layer{busybox(t)}
	for i, l := range torture.Layers() {
		built, err := image.FromEntries(t.TempDir(), blobKinds[i%len(blobKinds)], l.Entries...)
		must(t, err)
		layers = append(layers, built)
	}
	return layers
}

// The ways a layer comes in: our differ applies what is fetched, one layer after the other or all side
// by side, Prepare finds the blobs that overlayfs fetched before, and containerd's own applier fills a directory.
func TestEqualityTorture(t *testing.T) {
	t.Parallel()
	implied := torture.ImpliedParents()
	if len(implied) < 5 {
		t.Fatalf("the torture layers imply only %q", implied)
	}
	spec := comparison{ignore: rootfs.DiffOptions{Times: implied, Owners: implied}, correct: correctTorture}
	// What containerd's applier gets wrong is in the directory already.
	atPull := append([]string{"w", "w/opaque-late"}, implied...)
	applied := comparison{ignore: rootfs.DiffOptions{RootTime: true, Times: atPull, Owners: implied},
		correct: correctLinks, local: true}
	noDiffer := exact
	noDiffer.NoDiffer = true
	sideBySide := exact
	sideBySide.Plugins = map[string]map[string]any{"io.containerd.transfer.v1.local": {"max_concurrent_unpacks": 4}}
	for _, tt := range []struct {
		name  string
		opts  node.Options
		order []string
		c     comparison
	}{
		{"apply", exact, []string{node.Snapshotter, "overlayfs"}, spec},
		{"prepare", exact, []string{"overlayfs", node.Snapshotter}, spec},
		{"side by side", sideBySide, []string{node.Snapshotter, "overlayfs"}, spec},
		{"commit", noDiffer, []string{node.Snapshotter, "overlayfs"}, applied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n, r := startDedup(t, tt.opts), startRegistry(t)
			ref := push(t, r, "equality/torture:1", tortureImage(t)...)
			equality(t, n, ref, tt.c, tt.order...)
		})
	}
}

func change(tree rootfs.Tree, path string, how func(*rootfs.Entry)) {
	e := tree[path]
	how(&e)
	tree[path] = e
}

func correctTorture(tree rootfs.Tree) {
	// Overlayfs shows the topmost layer's directory, and containerd's applier makes it
	// anew, at the time of the pull, where that layer has an entry below it but none for it.
	for path, mtime := range map[string]time.Time{
		".": torture.RootTime, "w": image.DefaultTime, "w/opaque-late": image.DefaultTime,
	} {
		change(tree, path, func(e *rootfs.Entry) { e.MTime = mtime.UTC() })
	}
	// A whiteout of a directory that the same layer makes again hides what lay in the
	// lower one; containerd's applier drops the whiteout instead of marking it opaque.
	delete(tree, "w/again/old")
	correctLinks(tree)
}

// correctLinks: without its index feature overlayfs counts a hardlink that an upper
// layer deleted.
func correctLinks(tree rootfs.Tree) {
	for _, path := range []string{"w/linked", "w/linked-3"} {
		change(tree, path, func(e *rootfs.Entry) { e.Nlink = 2 })
	}
}
