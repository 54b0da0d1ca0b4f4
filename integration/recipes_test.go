package integration

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// completed is what `dedupctl complete --json` prints.
type completed struct {
	Made, Fetched []struct{ Digest string }
}

func complete(t *testing.T, n *node.Node, refs ...string) (v completed) {
	t.Helper()
	out, err := dedupctl(t, n, completeArgs(n, refs...)...)
	if err != nil {
		t.Fatalf("dedupctl complete %v: %v: %s", refs, err, out)
	}
	must(t, json.Unmarshal([]byte(out), &v))
	return v
}

// exported are the sums of the files in an export of an image.
func exported(t *testing.T, n *node.Node, ref string) map[string]string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	must(t, export(testContext(t), n, ref, path))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	sums := map[string]string{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return sums
		}
		must(t, err)
		sum := sha256.New()
		_, err = io.Copy(sum, r)
		must(t, err)
		sums[h.Name] = hex.EncodeToString(sum.Sum(nil))
	}
}

// An image is trimmed, and its registry goes. What an encoder of the daemon makes again comes from the store, bit for
// bit: also where the store has other timestamps in bytecode. What none makes is fetched, and says so where it cannot.
func TestTrimmedWithoutRegistry(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	must(t, err)
	made := func(opts image.LayerOptions, entries ...image.Entry) *image.Layer {
		l, err := image.FromEntries(t.TempDir(), opts, entries...)
		must(t, err)
		return l
	}
	long := strings.Repeat("long/", 40)
	layers := []*image.Layer{
		busybox(t),
		made(image.LayerOptions{Compression: image.GoGzip}, append(compiled(40), image.File(long+"name", "x"),
			payload("go", "large", 3<<20), image.Hardlink("linked", "large"), image.File(".wh.gone", ""))...),
		made(image.LayerOptions{Compression: image.GoGzip, Level: 1}, payload("go", "fast", 90000)),
		made(image.LayerOptions{Compression: image.Zstd}, payload("go", "zstd", 90000)),
		made(image.LayerOptions{Compression: image.None}, payload("go", "plain", 90000)),
	}
	other := made(image.LayerOptions{Compression: image.Estargz}, payload("go", "stargz", 200000))
	ref, mixed := push(t, r, "app:1", layers...), push(t, r, "mixed:1", layers[1], other)
	pull(t, n, node.Snapshotter, ref)
	pull(t, n, node.Snapshotter, mixed)
	before, files := exported(t, n, ref), dump(t, n, node.Snapshotter, ref)

	if done := trim(t, n); done.FreedBlobs != int64(len(layers))+1 {
		t.Fatalf("trimmed %+v", done)
	}
	var status struct {
		Recipes     int64
		RecipeBytes int64 `json:"recipe_bytes"`
	}
	dedupctlJSON(t, n, &status, "status")
	if status.Recipes != int64(len(layers)) || status.RecipeBytes == 0 {
		t.Errorf("status says %+v of %d layers", status, len(layers))
	}
	fsck(t, n, 0)
	must(t, n.KillDaemon()) // the recipes outlive it
	must(t, n.StartDaemon(testContext(t)))
	got := complete(t, n, mixed)
	if len(got.Made) != 1 || len(got.Fetched) != 1 || got.Fetched[0].Digest != other.Hash.String() {
		t.Errorf("of what can be made in part: %+v", got)
	}
	trim(t, n, "--fetched")
	must(t, r.Close()) // nothing is fetched from here on
	if got = complete(t, n, ref); len(got.Made) != len(layers) || len(got.Fetched) != 0 {
		t.Errorf("without a registry: %+v", got)
	}
	if diff := cmp.Diff(before, exported(t, n, ref)); diff != "" {
		t.Errorf("exported then (-) and now (+):\n%s", diff)
	}
	if got = complete(t, n, ref); len(got.Made)+len(got.Fetched) != 0 {
		t.Errorf("complete, and made again: %+v", got)
	}
	out, err := dedupctl(t, n, completeArgs(n, mixed)...)
	if err == nil || !strings.Contains(out, "cannot be reached") {
		t.Errorf("of what no encoder makes, without a registry: %q, %v", out, err)
	}
	equal(t, files, dump(t, n, node.Snapshotter, ref), noRootTime)
	servesBlobs(t, n, layers)
	fsck(t, n, 0)
	removesRecipes(t, n, ref, mixed)
}

// servesBlobs reads what can be made from the daemon's socket, as a client of containerd's content API.
func servesBlobs(t *testing.T, n *node.Node, layers []*image.Layer) {
	t.Helper()
	ctx := testContext(t)
	c, err := client.New(n.DedupAddress())
	must(t, err)
	defer c.Close()
	ctx = namespaces.WithNamespace(ctx, node.Namespace)
	for _, l := range layers {
		got, err := content.ReadBlob(ctx, c.ContentStore(), ocispec.Descriptor{Digest: digest.Digest(l.Hash.String())})
		must(t, err)
		if sum := digest.FromBytes(got); sum.String() != l.Hash.String() {
			t.Errorf("%s is served with other bytes", l.Hash)
		}
	}
	out, err := n.Ctr(ctx, "--address", n.DedupAddress(), "content", "ls", "--quiet")
	if err != nil || len(strings.Fields(out)) != len(layers) || !strings.Contains(out, layers[1].Hash.String()) {
		t.Errorf("ctr lists %q, %v", out, err)
	}
	out, err = n.Ctr(ctx, "--address", n.DedupAddress(), "content", "get", layers[1].Hash.String())
	if err != nil || digest.FromString(out).String() != layers[1].Hash.String() {
		t.Errorf("ctr gets %d bytes, %v", len(out), err)
	}
	_, err = n.Ctr(ctx, "--address", n.DedupAddress(), "content", "rm", layers[1].Hash.String())
	if err == nil || !strings.Contains(err.Error(), "read only") {
		t.Errorf("ctr removes: %v", err)
	}
}

// removesRecipes removes the images, and with them the recipes.
func removesRecipes(t *testing.T, n *node.Node, refs ...string) {
	t.Helper()
	for _, ref := range refs {
		_, err := n.Ctr(testContext(t), "image", "rm", "--sync", ref)
		must(t, err)
	}
	for range 100 {
		left, err := os.ReadDir(filepath.Join(n.DedupRoot(), "recipes"))
		must(t, err)
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("recipes stay after their images")
}

// A damaged layer gives no blob: what was damaged is told, the blob comes from the registry, and heals it.
func TestRecipeOfDamagedLayer(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	own := layer(t, payload("recipe", "own", 90000))
	ref := push(t, r, "own:1", own)
	pull(t, n, node.Snapshotter, ref)
	trim(t, n)
	payloadOf(t, n, payload("recipe", "own", 90000).Content).flip(t)
	if got := complete(t, n, ref); len(got.Made) != 0 || len(got.Fetched) != 1 {
		t.Errorf("of damage that nobody knows of: %+v", got)
	}
	fsck(t, n, 3)
	fsck(t, n, 0, "--repair")
	trim(t, n, "--fetched")
	if got := complete(t, n, ref); len(got.Made) != 1 || len(got.Fetched) != 0 {
		t.Errorf("after the repair: %+v", got)
	}
	fsck(t, n, 0)
}
