package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

func analyze(t *testing.T, n *node.Node, sources ...string) (a analyzed) {
	t.Helper()
	out, err := dedupctl(t, n, append([]string{"analyze", "--json"}, sources...)...)
	if err != nil {
		t.Fatal(err, out)
	}
	must(t, json.Unmarshal([]byte(out), &a))
	return a
}

// names of the images that an analysis found.
func (a analyzed) names() (all []string) {
	for _, img := range a.Images {
		all = append(all, img.Names...)
	}
	slices.Sort(all)
	return all
}

// One set of images gives one prediction, whether it lies in registries, in a containerd or in a Docker.
func TestAnalyzePlaces(t *testing.T) {
	t.Parallel()
	n, r := startNode(t, node.Options{NoDedup: true, Version: "1.7.35"}), startRegistry(t)
	ctx := testContext(t)
	d, err := n.StartDocker(ctx, "")
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	bb, data := busybox(t), dataLayer(t)
	whiteouts := layer(t, image.File("data/.wh.a", ""), image.Dir("etc"), image.File("etc/.wh..wh..opq", ""),
		payload("places", "own", 30_000))
	refs := []string{push(t, r, "one:1", bb, data), push(t, r, "two:1", bb, data, whiteouts),
		push(t, r, "three:1", bb, whiteouts)}
	for _, ref := range refs {
		pull(t, n, "overlayfs", ref)
		_, err := d.Run(ctx, "pull", "--quiet", ref)
		must(t, err)
	}
	_, err = d.Run(ctx, "run", "--detach", "--network", "none", refs[0], "sh", "-c", "echo written > /file; sleep 1000")
	must(t, err)

	want := analyze(t, n, refs...)
	if want.Layers != 4 || want.DiffIDs != 3 || want.Now.Bytes <= want.Layer.Bytes || want.Containers != 0 {
		t.Errorf("registry: %+v", want)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	if out, err := exec.CommandContext(ctx, "cp", "-a", filepath.Join(d.Root(), "overlay2"),
		moved).CombinedOutput(); err != nil {
		t.Fatal(err, string(out))
	}
	for _, row := range []struct {
		source     string
		containers int64
	}{
		{filepath.Join(n.Dir(), "c"), 0},
		{n.SnapshotterRoot("overlayfs"), 0},
		{d.Root(), 1},
		{filepath.Join(d.Root(), "overlay2"), 1},
	} {
		got := analyze(t, n, row.source)
		if !slices.Equal(got.names(), refs) && !slices.Equal(got.names(), sorted(refs)) {
			t.Errorf("%s: images %q", row.source, got.names())
		}
		inContainerd := row.source != d.Root() && filepath.Base(row.source) != "overlay2"
		if inContainerd != (got.Blobs == want.Blobs) {
			t.Errorf("%s: blobs %+v, those of the registry %+v", row.source, got.Blobs, want.Blobs)
		}
		if got.Containers != row.containers || (got.InUse.Bytes > 0) != (row.containers > 0) || got.Layers != want.Layers ||
			got.DiffIDs != want.DiffIDs {
			t.Errorf("%s: %+v", row.source, got)
		}
		if diff := cmp.Diff([]usedSpace{want.Python.Objects, want.File.Objects},
			[]usedSpace{got.Python.Objects, got.File.Objects}); diff != "" {
			t.Errorf("%s: objects (-registry +this):\n%s", row.source, diff)
		}
		if off := got.Python.Bytes - want.Python.Bytes; off < -4*4096 || off > 4*4096 ||
			got.Python.Inodes != want.Python.Inodes {
			t.Errorf("%s: %+v, want %+v", row.source, got.Python, want.Python)
		}
	}
	if got := analyze(t, n, moved); got.Layers != 4 || len(got.names()) != 0 || got.Containers != 1 ||
		got.Python.Objects != want.Python.Objects {
		t.Errorf("%s: %+v", moved, got)
	}
	layers, err := rootfs.Usage(filepath.Join(d.Root(), "overlay2"))
	must(t, err)
	if docker := analyze(t, n, d.Root()); docker.Now.Bytes+docker.Writable.Bytes > layers.Bytes ||
		docker.Now.Bytes+docker.Writable.Bytes < layers.Bytes*95/100 {
		t.Errorf("Docker's layers %+v and what a container wrote %+v make no %+v", docker.Now, docker.Writable, layers)
	}
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }

// A stranger to the databases is told what is missing.
func TestAnalyzeDamagedPlaces(t *testing.T) {
	t.Parallel()
	n := startNode(t, node.Options{NoDedup: true})
	root := t.TempDir()
	must(t, os.Mkdir(filepath.Join(root, "snapshots"), 0o700))
	must(t, os.WriteFile(filepath.Join(root, "metadata.db"), []byte("no database"), 0o600))
	docker := filepath.Join(t.TempDir(), "overlay2")
	must(t, os.MkdirAll(filepath.Join(docker, "top/diff"), 0o700))
	must(t, os.WriteFile(filepath.Join(docker, "top/lower"), []byte("l/GONE"), 0o600))
	for source, want := range map[string]string{root: "metadata.db", docker: "names l/GONE as its parent",
		n.Dir(): "no index.json (OCI layout)"} {
		if out, err := dedupctl(t, n, "analyze", source); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: %v: %s, want %q", source, err, out, want)
		}
	}
}
