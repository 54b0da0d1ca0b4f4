package integration

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// freshDisk mounts an ext4 of its own, whose free space nobody else changes.
func freshDisk(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a file system")
	}
	dir, err := os.MkdirTemp("", "disk-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	file, target := filepath.Join(dir, "image"), filepath.Join(dir, "fs")
	must(t, errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 16<<30), os.Mkdir(target, 0o700)))
	mkfs, err := node.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("needs mkfs.ext4 (e2fsprogs)")
	}
	out, err := exec.CommandContext(testContext(t), mkfs, "-q", "-F", "-E",
		"lazy_itable_init=0,lazy_journal_init=0,nodiscard", file).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	m := mount.Mount{Type: "ext4", Source: file, Options: []string{"loop"}}
	must(t, m.Mount(target))
	t.Cleanup(func() { must(t, mount.UnmountAll(target, 0)) })
	return target
}

// diskUsed is what a file system says that it holds, once that no longer changes.
func diskUsed(t *testing.T, disk string) (bytes int64) {
	t.Helper()
	fd, err := unix.Open(disk, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	for last, same := int64(-1), 0; same < 3; last = bytes {
		must(t, unix.Syncfs(fd))
		var st unix.Statfs_t
		must(t, unix.Fstatfs(fd, &st))
		if bytes = int64(st.Blocks-st.Bfree) * st.Bsize; bytes == last {
			same++
		} else {
			same = 0
		}
		must(t, testContext(t).Err())
		time.Sleep(100 * time.Millisecond)
	}
	return bytes
}

type usedSpace struct{ Bytes, Inodes int64 }

type usedStore struct {
	usedSpace
	Objects     usedSpace
	ChainImages usedSpace `json:"chain_images"`
}

// analyzed is what the tests read of `dedupctl analyze --json`.
type analyzed struct {
	Images     []struct{ Names []string }
	Layers     int64
	DiffIDs    int64 `json:"diff_ids"`
	Now        usedSpace
	Layer      usedSpace
	File       usedStore
	Python     usedStore
	InUse      usedSpace `json:"in_use"`
	Blobs      usedSpace
	Containers int64
	Writable   usedSpace
	Duplicates []struct{ Path string }
}

// migrated is what the tests read of `dedupctl migrate --json`.
type migrated struct {
	From, To string
	Images   []struct {
		Names        []string
		State, Error string
		Missing      []string
		BlobBytes    int64 `json:"blob_bytes"`
	}
	Removed      int64 `json:"removed_snapshots"`
	RemovedBytes int64 `json:"removed_bytes"`
	Kept         int64 `json:"kept_snapshots"`
	Containers   []string
}

// states of the images by their first name, and the result.
func migrate(t *testing.T, n *node.Node, wantErr bool, args ...string) (map[string]string, migrated) {
	t.Helper()
	args = append([]string{"migrate", "--containerd-address", n.Address(), "--json"}, args...)
	out, err := dedupctl(t, n, args...)
	if (err != nil) != wantErr {
		t.Fatalf("dedupctl %q: %v: %s", args, err, out)
	}
	var m migrated
	must(t, json.NewDecoder(strings.NewReader(out)).Decode(&m))
	states := map[string]string{}
	for _, i := range m.Images {
		_, name, _ := strings.Cut(i.Names[0], "/")
		states[name] = i.State
		if i.Error != "" {
			t.Log(i.Names, i.Error)
		}
	}
	return states, m
}

func migrateText(t *testing.T, n *node.Node, args ...string) string {
	t.Helper()
	out, _ := dedupctl(t, n, append([]string{"migrate", "--containerd-address", n.Address()}, args...)...)
	return out
}

// What analyze says of a real containerd's overlayfs is what migrating it saves, on the disk, within 2 %.
func TestAnalyzePredictsMigration(t *testing.T) {
	t.Parallel()
	base, images := migrationImages(t)
	disk := freshDisk(t)
	n, r := startNode(t, node.Options{Parent: disk}), startRegistry(t)
	ctx := testContext(t)
	var refs []string
	for name, layers := range images {
		refs = append(refs, pushDemo(t, r, name, append([]*image.Layer{base}, layers...)...))
		pull(t, n, "overlayfs", refs[len(refs)-1])
	}
	// The base stays in use by a container, and another namespace has it as well.
	used := pushDemo(t, r, "used:1", base)
	pull(t, n, "overlayfs", used)
	_, err := n.RunDetached(ctx, "overlayfs", used, "sleep", "1000")
	must(t, err)
	must(t, n.Pull(namespaces.WithNamespace(ctx, "elsewhere"), "overlayfs", used))

	before := diskUsed(t, disk)
	var a analyzed
	out, err := dedupctl(t, n, "analyze", "--json", filepath.Join(n.Dir(), "c"))
	if err != nil {
		t.Fatal(err, out)
	}
	must(t, json.Unmarshal([]byte(out), &a))
	// containerd writes a little, to its log
	if again := diskUsed(t, disk); again-before > 256<<10 || before-again > 256<<10 {
		t.Errorf("analyze changed the disk by %d bytes", again-before)
	}
	if len(a.Images) != len(images)+2 || a.Containers != 1 || a.InUse.Bytes <= 0 || a.Layers != a.DiffIDs+1 {
		t.Errorf("%+v", a)
	}
	if a.Layer.Bytes >= a.Now.Bytes || a.File.Bytes >= a.Layer.Bytes || a.Python.Bytes >= a.File.Bytes {
		t.Errorf("by layer %d, by file %d, with Python %d of %d bytes", a.Layer.Bytes, a.File.Bytes, a.Python.Bytes,
			a.Now.Bytes)
	}
	if len(a.Duplicates) == 0 || !strings.HasSuffix(a.Duplicates[0].Path, "-packages") {
		t.Errorf("most duplicates are not where packages are: %+v", a.Duplicates)
	}

	must(t, n.StartDaemon(ctx))
	states, m := migrate(t, n, false, "--all-namespaces", "--remove-old")
	t.Log(states)
	if m.Kept != 1 || len(m.Containers) != 1 || m.Removed != a.Layers-1 {
		t.Errorf("%+v", m)
	}
	// Where packs are merged after chain images were built, these go, and are built again when they are used.
	settle(t, n)
	for _, ref := range append(refs, used) {
		must(t, n.View(ctx, node.Snapshotter, ref, func(string) error { return nil }))
	}
	eventually(t, "the chain images", func() bool { // they are built in the background
		built, err := filepath.Glob(filepath.Join(n.DedupRoot(), "chains", "*.erofs"))
		must(t, err)
		return int64(len(built)) == a.Python.ChainImages.Inodes
	})
	settle(t, n)
	after := diskUsed(t, disk)
	saved := before - after
	predicted := a.Now.Bytes - a.InUse.Bytes - a.Python.Bytes
	off := 100 * float64(predicted-saved) / float64(saved)
	t.Logf("predicted %d bytes, saved %d: off by %.2f %%; now %d, in use %d, python %d; "+
		"disk before %d, after %d; store %d",
		predicted, saved, off, a.Now.Bytes, a.InUse.Bytes, a.Python.Bytes, before, after, usage(t, n.DedupRoot()).Bytes)
	if saved <= 0 || off < -2 || off > 2 {
		t.Errorf("predicted %d bytes, saved %d: off by %.2f %%", predicted, saved, off)
	}
}

// migrationImages are real pip installs: two, or the whole fleet.
func migrationImages(t *testing.T) (base *image.Layer, images map[string][]*image.Layer) {
	t.Helper()
	base, apps := demoImages(t)
	images = map[string][]*image.Layer{"one:1": {apps[0]}, "two:1": {apps[1]},
		"deep:1": {apps[0], layer(t, payload("deep", "own", 1<<20))}}
	if os.Getenv("DEDUP_LONG") == "" {
		return base, images
	}
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	fleet, err := set.Fleet(testContext(t))
	must(t, err)
	for _, release := range fleet {
		images[release.Service+":"+string(rune('0'+release.Number))] = []*image.Layer{release.Layer}
	}
	return base, images
}

// Images of overlayfs are migrated while a container runs, run from dedup, and go back.
func TestMigrate(t *testing.T) {
	t.Parallel()
	versions := []string{node.DefaultVersion, "1.7.35"}
	if os.Getenv("DEDUP_LONG") != "" {
		var err error
		versions, err = node.Versions()
		must(t, err)
	}
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			migratesAndGoesBack(t, node.Options{Version: version})
		})
	}
}

