package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// fsckReport is what `dedupctl fsck --json` prints.
type fsckReport struct {
	Findings []struct {
		Kind, Path, Problem, Hint string
		Damaged, Fixed            bool
		Images                    []struct{ Names []string }
	}
	Damaged, Unused, Fixed int
	Fetched                []struct{ Digest string }
}

// images are the names of all images that have damage.
func (r fsckReport) images() (names []string) {
	for _, f := range r.Findings {
		for _, i := range f.Images {
			names = append(names, i.Names...)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// fsck runs dedupctl fsck, and checks its exit code.
func fsck(t *testing.T, n *node.Node, code int, args ...string) (r fsckReport) {
	t.Helper()
	args = append([]string{"fsck", "--json", "--containerd-address", n.Address(), "--hosts-dir", "", "--plain-http"},
		args...)
	out, err := dedupctl(t, n, args...)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	}
	if got != code {
		t.Fatalf("dedupctl %q ends with %d, want %d: %s", args, got, code, out)
	}
	must(t, json.NewDecoder(strings.NewReader(out)).Decode(&r))
	return r
}

// flipByte changes one byte in the middle of a file.
func flipByte(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	b[len(b)/2] ^= 0x40
	must(t, os.WriteFile(path, b, 0o600))
}

// blobFile is a layer's blob in containerd's content store.
func blobFile(n *node.Node, l *image.Layer) string {
	return filepath.Join(n.Dir(), "c/io.containerd.content.v1.content/blobs/sha256", l.Hash.Hex)
}

func glob(t *testing.T, n *node.Node, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.DedupRoot(), pattern))
	must(t, err)
	if len(paths) == 0 {
		t.Fatalf("no %s", pattern)
	}
	return paths
}

// Everything that can be damaged on the disk is found while containerd goes on, the right images are named, and it is
// healed from where its bytes can still be had: the content store, the registry, or the next pull.
func TestFsck(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	reg := startRegistry(t)
	ctx := testContext(t)
	shared, own := payload("fsck", "shared", 9000), payload("fsck", "own", 9000)
	w := &fsckWorld{n: n, ctx: ctx, shared: shared.Content, own: own.Content,
		base: busybox(t), sharedLayer: layer(t, shared, payload("fsck", "more", 9000)), ownLayer: layer(t, own)}
	w.refs = []string{push(t, reg, "a:1", w.base, w.sharedLayer), push(t, reg, "b:1", w.base, w.sharedLayer, w.ownLayer),
		push(t, reg, "c:1", w.base)}
	for _, ref := range w.refs {
		pull(t, n, node.Snapshotter, ref)
		w.want = append(w.want, dump(t, n, node.Snapshotter, ref))
	}
	var err error
	w.container, err = n.RunDetached(ctx, node.Snapshotter, w.refs[2], "sleep", "1000")
	must(t, err)
	w.intact(t)
	w.repairsFromContentStore(t)
	w.repairsFromRegistry(t)
	w.livesWithDamage(t)
	must(t, n.RemoveContainer(ctx, w.container))
}

// fsckWorld is three images that share layers, and a container of the last one.
type fsckWorld struct {
	n           *node.Node
	ctx         context.Context
	shared, own string // payloads: of two images, of one
	refs        []string
	want        []rootfs.Tree // of refs
	container   string

	base, sharedLayer, ownLayer *image.Layer
}

// object returns where a payload is stored.
func (w *fsckWorld) object(t *testing.T, payload string) stored { return payloadOf(t, w.n, payload) }

// intact expects that nothing is wrong.
func (w *fsckWorld) intact(t *testing.T) {
	t.Helper()
	if r := fsck(t, w.n, 0); len(r.Findings) > 0 {
		t.Errorf("not whole: %+v", r.Findings)
	}
	for i, ref := range w.refs {
		equal(t, w.want[i], dump(t, w.n, node.Snapshotter, ref), rootfs.DiffOptions{})
	}
	if out, err := w.n.Exec(w.ctx, w.container, "echo", "alive"); err != nil || out != "alive\n" {
		t.Errorf("the running container: %q, %v", out, err)
	}
}

