package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// puller is one way in which images come to a node.
type puller struct {
	name string
	pull func(ctx context.Context, ref string) error
	// namespace that it works in, and another one; "" where it knows only one.
	namespace, other string
	// fetchesAll: it fetches every blob that the content store does not have, and asks nobody
	// whether the layer is known. That is so with ctr --local: it unpacks when all has arrived.
	fetchesAll bool
}

// matrixRow is one image in a row of pulls on one node.
type matrixRow struct {
	name     string
	registry int
	layers   []*image.Layer
	other    bool // in another namespace
	// fetched are the layers whose blobs have to be fetched: those that are in no hit.
	fetched []*image.Layer
}

// matrixTable is what was fetched in each pull, for people.
type matrixTable struct{ lines []string }

func (m *matrixTable) start(version, client string) { m.lines = append(m.lines, version+"\t"+client) }

func (m *matrixTable) add(row string, fetched, layers int) {
	m.lines[len(m.lines)-1] += fmt.Sprintf("\t%s %d/%d", row, fetched, layers)
}

func (m *matrixTable) String() string {
	var text strings.Builder
	text.WriteString("layer blobs asked of the registry / layers of the image; the config blob and the manifest come " +
		"with every pull\n" +
		"of an image that is new to the namespace. on-a-miss: containerd fetches what lies above a miss before it asks.\n" +
		"ctr-local, and ctr of 1.7, which is the same client: all blobs are fetched before anybody is asked.\n")
	w := tabwriter.NewWriter(&text, 0, 8, 2, ' ', 0)
	for _, line := range m.lines {
		fmt.Fprintln(w, line)
	}
	_ = w.Flush()
	return text.String()
}

// Every supported containerd, every client, every way in which a layer can be known: the image is right,
// and what is known is not fetched, by the registry's own log.
func TestMatrix(t *testing.T) {
	versions, err := node.Versions()
	must(t, err)
	reference := startNode(t, node.Options{NoDedup: true})
	table := &matrixTable{}
	defer func() { t.Log(table.String()) }()
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			matrixNode(t, table, version, reference, node.Options{Version: version, CRI: true})
		})
	}
	t.Run("unpacking side by side", func(t *testing.T) {
		sideBySide := map[string]map[string]any{"io.containerd.transfer.v1.local": {"max_concurrent_unpacks": 4}}
		matrixNode(t, table, node.DefaultVersion+" side by side", reference, node.Options{CRI: true, Plugins: sideBySide})
	})
}

func matrixNode(t *testing.T, table *matrixTable, title string, reference *node.Node, opts node.Options) {
	opts.Daemon = map[string]any{"log_level": "debug"}
	n := startDedup(t, opts)
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()
	defer func() {
		for blob, times := range ingests(t, n) {
			if times > 1 {
				t.Errorf("blob %s was read %d times in the node's life", blob, times)
			}
		}
	}()
	pull := func(with func(context.Context, string, string) error) func(context.Context, string) error {
		return func(ctx context.Context, ref string) error { return with(ctx, node.Snapshotter, ref) }
	}
	for _, cl := range []puller{
		{name: "ctr", pull: pull(n.Pull), namespace: "ctr", other: "ctr-2"},
		{name: "client", pull: func(ctx context.Context, ref string) error {
			return n.PullClient(ctx, node.Snapshotter, ref)
		}, namespace: "client", other: "client-2"},
		{name: "ctr-local", pull: pull(n.PullLocal), namespace: "local", other: "local-2", fetchesAll: true},
		{name: "CRI", pull: c.Pull, namespace: node.CRINamespace},
	} {
		// In 1.7 ctr's own client is what a plain pull is; its transfer service pulls from HTTPS alone.
		cl.fetchesAll = cl.fetchesAll || cl.name == "ctr" && strings.HasPrefix(opts.Version, "1.")
		table.start(title, cl.name)
		t.Run(cl.name, func(t *testing.T) { matrix(t, table, n, reference, cl) })
	}
	t.Run("import", func(t *testing.T) { matrixImport(t, n, reference) })
	log, err := os.ReadFile(n.LogPath("dedup"))
	must(t, err)
	if staged := bytes.Contains(log, []byte(`msg="staged `)); staged != (opts.Plugins != nil) {
		t.Errorf("layers were staged: %v", staged)
	}
}

