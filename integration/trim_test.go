package integration

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// trimmed is what `dedupctl trim --json` prints.
type trimmed struct {
	FreedBlobs int64 `json:"freed_blobs"`
	FreedBytes int64 `json:"freed_bytes"`
	Images     []struct {
		Namespace string
		Names     []string
		Blobs     int64
		KeptBlobs int64 `json:"kept_blobs"`
		Kept      string
	}
}

func trim(t *testing.T, n *node.Node, args ...string) (v trimmed) {
	t.Helper()
	out, err := dedupctl(t, n, append([]string{"trim", "--json"}, args...)...)
	if err != nil {
		t.Fatalf("dedupctl trim %v: %v: %s", args, err, out)
	}
	must(t, json.Unmarshal([]byte(out), &v))
	return v
}

// kept says why an image keeps blobs.
func (v trimmed) kept(name string) string {
	for _, i := range v.Images {
		if slices.Contains(i.Names, name) {
			return i.Kept
		}
	}
	return "not listed"
}

// has tells which of the layers' blobs a namespace has.
func has(t *testing.T, n *node.Node, namespace string, layers ...*image.Layer) (there []bool) {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), namespace)
	for _, l := range layers {
		_, err := n.Client().ContentStore().Info(ctx, digest.Digest(l.Hash.String()))
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		there = append(there, err == nil)
	}
	return there
}

// layerFiles counts the files of the content store that are larger than any manifest here.
func layerFiles(t *testing.T, n *node.Node) (count int) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.Dir(), "c/io.containerd.content.v1.content/blobs/sha256/*"))
	must(t, err)
	for _, path := range paths {
		if fi, err := os.Stat(path); err == nil && fi.Size() > 4096 {
			count++
		}
	}
	return count
}

func wantBlobs(t *testing.T, what string, got []bool, want bool) {
	t.Helper()
	for i, there := range got {
		if there != want {
			t.Errorf("%s: blob %d is there: %v", what, i, there)
		}
	}
}

// completeArgs are those of dedupctl complete with a registry of these tests.
func completeArgs(n *node.Node, more ...string) []string {
	args := []string{"complete", "--containerd-address", n.Address(), "--hosts-dir", "", "--plain-http", "--json"}
	return append(args, more...)
}

// What a trimmed image can do: run, be pulled and viewed without a download; and after dedupctl complete, be exported
// and pushed, until it is trimmed again.
func TestTrim(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{Daemon: map[string]any{"recipes": false}})
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	must(t, err)
	layers := []*image.Layer{busybox(t), layer(t, payload("trim", "app", 90000))}
	ref := push(t, r, "app:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	before := dump(t, n, node.Snapshotter, ref)

	if dry := trim(t, n, "--dry-run"); dry.FreedBlobs != 2 {
		t.Errorf("a dry run finds %+v", dry)
	}
	wantBlobs(t, "after a dry run", has(t, n, node.Namespace, layers...), true)
	size, err := layers[0].Size()
	must(t, err)
	if done := trim(t, n); done.FreedBlobs != 2 || done.FreedBytes < size {
		t.Errorf("trimmed %+v", done)
	}
	wantBlobs(t, "trimmed", has(t, n, node.Namespace, layers...), false)
	if left := layerFiles(t, n); left != 0 {
		t.Errorf("%d files of layers stay", left)
	}
	if again := trim(t, n); again.FreedBlobs != 0 || len(again.Images) != 0 {
		t.Errorf("trimmed twice: %+v", again)
	}
	must(t, r.Close()) // nothing is fetched from here on
	pull := func() error { return n.Pull(testContext(t), node.Snapshotter, ref) }
	out, err := n.Run(testContext(t), node.Snapshotter, ref, "/bin/echo", "runs")
	if err != nil || !strings.Contains(out, "runs") {
		t.Errorf("a container of it: %q, %v", out, err)
	}
	equal(t, before, dump(t, n, node.Snapshotter, ref), noRootTime)
	out, err = dedupctl(t, n, completeArgs(n, ref)...)
	if err == nil || !strings.Contains(out, "cannot be reached") {
		t.Errorf("complete without a registry says %q, %v", out, err)
	}
	fsck(t, n, 0)

	again := startRegistry(t)
	ref = push(t, again, "app:1", layers...)
	must(t, pull())
	if fetched, err := again.Fetched(); err != nil || len(fetched) > 2 { // manifest and config
		t.Errorf("a pull of what is known fetched %v, %v", fetched, err)
	}
	export := func() error {
		return export(testContext(t), n, ref, filepath.Join(t.TempDir(), "app.tar"))
	}
	if err := export(); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("export says %v", err)
	}
	if out, err := dedupctl(t, n, completeArgs(n, ref)...); err != nil {
		t.Errorf("complete: %s, %v", out, err)
	}
	must(t, export())
	if done := trim(t, n, "--wait", "0s"); done.FreedBlobs != 0 || !strings.Contains(done.kept(ref), "in use") {
		t.Errorf("what was exported a moment ago: %+v", done)
	}
	if done := trim(t, n, "--dry-run"); done.FreedBlobs != 0 || !strings.Contains(done.kept(ref), "for its own sake") {
		t.Errorf("what was completed within the hour: %+v", done)
	}
	if done := trim(t, n, "--fetched"); done.FreedBlobs != 2 {
		t.Errorf("what was completed is trimmed again: %+v", done)
	}
	fsck(t, n, 0)
}

