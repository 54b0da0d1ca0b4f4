package integration

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

var exact = node.Options{Daemon: map[string]any{"fidelity": "exact"}}

// comparison says what counts as equal to overlayfs.
type comparison struct {
	ignore rootfs.DiffOptions
	// correct changes what overlayfs shows to what the image spec asks for, where
	// overlayfs is known to be wrong.
	correct func(rootfs.Tree)
}

// equality pulls an image with overlayfs and with dedup, and compares what a View and a
// container's writable snapshot show.
func equality(t *testing.T, c comparison, layers ...*image.Layer) {
	t.Helper()
	r := startRegistry(t)
	ref := push(t, r, "equality/image:1", layers...)
	reference := startNode(t, node.Options{NoDedup: true})
	pull(t, reference, "overlayfs", ref)
	want := dump(t, reference, "overlayfs", ref)
	if c.correct != nil {
		c.correct(want)
	}
	n := startDedup(t, exact)
	pull(t, n, node.Snapshotter, ref)
	equal(t, want, dump(t, n, node.Snapshotter, ref), c.ignore)
	must(t, n.Active(testContext(t), node.Snapshotter, ref, func(root string) error {
		got, err := rootfs.Dump(root)
		if err == nil {
			equal(t, want, got, c.ignore)
		}
		return err
	}))
}

// tortureImage has every kind of entry over several layers.
func tortureImage(t *testing.T) []*image.Layer {
	t.Helper()
	layers := []*image.Layer{busybox(t)}
	for _, l := range torture.Layers() {
		layers = append(layers, layer(t, l.Entries...))
	}
	return layers
}

func TestEqualityTorture(t *testing.T) {
	t.Parallel()
	implied := torture.ImpliedParents()
	if len(implied) < 5 {
		t.Fatalf("the torture layers imply only %q", implied)
	}
	equality(t, comparison{
		ignore:  rootfs.DiffOptions{Times: implied, Owners: implied},
		correct: correctTorture,
	}, tortureImage(t)...)
}

func correctTorture(tree rootfs.Tree) {
	change := func(path string, how func(*rootfs.Entry)) {
		e := tree[path]
		how(&e)
		tree[path] = e
	}
	// Overlayfs shows the topmost layer's directory, and containerd's applier makes it
	// anew, at the time of the pull, where that layer has an entry below it but none for it.
	for path, mtime := range map[string]time.Time{
		".": torture.RootTime, "w": image.DefaultTime, "w/opaque-late": image.DefaultTime,
	} {
		change(path, func(e *rootfs.Entry) { e.MTime = mtime.UTC() })
	}
	// A whiteout of a directory that the same layer makes again hides what lay in the
	// lower one; containerd's applier drops the whiteout instead of marking it opaque.
	delete(tree, "w/again/old")
	// Without its index feature overlayfs counts a hardlink that an upper layer deleted.
	for _, path := range []string{"w/linked", "w/linked-3"} {
		change(path, func(e *rootfs.Entry) { e.Nlink = 2 })
	}
}

// The images of `make demo`: a Debian root and two pip installs.
func TestEqualityDemo(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: debootstrap and chroot do")
	}
	ctx := testContext(t)
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	base, err := set.Debian(ctx)
	must(t, err)
	app, err := set.App(ctx, 2)
	must(t, err)
	equality(t, comparison{ignore: rootfs.DiffOptions{RootTime: true}}, base, app)
}

// Sparse files in the formats that containerd's applier reads.
func TestEqualitySparse(t *testing.T) {
	t.Parallel()
	src := sparseFiles(t)
	layers := []*image.Layer{busybox(t)}
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		layers = append(layers, tarLayer(t, src, "sparse-"+version, "--format=posix", "--sparse-version="+version))
	}
	equality(t, comparison{ignore: rootfs.DiffOptions{RootTime: true}}, layers...)
}

func sparseFiles(t *testing.T) string {
	t.Helper()
	src := t.TempDir()
	for name, pieces := range map[string]map[int64]string{
		"middle":   {1 << 20: "in the middle"},
		"ends":     {0: "at the start", 3<<20 - 10: "at the end"},
		"hole-end": {4096: "then nothing"},
		"many":     {0: "a", 100 << 10: "b", 200 << 10: "c", 300 << 10: "d", 400 << 10: "e", 500 << 10: "f"},
		"nothing":  {},
	} {
		must(t, writeSparse(filepath.Join(src, name), pieces))
	}
	return src
}

// tarLayer is a layer that GNU tar made of a directory, under the name dir.
func tarLayer(t *testing.T, src, dir string, flags ...string) *image.Layer {
	t.Helper()
	l, err := image.NewLayer(t.TempDir(), image.LayerOptions{}, func(w io.Writer) error {
		args := append([]string{"--sparse", "--hole-detection=seek", "-C", src, "--sort=name",
			"--transform=s,^\\.," + dir + ",", "-cf", "-"}, flags...)
		cmd := exec.Command("tar", append(args, ".")...)
		cmd.Stdout, cmd.Stderr = w, os.Stderr
		return cmd.Run()
	})
	must(t, err)
	return l
}

func writeSparse(path string, pieces map[int64]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(3 << 20); err != nil {
		return err
	}
	for at, text := range pieces {
		if _, err := f.WriteAt([]byte(text), at); err != nil {
			return err
		}
	}
	return f.Sync() // so that the holes are known
}

// What images may hold and containerd's applier refuses: a hardlink to a file of a lower
// layer (it finds no target), and GNU tar's own sparse format (it does not know it).
func TestBeyondOverlayfs(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, exact), startRegistry(t)
	src := sparseFiles(t)
	ref := push(t, r, "beyond/overlayfs:1", busybox(t),
		layer(t, image.Dir("d"), image.File("d/target", "of a lower layer")),
		layer(t, image.Hardlink("d/link", "d/target")),
		tarLayer(t, src, "sparse", "--format=gnu"))
	pull(t, n, node.Snapshotter, ref)
	tree := dump(t, n, node.Snapshotter, ref)
	if got := tree["d/link"]; got.SHA256 != tree["d/target"].SHA256 || got.SHA256 == "" {
		t.Errorf("d/link is %+v, want the bytes of d/target", got)
	}
	if a, b := tree["d/link"].Group, tree["d/target"].Group; a == "" || a != b {
		t.Errorf("d/link and d/target are in the hardlink groups %q and %q, want one", a, b)
	}
	want, err := rootfs.Dump(src)
	must(t, err)
	for name, w := range want {
		if got := tree[filepath.Join("sparse", name)]; got.Type != w.Type || got.Size != w.Size || got.SHA256 != w.SHA256 {
			t.Errorf("sparse/%s is %+v, want %+v", name, got, w)
		}
	}
}