// damages returns what happens to the store, and which images it harms.
func (w *fsckWorld) damages(t *testing.T) map[string]fsckDamage {
	of := func(i ...int) (names []string) {
		for _, i := range i {
			names = append(names, w.refs[i])
		}
		return names
	}
	return map[string]fsckDamage{
		"an object that two images share": {func() { w.object(t, w.shared).flip(t) }, of(0, 1)},
		"an object of one image":          {func() { w.object(t, w.own).write(t, make([]byte, 5000)) }, of(1)},
		"a pack is gone":                  {func() { must(t, os.Remove(w.object(t, w.own).path)) }, of(1)},
		"an object has another one's bytes": {func() {
			w.object(t, w.own).write(t, w.object(t, w.shared).read(t))
		}, of(1)},
		"many objects": {func() {
			for _, p := range payloads(t, w.n) {
				// The running container goes on with the pack that it has, and so would with a flipped one.
				if !bytes.HasPrefix(p.read(t), []byte("\x7fELF")) {
					p.flip(t)
				}
			}
		}, of(0, 1)},
		"all trees": {func() {
			for _, path := range glob(t, w.n, "layers/*") {
				flipByte(t, path)
			}
		}, of(0, 1, 2)},
		"trees are gone": {func() {
			for _, path := range glob(t, w.n, "layers/*") {
				must(t, os.Remove(path))
			}
		}, of(0, 1, 2)},
		"chain images": {func() {
			for _, path := range glob(t, w.n, "chains/*.erofs") {
				flipByte(t, path)
			}
		}, of(0, 1, 2)},
	}
}

type fsckDamage struct {
	do     func()
	images []string
}

// repairsFromContentStore tries each damage while containerd has the blobs.
func (w *fsckWorld) repairsFromContentStore(t *testing.T) {
	t.Helper()
	for name, d := range w.damages(t) {
		d.do()
		r := fsck(t, w.n, 3)
		if got := r.images(); !slices.Equal(got, slices.Sorted(slices.Values(d.images))) {
			t.Errorf("%s: harms %q, want %q", name, got, d.images)
		}
		r = fsck(t, w.n, 0, "--repair")
		if r.Damaged > 0 || r.Fixed == 0 || len(r.Fetched) > 0 {
			t.Errorf("%s: repaired from the content store: %+v", name, r)
		}
		w.intact(t)
	}
}

// repairsFromRegistry removes the blobs from the content store, then damages one there.
func (w *fsckWorld) repairsFromRegistry(t *testing.T) {
	t.Helper()
	forget(t, w.n, w.ctx, []*image.Layer{w.base, w.sharedLayer, w.ownLayer})
	w.object(t, w.shared).flip(t)
	w.object(t, w.own).flip(t)
	fsck(t, w.n, 3, "--repair", "--no-fetch")
	out, err := w.n.Run(w.ctx, node.Snapshotter, w.refs[1], "true")
	if err == nil || !strings.Contains(err.Error()+out, "dedupctl fsck --repair") {
		t.Errorf("a container of a damaged image: %q, %v", out, err)
	}
	if out, err := dedupctl(t, w.n, "fsck"); err == nil || !strings.Contains(out, "b:1") ||
		!strings.Contains(out, "what to do:") {
		t.Errorf("dedupctl fsck says %q, %v", out, err)
	}
	if r := fsck(t, w.n, 0, "--repair"); len(r.Fetched) < 2 {
		t.Errorf("fetched %+v", r.Fetched)
	}
	w.intact(t)
	w.object(t, w.own).flip(t)
	flipByte(t, blobFile(w.n, w.ownLayer))
	if r := fsck(t, w.n, 0, "--repair"); len(r.Fetched) != 1 {
		t.Errorf("fetched %+v", r.Fetched)
	}
	w.intact(t)
}