// What keeps blobs.
func TestTrimKeeps(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	bb := busybox(t)
	refs := map[string]string{}
	own := map[string]*image.Layer{}
	for _, name := range []string{"marked", "manifest", "leased", "overlayfs", "damaged", "shared", "plain"} {
		own[name] = layer(t, payload(name, name, 90000))
		layers := []*image.Layer{bb, own[name]}
		if name == "leased" { // others' base would be leased, too
			layers = layers[1:]
		}
		refs[name] = push(t, r, name+":1", layers...)
		pull(t, n, node.Snapshotter, refs[name])
	}
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	_, err := n.Ctr(ctx, "image", "label", refs["marked"], "dedup-snapshotter.io/blobs=keep")
	must(t, err)
	img, err := n.Client().ImageService().Get(ctx, refs["manifest"])
	must(t, err)
	_, err = n.Client().ContentStore().Update(ctx, content.Info{Digest: img.Target.Digest,
		Labels: map[string]string{"dedup-snapshotter.io/blobs": "keep"}}, "labels.dedup-snapshotter.io/blobs")
	must(t, err)
	lease, err := n.Client().LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	must(t, err)
	img, err = n.Client().ImageService().Get(ctx, refs["leased"])
	must(t, err)
	resource := leases.Resource{ID: img.Target.Digest.String(), Type: "content"}
	must(t, n.Client().LeasesService().AddResource(ctx, lease, resource))
	must(t, n.Pull(ctx, "overlayfs", refs["overlayfs"]))
	elsewhere := namespaces.WithNamespace(testContext(t), "elsewhere")
	must(t, n.Pull(elsewhere, node.Snapshotter, refs["shared"]))
	must(t, n.PullLocal(elsewhere, node.Snapshotter, refs["shared"])) // which fetches all
	tar := filepath.Join(t.TempDir(), "local.tar")
	local := layer(t, payload("local", "local", 90000))
	built, err := image.New(image.Options{}, bb, local)
	must(t, err)
	must(t, image.WriteLayout(tar, "docker.io/library/local:1", built))
	must(t, n.Import(ctx, node.Snapshotter, tar))
	payloadOf(t, n, payload("damaged", "damaged", 90000).Content).flip(t)
	fsck(t, n, 3)

	why := map[string]string{
		refs["marked"]: "marked", refs["manifest"]: "marked", refs["leased"]: "lease", refs["overlayfs"]: "overlayfs",
		refs["damaged"]: "damaged", refs["plain"]: "", "docker.io/library/local:1": "last copy",
	}
	done := trim(t, n, "--namespace", node.Namespace)
	for name, want := range why {
		got := done.kept(name)
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%s keeps blobs because %q, want %q", name, got, want)
		}
	}
	wantBlobs(t, "plain", has(t, n, node.Namespace, own["plain"]), false)
	for _, name := range slices.Sorted(maps.Keys(own)) {
		if name != "plain" && name != "shared" {
			wantBlobs(t, name, has(t, n, node.Namespace, own[name]), true)
		}
	}
	wantBlobs(t, "local", has(t, n, node.Namespace, local), true)
	wantBlobs(t, "another namespace's", has(t, n, "elsewhere", own["shared"]), true)
	keepsWhatIsShared(t, n, ctx, refs, own, lease, bb)
}

// keepsWhatIsShared goes on with what another namespace, or an ended lease, has held so far.
func keepsWhatIsShared(
	t *testing.T, n *node.Node, ctx context.Context, refs map[string]string, own map[string]*image.Layer,
	lease leases.Lease, bb *image.Layer,
) {
	t.Helper()
	if got := layerFiles(t, n); got == 0 {
		t.Error("nothing is left of what another namespace needs")
	}
	if done := trim(t, n, "--namespace", "elsewhere"); done.FreedBlobs != 1 { // the base layer is others' too
		t.Errorf("trimming the other namespace freed %+v", done)
	}
	must(t, n.Client().LeasesService().Delete(ctx, lease))
	trim(t, n, refs["leased"])
	wantBlobs(t, "leased no more", has(t, n, node.Namespace, own["leased"]), false)
	wantBlobs(t, "a base that others keep", has(t, n, node.Namespace, bb), true)
	out, err := dedupctl(t, n, "trim", "--last-copy")
	if err == nil || !strings.Contains(out, "by name") {
		t.Errorf("--last-copy without a name: %q, %v", out, err)
	}
	if out, err := dedupctl(t, n, "trim", "nowhere:1"); err == nil || !strings.Contains(out, "no image") {
		t.Errorf("an image that is not there: %q, %v", out, err)
	}
}