func matrix(t *testing.T, table *matrixTable, n, reference *node.Node, cl puller) {
	own := func(name string) *image.Layer {
		return layer(t, image.Dir(name), payload(cl.name, name+"/file", 9000), image.File(name+"/small", cl.name),
			image.Symlink(name+"/link", "small"))
	}
	base, app, mid := own("base"), own("app"), own("mid")
	again := func(opts image.LayerOptions) *image.Layer {
		l, err := image.FromEntries(t.TempDir(), opts,
			image.Dir("app"), payload(cl.name, "app/file", 9000), image.File("app/small", cl.name),
			image.Symlink("app/link", "small"))
		must(t, err)
		if l.Diff != app.Diff || l.Hash == app.Hash {
			t.Fatalf("the layer in another compression (%+v) is not what the test needs", opts)
		}
		return l
	}
	zstd, level, plain := again(image.LayerOptions{Compression: image.Zstd}), again(image.LayerOptions{Level: 1}),
		again(image.LayerOptions{Compression: image.None})
	low, cut, over := whiteouts(t, cl.name)
	registries := []*registry.Registry{startRegistry(t), startRegistry(t), startRegistry(t)}
	for _, row := range []matrixRow{
		{name: "first", layers: []*image.Layer{base, app}, fetched: []*image.Layer{base, app}},
		{name: "other-registry", registry: 1, layers: []*image.Layer{base, app}},
		{name: "on-a-miss", layers: []*image.Layer{mid, base}, fetched: []*image.Layer{mid}},
		{name: "other-parent", registry: 1, layers: []*image.Layer{mid, app}},
		{name: "zstd", registry: 2, layers: []*image.Layer{mid, base, zstd}},
		{name: "gzip-level", registry: 2, layers: []*image.Layer{base, mid, level}},
		{name: "plain-tar", registry: 2, layers: []*image.Layer{plain, base}},
		{name: "whiteouts", layers: []*image.Layer{low, cut, over}, fetched: []*image.Layer{low, cut, over}},
		{name: "whiteouts-other-parent", registry: 1, layers: []*image.Layer{base, low, app, cut, mid, over}},
		{name: "other-namespace", registry: 2, layers: []*image.Layer{base, app}, other: true},
	} {
		if row.other && cl.other == "" {
			continue
		}
		t.Run(row.name, func(t *testing.T) { matrixPull(t, table, n, reference, cl, row, registries) })
	}
}

func matrixPull(t *testing.T, table *matrixTable, n, reference *node.Node, cl puller, row matrixRow,
	registries []*registry.Registry) {
	r := registries[row.registry]
	ref := push(t, r, row.name+":1", row.layers...)
	before, err := r.Log()
	must(t, err)
	ctx := namespaces.WithNamespace(testContext(t), cl.namespace)
	if row.other {
		ctx = namespaces.WithNamespace(ctx, cl.other)
	}
	must(t, cl.pull(ctx, ref))

	after, err := r.Log()
	must(t, err)
	asked := registry.Blobs(after[len(before):])
	want, total := row.fetched, 0
	if cl.fetchesAll {
		want = row.layers
	}
	for _, l := range row.layers {
		times := asked[l.Hash]
		if times != (registry.Requests{}) {
			total++
		}
		switch wanted := slices.Contains(want, l); {
		case wanted && times.Get != 1:
			t.Errorf("the blob of a layer that nobody knows was fetched %d times", times.Get)
		case !wanted && times != (registry.Requests{}) && !aboveMiss(row, l):
			t.Errorf("the blob of a known layer was asked for: %+v", times)
		}
	}
	if len(registry.Manifests(after[len(before):])) == 0 {
		t.Error("no manifest was asked for: did the pull come to this registry?")
	}
	table.add(row.name, total, len(row.layers))
	got := dumpIn(t, n, ctx, node.Snapshotter, ref)
	pull(t, reference, "overlayfs", ref)
	equal(t, dump(t, reference, "overlayfs", ref), got, noRootTime)
	forget(t, n, ctx, row.layers)
}

