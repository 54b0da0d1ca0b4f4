package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// shownImage is what the tests read of `dedupctl images --json`.
type shownImage struct {
	Namespace      string
	Names          []string
	Layers         int64
	LogicalBytes   int64 `json:"logical_bytes"`
	StoredBytes    int64 `json:"stored_bytes"`
	ExclusiveBytes int64 `json:"exclusive_bytes"`
	FreedBytes     int64 `json:"freed_bytes"`
	FreedInodes    int64 `json:"freed_inodes"`
	FreedBlobBytes int64 `json:"freed_blob_bytes"`
	Users          int64
}

func dedupctlJSON(t *testing.T, n *node.Node, v any, args ...string) {
	t.Helper()
	out, err := dedupctl(t, n, append(args, "--json")...)
	if err != nil {
		t.Fatalf("dedupctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	must(t, json.Unmarshal([]byte(out), v))
}

func shownImages(t *testing.T, n *node.Node) map[string]shownImage {
	t.Helper()
	var list []shownImage
	dedupctlJSON(t, n, &list, "images")
	out := map[string]shownImage{}
	for _, i := range list {
		out[i.Namespace+" "+strings.Join(i.Names, " ")] = i
	}
	if len(out) != len(list) {
		t.Errorf("one image stands twice in %+v", list)
	}
	return out
}

// What removing an image would free is what goes from the disk then, whatever else shares layers or payloads
// with it, and whoever uses it.
func TestImagesTellWhatRemovingFrees(t *testing.T) {
	t.Parallel()
	metrics := freeAddress(t)
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"metrics_address": metrics}}), startRegistry(t)
	ctx := testContext(t)
	elsewhere := namespaces.WithNamespace(ctx, "elsewhere")
	files := func(from, to int) (list []image.Entry) {
		for i := from; i < to; i++ {
			list = append(list, payload("images", fmt.Sprintf("f%d", i), 1000+i*1700))
		}
		return list
	}
	base, shared := busybox(t), layer(t, files(0, 40)...)
	refs := map[string]string{}
	for name, layers := range map[string][]*image.Layer{
		// a layer and payloads with b, payloads in two of its layers
		"a": {base, shared, layer(t, files(30, 90)...)},
		// base is common to all but alone
		"b":      {base, shared, layer(t, files(60, 120)...)},
		"prefix": {base, shared},                                                     // all of it is in others
		"alone":  {layer(t, files(200, 260)...), layer(t, image.File("small", "x"))}, // nothing is
		"both":   {base, layer(t, files(300, 350)...), layer(t, files(300, 330)...)}, // in two namespaces
		// a build, say, has a lease on it
		"leased": {base, layer(t, files(500, 520)...)},
		"used":   {base, layer(t, files(400, 450)...), layer(t, image.File("etc/mark", "u"))}, // by a container
	} {
		refs[name] = push(t, r, name+":1", layers...)
		pull(t, n, node.Snapshotter, refs[name])
	}
	must(t, n.Pull(elsewhere, node.Snapshotter, refs["both"]))
	_, err := n.Ctr(ctx, "image", "tag", refs["a"], "alias.example/a:2")
	must(t, err)
	must(t, n.Pull(ctx, "native", push(t, r, "native:1", layer(t, files(0, 3)...)))) // not ours: not in the list
	container, err := n.RunDetached(ctx, node.Snapshotter, refs["used"], "sleep", "1000")
	must(t, err)
	lease, err := n.Client().LeasesService().Create(ctx, leases.WithID("build"))
	must(t, err)
	chain, err := n.ChainID(ctx, refs["leased"])
	must(t, err)
	must(t, n.Client().LeasesService().AddResource(ctx, lease,
		leases.Resource{ID: chain, Type: "snapshots/" + node.Snapshotter}))
	settle(t, n)

	checkShown(t, shownImages(t, n), refs)
	for _, step := range []struct {
		name string
		ctx  context.Context
		refs []string
	}{
		{"prefix", ctx, []string{refs["prefix"]}},
		{"a", ctx, []string{"alias.example/a:2", refs["a"]}},
		{"used", ctx, []string{refs["used"]}},
		{"leased", ctx, []string{refs["leased"]}},
		{"both", ctx, []string{refs["both"]}},
		{"alone", ctx, []string{refs["alone"]}},
		{"both", elsewhere, []string{refs["both"]}},
		{"b", ctx, []string{refs["b"]}},
	} {
		ns, _ := namespaces.Namespace(step.ctx)
		if ns == "" {
			ns = node.Namespace
		}
		t.Run(ns+" "+step.name, func(t *testing.T) { removes(t, n, metrics, step.ctx, ns, step.refs) })
	}
	must(t, n.RemoveContainer(ctx, container))
	must(t, n.Client().LeasesService().Delete(ctx, lease, leases.SynchronousDelete))
	settle(t, n)
	if left, err := filepath.Glob(filepath.Join(n.DedupRoot(), "packs/*")); err != nil || len(left) > 0 {
		t.Errorf("%d packs are left when all is removed, %v", len(left), err)
	}
	if shown := shownImages(t, n); len(shown) != 0 {
		t.Error(shown)
	}
	must(t, n.StopContainerd())
	if out, err := dedupctl(t, n, "images"); err == nil ||
		!strings.Contains(out, "containerd does not answer on containerd_address") {
		t.Errorf("without containerd: %v: %s", err, out)
	}
}