// livesWithDamage restarts with known damage, and removes an image that nothing can repair.
func (w *fsckWorld) livesWithDamage(t *testing.T) {
	t.Helper()
	// Known damage survives a restart; whoever needs the layer heals it where its blob is at hand.
	w.object(t, w.shared).flip(t)
	fsck(t, w.n, 3)
	must(t, w.n.StopDaemon())
	must(t, w.n.StartDaemon(w.ctx))
	if out, err := w.n.Run(w.ctx, node.Snapshotter, w.refs[0], "cat", "/shared"); err != nil {
		t.Errorf("a container heals its image: %q, %v", out, err)
	}
	w.intact(t)

	// Nothing to be had anywhere: the image is removed and pulled again.
	forget(t, w.n, w.ctx, []*image.Layer{w.ownLayer})
	must(t, os.Remove(w.object(t, w.own).path))
	fsck(t, w.n, 3, "--repair", "--no-fetch")
	_, err := w.n.Ctr(w.ctx, "image", "rm", "--sync", w.refs[1])
	must(t, err)
	pull(t, w.n, node.Snapshotter, w.refs[1])
	w.intact(t)
}

// What nothing uses is listed, and removed by gc: files, directories and mounts.
func TestGC(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	ref := push(t, startRegistry(t), "app:1", busybox(t))
	pull(t, n, node.Snapshotter, ref)
	run := func(args ...string) (r struct {
		Removed []struct{ Kind, Path string }
		Bytes   int64
	}) {
		t.Helper()
		out, err := dedupctl(t, n, append([]string{"gc", "--json"}, args...)...)
		must(t, err)
		must(t, json.Unmarshal([]byte(out), &r))
		return r
	}
	waitForChain(t, n)
	settle(t, n) // containerd's own garbage collection after the pull has the daemon clean up, too
	if r := run(); len(r.Removed) > 0 {
		t.Errorf("removed %+v from a store without garbage", r)
	}
	must(t, n.StopContainerd()) // its garbage collection would have the daemon clean up
	stray := []string{
		filepath.Join(n.DedupRoot(), "packs", content.PackID(0xabc).String()+".erofs"),
		filepath.Join(n.DedupRoot(), "snapshots/4711/fs/file"),
		filepath.Join(n.DedupRoot(), "chains", strings.Repeat("d", 64)+".erofs"),
		filepath.Join(n.DedupRoot(), "layers", strings.Repeat("e", 64)),
	}
	for _, path := range stray {
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, make([]byte, 5000), 0o600))
	}
	loop, err := exec.Command("losetup", "--find", "--show", "--read-only", glob(t, n, "chains/*.erofs")[0]).Output()
	must(t, err)
	stray = append(stray, "/sys/block/"+filepath.Base(strings.TrimSpace(string(loop)))+"/loop")
	if r := fsck(t, n, 0); r.Unused != len(stray) || r.Damaged != 0 {
		t.Errorf("fsck finds %+v", r)
	}
	if r := run("--dry-run"); len(r.Removed) != len(stray) || r.Bytes < 20000 {
		t.Errorf("would remove %+v", r)
	}
	for _, path := range stray {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if r := run(); len(r.Removed) != len(stray) {
		t.Errorf("removed %+v", r)
	}
	for _, path := range stray {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	if r := run("--chain-images"); len(r.Removed) != 1 {
		t.Errorf("removed %+v, want the chain image", r)
	}
	must(t, n.StartContainerd(testContext(t)))
	if out, err := n.Run(testContext(t), node.Snapshotter, ref, "echo", "fine"); err != nil || out != "fine\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// waitForChain waits for the chain image that is built in the background.
func waitForChain(t *testing.T, n *node.Node) {
	t.Helper()
	for range 2400 {
		if found, _ := filepath.Glob(filepath.Join(n.DedupRoot(), "chains/*.erofs")); len(found) > 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("no chain image was built")
}