// whiteouts are three layers in which names go, come back and change their type, for use on each other or apart.
func whiteouts(t *testing.T, who string) (low, cut, over *image.Layer) {
	low = layer(t,
		image.Dir("w"), image.File("w/gone", who), image.File("w/back", "low"), image.File("w/type-file", "low"),
		image.Dir("w/dir"), image.File("w/dir/below", "low"), image.Dir("w/dir/sub"), payload(who, "w/dir/sub/file", 5000),
		image.Dir("w/opaque"), image.File("w/opaque/below", "low"), image.Dir("w/opaque/sub"),
		image.File("w/opaque/sub/below", "low"),
		image.Dir("w/type-dir"), image.File("w/type-dir/below", "low"), image.Symlink("w/type-link", "dir"))
	cut = layer(t,
		image.Dir("w"), image.File("w/.wh.gone", ""), image.File("w/.wh.back", ""), image.File("w/.wh.dir", ""),
		image.Dir("w/opaque"), image.File("w/opaque/.wh..wh..opq", ""), image.File("w/opaque/above", who),
		image.File("w/type-dir", "now a file of "+who),
		image.Dir("w/type-file"), image.File("w/type-file/inside", "cut"),
		image.Dir("w/type-link"), image.File("w/type-link/inside", "cut"))
	over = layer(t,
		image.Dir("w"), image.File("w/back", "over "+who), image.Dir("w/dir"), image.File("w/dir/new", "over"),
		image.Dir("w/opaque"), image.Dir("w/opaque/sub"), image.File("w/opaque/sub/new", "over"),
		image.File("w/opaque/.wh.above", ""),
		image.Dir("w/type-dir"), image.File("w/type-dir/inside", "over"), image.Symlink("w/type-file", "type-dir"))
	return low, cut, over
}

// aboveMiss: containerd fetches every blob above the first layer that is not a hit, before it asks for them.
func aboveMiss(row matrixRow, l *image.Layer) bool {
	miss := slices.IndexFunc(row.layers, func(l *image.Layer) bool { return slices.Contains(row.fetched, l) })
	return miss >= 0 && slices.Index(row.layers, l) > miss
}

// matrixImport brings images in without any registry.
func matrixImport(t *testing.T, n, reference *node.Node) {
	entries := func(name string) []image.Entry {
		return []image.Entry{image.Dir(name), payload("import", name+"/file", 9000), image.File(name+"/small", "import")}
	}
	base, app, mid := layer(t, entries("base")...), layer(t, entries("app")...), layer(t, entries("mid")...)
	zstd, err := image.FromEntries(t.TempDir(), image.LayerOptions{Compression: image.Zstd}, entries("app")...)
	must(t, err)
	for _, row := range []matrixRow{
		{name: "first", layers: []*image.Layer{base, app}},
		{name: "other-name", layers: []*image.Layer{base, app}},
		{name: "other-parent", layers: []*image.Layer{mid, app}},
		{name: "other-compression", layers: []*image.Layer{base, mid, zstd}},
		{name: "other-namespace", layers: []*image.Layer{base, app}, other: true},
	} {
		t.Run(row.name, func(t *testing.T) {
			img, err := image.New(image.Options{}, row.layers...)
			must(t, err)
			ref, path := "import.test/"+row.name+":1", filepath.Join(t.TempDir(), "image.tar")
			must(t, image.WriteLayout(path, ref, img))
			ctx := namespaces.WithNamespace(testContext(t), "import")
			if row.other {
				ctx = namespaces.WithNamespace(ctx, "import-2")
			}
			must(t, n.Import(ctx, node.Snapshotter, path))
			got := dumpIn(t, n, ctx, node.Snapshotter, ref)
			must(t, reference.Import(testContext(t), "overlayfs", path))
			equal(t, dump(t, reference, "overlayfs", ref), got, noRootTime)
		})
	}
}

// dumpIn is dump in the containerd namespace of ctx.
func dumpIn(t *testing.T, n *node.Node, ctx context.Context, snapshotter, ref string) rootfs.Tree {
	t.Helper()
	var tree rootfs.Tree
	must(t, n.View(ctx, snapshotter, ref, func(root string) (err error) {
		tree, err = rootfs.Dump(root)
		return err
	}))
	return tree
}

// forget removes layers' blobs from the content store for good, so that what comes next cannot rest on them.
func forget(t *testing.T, n *node.Node, ctx context.Context, layers []*image.Layer) {
	t.Helper()
	for _, l := range layers {
		if err := n.Client().ContentStore().Delete(ctx, digest.Digest(l.Hash.String())); err != nil &&
			!errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	collectGarbage(t, n)
	for _, l := range layers {
		if _, err := os.Stat(filepath.Join(n.Dir(), "c/io.containerd.content.v1.content/blobs/sha256",
			l.Hash.Hex)); !os.IsNotExist(err) {
			t.Errorf("blob %s stays: %v", l.Hash, err)
		}
	}
}

var ingested = regexp.MustCompile(`msg="ingested blob".* blob="?(sha256:[0-9a-f]{64})`)

// ingests tells how often each blob was read, from the daemon's log at level debug.
func ingests(t *testing.T, n *node.Node) map[string]int {
	t.Helper()
	log, err := os.ReadFile(n.LogPath("dedup"))
	must(t, err)
	times := map[string]int{}
	for _, m := range ingested.FindAllSubmatch(log, -1) {
		times[string(m[1])]++
	}
	return times
}