func migratesAndGoesBack(t *testing.T, opts node.Options) {
	n, r := startDedup(t, opts), startRegistry(t)
	ctx := testContext(t)
	busyboxes, data := busyboxTwice(t), dataLayer(t)
	own, other := layer(t, payload("migrate", "own", 20_000)), layer(t, payload("migrate", "other", 20_000))
	refs := map[string]string{
		"one:1":     push(t, r, "one:1", busyboxes[0], data),
		"two:1":     push(t, r, "two:1", busyboxes[0], data, own),
		"zstd:1":    push(t, r, "zstd:1", busyboxes[1], data),
		"partial:1": push(t, r, "partial:1", busyboxes[0], other),
	}
	// zstd comes last: containerd does not fetch a blob for a snapshot that is there.
	for _, name := range slices.Sorted(maps.Keys(refs)) {
		pull(t, n, "overlayfs", refs[name])
	}
	running, err := n.RunDetached(ctx, "overlayfs", refs["one:1"], "sh", "-c", reader)
	must(t, err)
	pid := pidOf(t, n, running)
	// zstd lacks what others bring, partial what nobody has.
	forget(t, n, ctx, []*image.Layer{busyboxes[1], other})

	must(t, n.StopDaemon())
	if out := migrateText(t, n); !strings.Contains(out, "systemctl start containerd-dedup-grpc") {
		t.Errorf("without the daemon: %s", out)
	}
	must(t, n.StartDaemon(ctx))
	migratesPartly(t, n, refs)
	readsOn(t, n, pid)
	runsFrom(t, n, node.Snapshotter, refs)

	states, m := migrate(t, n, false, "--remove-old", "--dry-run")
	if m.Removed != 2 || m.Kept != 2 || m.RemovedBytes < 40_000 || snapshotsOf(t, n, "overlayfs") != 4 {
		t.Errorf("dry run: %v, %+v", states, m)
	}
	if states, m = migrate(t, n, false, "--remove-old", refs["two:1"]); len(states) != 1 || m.Removed != 1 ||
		m.Kept != 2 || m.RemovedBytes < 20_000 {
		t.Errorf("one image: %v, %+v", states, m)
	}
	states, m = migrate(t, n, false, "--remove-old")
	if m.Removed != 1 || m.Kept != 2 || m.RemovedBytes < 20_000 ||
		!slices.Equal(m.Containers, []string{node.Namespace + "/" + running}) {
		t.Errorf("while a container runs: %v, %+v", states, m)
	}
	readsOn(t, n, pid)
	must(t, n.RemoveContainer(ctx, running))
	forget(t, n, ctx, nil)
	if left := snapshotsOf(t, n, "overlayfs"); left != 0 {
		t.Errorf("overlayfs still has %d snapshots", left)
	}
	runsFrom(t, n, node.Snapshotter, refs)
	if out := migrateText(t, n); !strings.Contains(out, "overlayfs has unpacked no images there: nothing to do") {
		t.Error(out)
	}
	goesBack(t, n, refs)
}

