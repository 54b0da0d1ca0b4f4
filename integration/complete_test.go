package integration

import (
	"context"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// dedupctl runs the operator's tool against a node, and returns what it says.
func dedupctl(t *testing.T, n *node.Node, args ...string) (out string, err error) {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	cmd := exec.CommandContext(testContext(t), filepath.Join(root, "bin/dedupctl"),
		append([]string{"--address", n.DedupAddress()}, args...)...)
	stdout, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return string(stdout) + string(exit.Stderr), err
	}
	return string(stdout), err
}

// After a skipped download an image runs, but cannot be exported, pushed or unpacked elsewhere, and says so.
// dedupctl complete fetches what is missing; then all of it works.
func TestSkippedDownload(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	first, second, third := startRegistry(t), startRegistry(t), startRegistry(t)
	bb, app := busybox(t), layer(t, payload("skipped", "app", 9000))
	layers := []*image.Layer{bb, app}
	elsewhere := namespaces.WithNamespace(testContext(t), "elsewhere")
	must(t, n.Pull(elsewhere, node.Snapshotter, push(t, first, "app:1", layers...)))
	forget(t, n, elsewhere, layers)

	ctx := testContext(t)
	ref := push(t, second, "app:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	uses := map[string]func(context.Context) error{
		"export": func(ctx context.Context) error {
			return export(ctx, n, ref, filepath.Join(t.TempDir(), "app.tar"))
		},
		"push": func(ctx context.Context) error {
			_, err := n.Ctr(ctx, "image", "push", "--plain-http", third.Ref("app:1"), ref)
			return err
		},
		"convert": func(ctx context.Context) error {
			_, err := n.Ctr(ctx, "image", "convert", "--uncompress", ref, "converted:1")
			return err
		},
		"another snapshotter": func(ctx context.Context) error {
			_, err := n.Ctr(ctx, "image", "mount", "--snapshotter", "native", ref, t.TempDir())
			return err
		},
	}
	for name, use := range uses {
		if err := use(ctx); err == nil {
			t.Errorf("%s works without the blobs: then there is nothing to complete", name)
		}
	}
	fetchesWithContainerd(t, n, ref, layers, uses["export"])
	completes(t, n, ref, layers)
	for name, use := range uses {
		if name == "another snapshotter" {
			must(t, n.Pull(ctx, "native", ref))
			continue
		}
		if err := use(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	forget(t, n, ctx, nil) // what was fetched stays
	if err := uses["export"](ctx); err != nil {
		t.Error(err)
	}
}

// export writes an image as a tar. Not by containerd's transfer service: ctr does not wait there until all that
// containerd sent is written.
func export(ctx context.Context, n *node.Node, ref, path string) error {
	_, err := n.Ctr(ctx, "image", "export", "--local", path, ref)
	return err
}

func fetchesWithContainerd(t *testing.T, n *node.Node, ref string, layers []*image.Layer,
	export func(context.Context) error) {
	t.Helper()
	ctx := testContext(t)
	for name, fetch := range map[string]func() error{
		"ctr content fetch": func() error {
			_, err := n.Ctr(ctx, "content", "fetch", "--plain-http", ref)
			return err
		},
		"ctr image pull --local": func() error { return n.PullLocal(ctx, node.Snapshotter, ref) },
		"client.WithUnpackFetchAllContent": func() error {
			all := client.WithUnpackOpts([]client.UnpackOpt{client.WithUnpackFetchAllContent()})
			return n.PullClient(ctx, node.Snapshotter, ref, all)
		},
	} {
		must(t, fetch())
		if err := export(ctx); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
		forget(t, n, ctx, layers)
		if err := export(ctx); err == nil {
			t.Error("the image is complete without its blobs")
		}
	}
}

func completes(t *testing.T, n *node.Node, ref string, layers []*image.Layer) {
	t.Helper()
	args := []string{"complete", "--containerd-address", n.Address(), "--hosts-dir", ""}
	for want, more := range map[string][]string{
		"no image":     {"--plain-http", "unknown:1"},
		"does not run": {"--containerd-address", "/nowhere/sock", ref},
	} {
		if out, err := dedupctl(t, n, append(args, more...)...); err == nil || !strings.Contains(out, want) {
			t.Errorf("dedupctl complete %q says %q, %v; want %q", more, out, err, want)
		}
	}
	args = append(args, "--plain-http", "--json", ref)
	var got struct {
		Fetched []struct{ Digest string }
		Bytes   int64 `json:"fetched_bytes"`
	}
	for _, want := range []int{len(layers), 0} {
		out, err := dedupctl(t, n, args...)
		must(t, err)
		must(t, json.Unmarshal([]byte(out), &got))
		if len(got.Fetched) != want {
			t.Errorf("fetched %d blobs, want %d: %s", len(got.Fetched), want, out)
		}
	}
}

// With reuse = "fetched" a known layer is downloaded all the same, and not unpacked again.
func TestFetchedOnlyDownloadsAndDoesNotUnpack(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{Daemon: map[string]any{"reuse": "fetched", "log_level": "debug"}})
	first, second := startRegistry(t), startRegistry(t)
	layers := []*image.Layer{busybox(t), layer(t, payload("fetched", "app", 9000))}
	elsewhere := namespaces.WithNamespace(testContext(t), "elsewhere")
	must(t, n.Pull(elsewhere, node.Snapshotter, push(t, first, "app:1", layers...)))
	forget(t, n, elsewhere, layers)
	ref := push(t, second, "app:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	fetched, err := second.Fetched()
	must(t, err)
	for _, l := range layers {
		found := 0
		for _, h := range fetched {
			if h == l.Hash {
				found++
			}
		}
		if found != 1 {
			t.Errorf("a blob was fetched %d times", found)
		}
	}
	for blob, times := range ingests(t, n) {
		if times != 1 {
			t.Errorf("blob %s was read %d times", blob, times)
		}
	}
	if err := export(testContext(t), n, ref, filepath.Join(t.TempDir(), "app.tar")); err != nil {
		t.Error(err)
	}
}

// docs/configuration.md, reuse: what "fetched" protects between namespaces rests on how containerd shares blobs.
func TestFetchedOnlyBetweenNamespaces(t *testing.T) {
	t.Parallel()
	layers := []*image.Layer{layer(t, payload("private", "base", 9000)), layer(t, payload("private", "app", 9000))}
	for policy, want := range map[string]int{"isolated": len(layers), "shared": 0} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			n := startDedup(t, node.Options{
				Plugins: map[string]map[string]any{"io.containerd.metadata.v1.bolt": {"content_sharing_policy": policy}},
				Daemon:  map[string]any{"reuse": "fetched"},
			})
			pull(t, n, node.Snapshotter, push(t, startRegistry(t), "app:1", layers...))
			second := startRegistry(t)
			ref := push(t, second, "app:1", layers...)
			must(t, n.Pull(namespaces.WithNamespace(testContext(t), "elsewhere"), node.Snapshotter, ref))
			fetched, err := second.Fetched()
			must(t, err)
			got := 0
			for _, h := range fetched {
				if slices.ContainsFunc(layers, func(l *image.Layer) bool { return l.Hash == h }) {
					got++
				}
			}
			if got != want {
				t.Errorf("%d blobs were fetched, want %d", got, want)
			}
		})
	}
}
