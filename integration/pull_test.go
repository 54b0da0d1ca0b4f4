package integration

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// The harness itself works, whatever the state of the daemon.
func TestPullAndRunOverlayfs(t *testing.T) {
	t.Parallel()
	pullAndRun(t, startNode(t, node.Options{NoDedup: true}), "overlayfs")
}

func TestPullAndRun(t *testing.T) {
	t.Parallel()
	pullAndRun(t, startDedup(t, node.Options{}), node.Snapshotter)
}

// pullAndRun pulls, checks which blobs were fetched, runs, execs and looks.
func pullAndRun(t *testing.T, n *node.Node, snapshotter string) {
	ctx, r := testContext(t), startRegistry(t)
	base, app := busybox(t), layer(t, image.File("app/hello", "hello from the app layer\n"))
	ref := push(t, r, "test/app:1", base, app)
	pull(t, n, snapshotter, ref)

	fetched, err := r.Fetched()
	must(t, err)
	for _, l := range []*image.Layer{base, app} {
		times := 0
		for _, h := range fetched {
			if h == l.Hash {
				times++
			}
		}
		if times != 1 {
			t.Errorf("blob %s was fetched %d times, want once", l.Hash, times)
		}
	}

	out, err := n.Run(ctx, snapshotter, ref, "cat", "/app/hello")
	must(t, err)
	if diff := cmp.Diff("hello from the app layer\n", out); diff != "" {
		t.Errorf("output of a container (-want +got):\n%s", diff)
	}

	id, err := n.RunDetached(ctx, snapshotter, ref, "sleep", "1000")
	must(t, err)
	_, err = n.Exec(ctx, id, "sh", "-c", "echo changed >> /app/hello && mkdir /new && mv /bin/true /new/true")
	must(t, err)
	out, err = n.Exec(ctx, id, "sh", "-c", "cat /app/hello; ls /new")
	must(t, err)
	if diff := cmp.Diff("hello from the app layer\nchanged\ntrue\n", out); diff != "" {
		t.Errorf("output of exec (-want +got):\n%s", diff)
	}
	must(t, n.RemoveContainer(ctx, id))

	out, err = n.Run(ctx, snapshotter, ref, "cat", "/app/hello")
	must(t, err)
	if out != "hello from the app layer\n" {
		t.Errorf("a second container sees what the first one wrote: %q", out)
	}
	used, err := rootfs.Usage(n.SnapshotterRoot(snapshotter))
	must(t, err)
	if used.Bytes < 1<<20 || used.Inodes < 5 {
		t.Errorf("usage of %s is %+v: too small to hold the image", n.SnapshotterRoot(snapshotter), used)
	}
}

// An error of a pull reaches the caller with ctr's words, and a container's exit status
// is not swallowed.
func TestErrorsAreSeen(t *testing.T) {
	t.Parallel()
	n, r := startNode(t, node.Options{NoDedup: true}), startRegistry(t)
	ctx := testContext(t)
	if err := n.Pull(ctx, "overlayfs", r.Ref("no/such:image")); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("pull of an image that is not there: %v", err)
	}
	ref := push(t, r, "test/app:1", busybox(t))
	pull(t, n, "overlayfs", ref)
	if _, err := n.Run(ctx, "overlayfs", ref, "sh", "-c", "exit 3"); err == nil {
		t.Error("a container's exit status 3 was not reported")
	}
}

// Media types and compressions that registries serve.
func TestBlobKinds(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := busybox(t)
	for _, tt := range []struct {
		name string
		opts image.LayerOptions
	}{
		{"oci-gzip", image.LayerOptions{}},
		{"oci-zstd", image.LayerOptions{Compression: image.Zstd}},
		{"oci-tar", image.LayerOptions{Compression: image.None}},
		{"docker-gzip", image.LayerOptions{Docker: true}},
		{"docker-foreign", image.LayerOptions{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}},
		{"oci-nondistributable", image.LayerOptions{
			MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := image.FromEntries(t.TempDir(), tt.opts, image.File("name", tt.name))
			must(t, err)
			img, err := image.New(image.Options{
				Docker: tt.opts.Docker, Env: []string{"PATH=/bin"},
			}, base, l)
			must(t, err)
			must(t, image.Seed(r.Dir(), l)) // a push leaves non-distributable blobs out
			ref := pushImage(t, r, "kinds/"+tt.name+":1", img)
			pull(t, n, node.Snapshotter, ref)
			out, err := n.Run(testContext(t), node.Snapshotter, ref, "cat", "/name")
			must(t, err)
			if out != tt.name {
				t.Errorf("the container read %q", out)
			}
		})
	}
}