// busyboxTwice are two blobs of one tar.
func busyboxTwice(t *testing.T) (l [2]*image.Layer) {
	t.Helper()
	entries, err := inputs.Busybox(testContext(t), nil)
	must(t, err)
	for i, c := range []image.Compression{image.Gzip, image.Zstd} {
		l[i], err = image.FromEntries(t.TempDir(), image.LayerOptions{Compression: c}, entries...)
		must(t, err)
	}
	return l
}

// migratesPartly migrates what can be, completes the rest as it is told, and migrates that.
func migratesPartly(t *testing.T, n *node.Node, refs map[string]string) {
	t.Helper()
	for _, row := range []struct {
		args []string
		want map[string]string
	}{
		{[]string{"--dry-run"}, map[string]string{"one:1": "to migrate", "two:1": "to migrate", "zstd:1": "to migrate",
			"partial:1": "incomplete"}},
		{nil, map[string]string{"one:1": "migrated", "two:1": "migrated", "zstd:1": "migrated", "partial:1": "incomplete"}},
		{nil, map[string]string{"one:1": "present", "two:1": "present", "zstd:1": "present", "partial:1": "incomplete"}},
	} {
		states, m := migrate(t, n, true, row.args...)
		if d := cmp.Diff(row.want, states); d != "" || m.Removed != 0 {
			t.Errorf("migrate %q (-want +got):\n%s\n%+v", row.args, d, m)
		}
	}
	out := migrateText(t, n)
	hint := "dedupctl complete --namespace default " + refs["partial:1"]
	if !strings.Contains(out, hint) || !strings.Contains(out, "1 image of 4 not migrated") ||
		!strings.Contains(out, "migrate --remove-old removes") {
		t.Errorf("%q is not in\n%s", hint, out)
	}
	if out, err := dedupctl(t, n, "complete", "--containerd-address", n.Address(), "--plain-http", "--hosts-dir", "",
		refs["partial:1"]); err != nil {
		t.Fatal(err, out)
	}
	states, _ := migrate(t, n, false, refs["partial:1"])
	if d := cmp.Diff(map[string]string{"partial:1": "migrated"}, states); d != "" {
		t.Error(d)
	}
}

