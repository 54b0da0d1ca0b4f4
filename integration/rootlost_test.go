package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// The daemon's root is lost, and containerd's state is kept: images whose blobs containerd has run and are pulled as if
// nothing had happened; others after dedupctl complete.
func TestRootLost(t *testing.T) {
	t.Parallel()
	for _, version := range []string{node.DefaultVersion, "1.7.35"} {
		t.Run(version, func(t *testing.T) { losesRoot(t, node.Options{Version: version}) })
	}
}

func losesRoot(t *testing.T, opts node.Options) {
	n, r := startDedup(t, opts), startRegistry(t)
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	base, data := busybox(t), dataLayer(t)
	gone := layer(t, payload("lost", "gone", 9000))
	run, incomplete := push(t, r, "run:1", base, data), push(t, r, "incomplete:1", base, gone)
	again := push(t, r, "again:1", base, data, layer(t, image.File("top", "top")))
	for _, ref := range []string{run, again, incomplete} {
		pull(t, n, node.Snapshotter, ref)
	}
	old, err := n.RunDetached(ctx, node.Snapshotter, run, "sleep", "1000")
	must(t, err)
	forget(t, n, ctx, []*image.Layer{gone})

	must(t, n.StopDaemon())
	must(t, node.UnmountBelow(filepath.Join(n.Dir(), "run")))
	must(t, os.RemoveAll(n.DedupRoot()))
	must(t, n.StartDaemon(ctx))
	out, _ := dedupctl(t, n, "doctor", "--config", filepath.Join(n.Dir(), "dedup.toml"))
	for _, ref := range []string{run, again, incomplete} {
		if !strings.Contains(out, ref) {
			t.Errorf("doctor does not name %s: %s", ref, out)
		}
	}
	runs := func(ref, command, want string) {
		t.Helper()
		out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", command)
		must(t, err)
		if out != want {
			t.Errorf("a container of %s prints %q, want %q", ref, out, want)
		}
	}
	runs(run, "cat /data/small-a; wc -c < /data/b", "a9000\n") // without a pull
	pull(t, n, node.Snapshotter, again)
	runs(again, "cat /data/small-b /top; wc -c < /data/a", "btop9000\n")
	// What stands on what was restored is known to containerd as ever.
	next := push(t, r, "next:1", base, data, layer(t, image.File("next", "next")))
	pull(t, n, node.Snapshotter, next)
	runs(next, "cat /next", "next")

	if err := n.Pull(ctx, node.Snapshotter, incomplete); err != nil { // containerd 1.7 fetches the blob by itself
		_, err = dedupctl(t, n, "complete", "--containerd-address", n.Address(), "--plain-http", incomplete)
		must(t, err)
		pull(t, n, node.Snapshotter, incomplete)
	}
	runs(incomplete, "wc -c < /gone", "9000\n")

	// Snapshots have the names that containerd has for them: it would try to remove others at each of its collections.
	log, err := os.ReadFile(n.LogPath("containerd"))
	must(t, err)
	if strings.Contains(string(log), "failed to remove snapshot") {
		t.Error("containerd does not know a snapshot that was restored")
	}
	out, _ = dedupctl(t, n, "doctor", "--config", filepath.Join(n.Dir(), "dedup.toml"))
	if strings.Contains(out, "and they are not") || strings.Contains(out, again) {
		t.Errorf("doctor still names images: %s", out)
	}
	// Containers of before have lost what they wrote; they can be removed, and so can the images, of which nothing is
	// left.
	must(t, n.RemoveContainer(ctx, old))
	for _, ref := range []string{run, again, next, incomplete} {
		_, err := n.Ctr(ctx, "image", "rm", "--sync", ref)
		must(t, err)
	}
	layers, err := filepath.Glob(filepath.Join(n.DedupRoot(), "layers/*"))
	must(t, err)
	if len(layers) > 0 {
		t.Errorf("%d layers are left of images that were removed", len(layers))
	}
	pull(t, n, node.Snapshotter, run)
	objectsUntouched(t, n)
}