// checkShown expects what dedupctl says of the images of TestImagesTellWhatRemovingFrees, before any is removed.
func checkShown(t *testing.T, shown map[string]shownImage, refs map[string]string) {
	t.Helper()
	if len(shown) != len(refs)+1 {
		t.Fatalf("%d images are listed, want %d: %v", len(shown), len(refs)+1, shown)
	}
	used := shown["default "+refs["used"]]
	if used.Users != 1 || used.FreedBytes != 0 || used.ExclusiveBytes < 1_000_000 {
		t.Errorf("an image that a container uses: %+v", used)
	}
	if l := shown["default "+refs["leased"]]; l.FreedBytes != 0 || l.ExclusiveBytes < 100_000 {
		t.Errorf("an image with a lease on its files: %+v", l)
	}
	if p := shown["default "+refs["prefix"]]; p.ExclusiveBytes != 0 || p.Layers != 2 || p.StoredBytes < 1_000_000 {
		t.Errorf("an image that others contain: %+v", p)
	}
	alone := shown["default "+refs["alone"]]
	if alone.ExclusiveBytes != alone.StoredBytes || alone.FreedBytes != alone.StoredBytes ||
		alone.FreedBytes < alone.LogicalBytes {
		t.Errorf("an image that shares nothing: %+v", alone)
	}
}

// removes removes an image under all its names and compares what went from the disk with what was said. A pack keeps
// dead payloads until it is merged, and two ingests at once may both have stored one: what is dead goes sooner or later
// than said.
func removes(t *testing.T, n *node.Node, metrics string, ctx context.Context, ns string, refs []string) {
	slices.Sort(refs)
	want, ok := shownImages(t, n)[ns+" "+strings.Join(refs, " ")]
	if !ok {
		t.Fatalf("%v is not listed", refs)
	}
	blobs := filepath.Join(n.Dir(), "c/io.containerd.content.v1.content/blobs")
	before, blobsBefore, deadBefore := usage(t, n.DedupRoot()), usage(t, blobs), deadBytes(t, metrics)
	_, err := n.Ctr(ctx, append([]string{"image", "rm", "--sync"}, refs...)...)
	must(t, err)
	settle(t, n)
	got, gotBlobs := before.Sub(usage(t, n.DedupRoot())), blobsBefore.Sub(usage(t, blobs))
	said := want.FreedBytes + deadBefore - deadBytes(t, metrics)
	t.Logf("said %d bytes, with the dead ones %d, %d inodes, %d bytes of blobs; went %d, %d, %d",
		want.FreedBytes, said, want.FreedInodes, want.FreedBlobBytes, got.Bytes, got.Inodes, gotBlobs.Bytes)
	tables := 16384 * max(got.Inodes, 0) // what packs and images take for themselves
	if !near(said, got.Bytes) && math.Abs(float64(got.Bytes-said)) > float64(tables) ||
		!near(want.FreedBlobBytes, gotBlobs.Bytes) {
		t.Errorf("removing %v frees %+v and %d bytes of blobs, dedupctl images said %+v, and %d bytes with the dead ones",
			refs, got, gotBlobs.Bytes, want, said)
	}
}

// deadBytes is what packs hold of payloads that nobody needs.
func deadBytes(t *testing.T, metrics string) int64 {
	t.Helper()
	return int64(scrape(t, metrics).sum("dedup_pack_bytes", `state="dead"`))
}

// near allows 2 %, and one block for a directory that shrinks or grows.
func near(want, got int64) bool {
	return math.Abs(float64(got-want)) <= max(0.02*float64(want), 4096)
}

func usage(t *testing.T, dir string) rootfs.Used {
	t.Helper()
	u, err := rootfs.Usage(dir)
	must(t, err)
	return u
}

// settle waits until nothing is built or removed in the background any more.
func settle(t *testing.T, n *node.Node) {
	t.Helper()
	const rest = 2500 * time.Millisecond // packs are merged after two quiet seconds
	last, since := usage(t, n.DedupRoot()), time.Now()
	for deadline := time.Now().Add(3 * time.Minute); time.Since(since) < rest; time.Sleep(50 * time.Millisecond) {
		now := usage(t, n.DedupRoot())
		if now != last {
			last, since = now, time.Now()
		}
		if time.Now().After(deadline) {
			t.Fatal("the store does not come to rest")
		}
	}
}