func goesBack(t *testing.T, n *node.Node, refs map[string]string) {
	t.Helper()
	running, err := n.RunDetached(testContext(t), node.Snapshotter, refs["one:1"], "sh", "-c", reader)
	must(t, err)
	pid := pidOf(t, n, running)
	states, m := migrate(t, n, false, "--undo", "--dry-run")
	if states["one:1"] != "to migrate" || states["zstd:1"] != "to migrate" || m.Removed != 2 || m.Kept != 2 ||
		m.RemovedBytes <= 0 {
		t.Errorf("dry run of undo: %v, %+v", states, m)
	}
	states, m = migrate(t, n, false, "--undo")
	if states["one:1"] != "migrated" || states["partial:1"] != "migrated" || m.Removed != 2 || m.Kept != 2 {
		t.Errorf("undo: %v, %+v", states, m)
	}
	readsOn(t, n, pid)
	must(t, n.RemoveContainer(testContext(t), running))
	forget(t, n, testContext(t), nil)
	if left := snapshotsOf(t, n, node.Snapshotter); left != 0 {
		t.Errorf("after undo dedup still has %d snapshots", left)
	}
	runsFrom(t, n, "overlayfs", refs)
}

// snapshotsOf counts the committed snapshots of a snapshotter.
func snapshotsOf(t *testing.T, n *node.Node, snapshotter string) (count int) {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	must(t, n.Client().SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			count++
		}
		return nil
	}))
	return count
}

// runsFrom runs a container of each image without unpacking any.
func runsFrom(t *testing.T, n *node.Node, snapshotter string, refs map[string]string) {
	t.Helper()
	before := snapshotsOf(t, n, snapshotter)
	for name, ref := range refs {
		var out string
		for range 3 { // a busy machine makes ctr 1.7 lose what a short container prints; wc always prints something
			var err error
			out, err = n.Run(testContext(t), snapshotter, ref, "sh", "-c", "cat /data/small-a /own /other 2>/dev/null | wc -c")
			must(t, err)
			if out != "" {
				break
			}
		}
		want := map[string]string{"one:1": "1\n", "zstd:1": "1\n", "two:1": "20001\n", "partial:1": "20000\n"}[name]
		if out != want {
			t.Errorf("%s from %s reads %q bytes, want %q", name, snapshotter, out, want)
		}
	}
	if after := snapshotsOf(t, n, snapshotter); after != before || before == 0 {
		t.Errorf("running made %d snapshots of %s of %d", after, snapshotter, before)
	}
}

func TestMigrateErrors(t *testing.T) {
	t.Parallel()
	n := startNode(t, node.Options{NoDedup: true})
	for _, row := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 1, `containerd has no snapshotter "dedup", only`},
		{[]string{"--to", "overlayfs"}, 2, `--from and --to are both "overlayfs"`},
		{[]string{"--undo", "--remove-old"}, 2, "leave --remove-old out"},
		{[]string{"--nonsense"}, 2, "see --help"},
		{[]string{"app:1", "--dry-run"}, 2, "--dry-run stands behind an argument"},
		{[]string{"--containerd-address", "/nowhere/sock"}, 1, "containerd does not run: no socket /nowhere/sock"},
		{[]string{"--to", "native", "none:1"}, 1, `no image "none:1" that overlayfs has unpacked`},
		{[]string{"--to", "native"}, 0, "overlayfs has unpacked no images there: nothing to do"},
		{[]string{"--to", "native", "--json"}, 0, `"images": []`},
	} {
		out, err := dedupctl(t, n, append([]string{"migrate", "--containerd-address", n.Address()}, row.args...)...)
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if code != row.code || !strings.Contains(out, row.want) {
			t.Errorf("migrate %q: exit code %d, want %d with %q: %s", row.args, code, row.code, row.want, out)
		}
	}
}
