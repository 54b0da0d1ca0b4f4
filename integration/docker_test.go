package integration

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// dockerNamespace is the containerd namespace of Docker's images.
const dockerNamespace = "moby"

// Docker 29 with the containerd image store moves from overlayfs to dedup, and does with it what Docker does.
func TestDocker(t *testing.T) {
	t.Parallel()
	if os.Getenv("DEDUP_LONG") == "" {
		t.Skip("builds dockerd, which takes minutes: set DEDUP_LONG=1")
	}
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	layers := []*image.Layer{busybox(t), dataLayer(t)}
	ref := push(t, r, "app:1", layers...)
	d, err := n.StartDocker(ctx, "overlayfs")
	must(t, err)
	docker := func(want string, args ...string) {
		t.Helper()
		out, err := d.Run(ctx, args...)
		if err != nil || want != "" && strings.TrimSpace(out) != want {
			t.Errorf("docker %q: %q, %v; want %q", args, out, err, want)
		}
	}
	docker(ref, "pull", "--quiet", ref)
	docker("", "run", "--detach", "--name", "old", "--network", "none", ref, "sh", "-c", reader)

	states, _ := migrate(t, n, false, "--namespace", dockerNamespace)
	if states["app:1"] != "migrated" {
		t.Errorf("%v", states)
	}
	docker("", "exec", "old", "sh", "-c", "a=$(wc -c < /rounds); sleep 1; test $(wc -c < /rounds) -gt $a")
	docker("old", "stop", "--time", "0", "old")
	if _, m := migrate(t, n, false, "--namespace", dockerNamespace, "--remove-old", "--dry-run"); m.Kept != 2 ||
		len(m.Containers) != 1 {
		t.Errorf("with a stopped container: %+v", m)
	}
	docker("old", "rm", "old")
	must(t, d.Stop())
	before, err := r.Log()
	must(t, err)

	d, err = n.StartDocker(ctx, node.Snapshotter)
	must(t, err)
	defer func() { must(t, d.Close()) }()
	docker(node.Snapshotter, "info", "--format", "{{.Driver}}")
	docker("a", "run", "--rm", "--network", "none", ref, "cat", "/data/small-a")
	docker("", "run", "--detach", "--name", "new", "--network", "none", ref, "sh", "-c",
		"echo new > /data/new; rm /data/b; sleep 1000")
	eventually(t, "docker diff to show what the container did", func() bool {
		out, err := d.Run(ctx, "diff", "new")
		return err == nil && slices.Equal(sorted(strings.Fields(out)), []string{"/data", "/data/b", "/data/new", "A", "C",
			"D"})
	})
	docker("", "commit", "new", "committed:1")
	docker("a\nc\nnew\nsmall-a\nsmall-b\nsmall-c", "run", "--rm", "--network", "none", "committed:1", "ls", "/data")
	saved := filepath.Join(t.TempDir(), "saved.tar")
	docker("", "save", "--output", saved, "committed:1")
	docker("", "rmi", "committed:1")
	after, err := r.Log()
	must(t, err)
	if len(after) != len(before) {
		t.Errorf("the registry was asked: %+v", after[len(before):])
	}
	dockerLeavesNothing(t, n, d, ref, saved)
}

// dockerLeavesNothing loads an image, and removes everything.
func dockerLeavesNothing(t *testing.T, n *node.Node, d *node.Docker, ref, saved string) {
	t.Helper()
	ctx := testContext(t)
	for _, args := range [][]string{
		{"load", "--quiet", "--input", saved}, {"run", "--rm", "--network", "none", "committed:1", "cat", "/data/new"},
		{"rm", "--force", "new"}, {"rmi", "committed:1"},
	} {
		if out, err := d.Run(ctx, args...); err != nil {
			t.Errorf("docker %q: %v, %s", args, err, out)
		}
	}
	_, m := migrate(t, n, false, "--namespace", dockerNamespace, "--remove-old")
	if m.Removed != 2 || m.Kept != 0 {
		t.Errorf("%+v", m)
	}
	if _, err := d.Run(ctx, "rmi", ref); err != nil {
		t.Error(err)
	}
	moby := namespaces.WithNamespace(ctx, dockerNamespace)
	forget(t, n, moby, nil)
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		must(t, n.Client().SnapshotService(snapshotter).Walk(moby, func(_ context.Context, info snapshots.Info) error {
			t.Errorf("%s still has %s %s", snapshotter, info.Kind, info.Name)
			return nil
		}))
	}
}
