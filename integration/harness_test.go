package integration

import (
	"context"
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// timeout bounds one test, building of tools and inputs included.
const timeout = 8 * time.Minute

// must stops the test, or skips it when this machine lacks something.
func must(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, node.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	limit := timeout
	if os.Getenv("DEDUP_SLOW") != "" { // emulated
		limit *= 5
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// startNode starts a node that ends with the test; its logs are shown if the test fails.
//
// An image is unmounted with its last container, unless keep_mounted is set: tests look at what is mounted, and change
// files below it.
func startNode(t *testing.T, opts node.Options) *node.Node {
	t.Helper()
	opts.Daemon = maps.Clone(opts.Daemon)
	if opts.Daemon == nil {
		opts.Daemon = map[string]any{}
	}
	if opts.Daemon["keep_mounted"] == nil {
		opts.Daemon["keep_mounted"] = "0s"
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd, mounts and runc do")
	}
	opts.Say = func(text string) { t.Log(text) }
	n, err := node.Start(testContext(t), opts)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.Logs(60))
		}
		if err := n.Close(); err != nil {
			t.Errorf("clean up the node: %v", err)
		}
	})
	return n
}

// startDedup is startNode with the daemon running.
func startDedup(t *testing.T, opts node.Options) *node.Node {
	t.Helper()
	n := startNode(t, opts)
	must(t, n.StartDaemon(testContext(t)))
	return n
}

func startRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	must(t, err)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("stop registry: %v", err)
		}
	})
	return r
}

// layer builds a layer of entries with the default options.
func layer(t *testing.T, entries ...image.Entry) *image.Layer {
	t.Helper()
	l, err := image.FromEntries(t.TempDir(), image.LayerOptions{}, entries...)
	must(t, err)
	return l
}

// busybox is the layer of the smallest root file system with a shell.
func busybox(t *testing.T) *image.Layer {
	t.Helper()
	entries, err := inputs.Busybox(testContext(t), nil)
	must(t, err)
	return layer(t, entries...)
}

// push stacks layers into an image, pushes it and returns its reference.
func push(t *testing.T, r *registry.Registry, name string, layers ...*image.Layer) string {
	t.Helper()
	img, err := image.New(image.Options{
		Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	}, layers...)
	must(t, err)
	return pushImage(t, r, name, img)
}

func pushImage(t *testing.T, r *registry.Registry, name string, img v1.Image) string {
	t.Helper()
	ref := r.Ref(name)
	must(t, image.Push(testContext(t), ref, img))
	return ref
}

func pull(t *testing.T, n *node.Node, snapshotter, ref string) {
	t.Helper()
	must(t, n.Pull(testContext(t), snapshotter, ref))
}

// dump returns what a view of a pulled image shows.
func dump(t *testing.T, n *node.Node, snapshotter, ref string) rootfs.Tree {
	t.Helper()
	var tree rootfs.Tree
	must(t, n.View(testContext(t), snapshotter, ref, func(root string) (err error) {
		tree, err = rootfs.Dump(root)
		return err
	}))
	return tree
}

// equal fails the test when trees differ, with the first differences.
func equal(t *testing.T, want, got rootfs.Tree, opts rootfs.DiffOptions) {
	t.Helper()
	if len(want) < 2 {
		t.Fatalf("the wanted tree has %d entries: nothing was compared", len(want))
	}
	lines := rootfs.Diff(want, got, opts)
	if len(lines) == 0 {
		return
	}
	const most = 40
	shown := lines[:min(most, len(lines))]
	t.Errorf("%d differences, the first %d:\n%s", len(lines), len(shown), strings.Join(shown, "\n"))
}
