package integration

import (
	"crypto/md5"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// nearlyEqual are two layers of 20 MB, which differ in one file of fifty and in all mtimes.
func nearlyEqual(t *testing.T) (layers [2]*image.Layer) {
	t.Helper()
	for i := range layers {
		entries := []image.Entry{image.Dir("app")}
		for n := range 50 {
			seed := fmt.Sprint("common", n)
			if n == 0 {
				seed = fmt.Sprint("own", i)
			}
			e := payload(seed, fmt.Sprint("app/", n), 400<<10)
			e.Time = image.DefaultTime.Add(time.Duration(i+1) * time.Hour)
			entries = append(entries, e)
		}
		layers[i] = layer(t, entries...)
	}
	return layers
}

// loopDevices are the files that loop devices here lie over, below a directory.
func loopDevices(t *testing.T, dir string) (files []string) {
	t.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, file := range all {
		b, err := os.ReadFile(file)
		if err == nil && strings.HasPrefix(string(b), dir) {
			files = append(files, strings.TrimSpace(string(b)))
		}
	}
	return files
}

// erofsMounts counts the EROFS mounts whose mount point is below a directory.
func erofsMounts(t *testing.T, dir string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " "+dir) && strings.Contains(line, " - erofs ") {
			n++
		}
	}
	return n
}

// What a kernel makes of two images that are nearly equal: the mode, and the disk, in lines that begin with "row: ".
func TestKernelNode(t *testing.T) {
	n, r := startNode(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	if f, err := lower.Examine(n.DedupRoot()); err == nil && f.Erofs != nil {
		err := n.StartDaemon(ctx)
		if err == nil || !strings.Contains(n.Logs(60), "does not mount EROFS images over packs") {
			t.Fatalf("a kernel that cannot serve is not refused: %v", err)
		}
		t.Logf("row: mode=refused, %v", f.Erofs)
		return
	}
	f, err := lower.Examine(n.DedupRoot())
	must(t, err)
	t.Logf("row: mode=%s", f.Mode())
	must(t, n.StartDaemon(ctx))
	base, apps := busybox(t), nearlyEqual(t)
	var disk [2][]string
	for i, app := range apps {
		ref := push(t, r, fmt.Sprint("nearly:", i), base, app)
		for k, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
			pull(t, n, snapshotter, ref)
			disk[k] = append(disk[k], diskOf(t, n, snapshotter))
		}
		equal(t, dump(t, n, "overlayfs", ref), dump(t, n, node.Snapshotter, ref), noRootTime)
	}
	t.Logf("row: disk dedup=%s", strings.Join(disk[0], ", "))
	t.Logf("row: disk overlayfs=%s", strings.Join(disk[1], ", "))
}

// diskOf is what a snapshotter takes on the disk.
func diskOf(t *testing.T, n *node.Node, snapshotter string) string {
	t.Helper()
	used, err := rootfs.Usage(n.SnapshotterRoot(snapshotter))
	must(t, err)
	return fmt.Sprintf("%.1f MB", float64(used.Bytes)/1e6)
}

// With fs-verity, an image is not served from another file than its pack, even if only a payload's bytes differ: the
// daemon takes the right ones from containerd's content store, or says that the layer is damaged. fsck heals it.
func TestKernelVerity(t *testing.T) {
	n, r := startNode(t, node.Options{Daemon: map[string]any{"verity": "on"}}), startRegistry(t)
	ctx := testContext(t)
	f, err := lower.Examine(n.DedupRoot())
	must(t, err)
	if f.Verity != nil {
		t.Skipf("needs fs-verity (ext4 with the feature verity): %v", f.Verity)
	}
	must(t, n.StartDaemon(ctx))
	file := payload("verity", "file", 50000)
	ref := push(t, r, "verity:1", busybox(t), layer(t, file))
	pull(t, n, node.Snapshotter, ref)
	want := dump(t, n, node.Snapshotter, ref)
	unmounted(t, n)
	right := payloadOf(t, n, file.Content)
	whole, err := os.ReadFile(right.path)
	must(t, err)
	whole[right.at+right.size/2] ^= 1 // the trailer says nothing of payloads
	must(t, os.WriteFile(right.path+".other", whole, 0o400))
	must(t, os.Rename(right.path+".other", right.path))
	sum := fmt.Sprintf("%x  /file\n", md5.Sum([]byte(file.Content)))
	if out, err := n.Run(ctx, node.Snapshotter, ref, "md5sum", "/file"); err == nil && out != sum {
		t.Errorf("served from another pack: %s, want %s", out, sum)
	}
	if !strings.Contains(n.Logs(60), "not the pack that the chain image was built for") {
		t.Error("the daemon does not say that it saw another pack")
	}
	fsck(t, n, 0, "--repair")
	equal(t, want, dump(t, n, node.Snapshotter, ref), rootfs.DiffOptions{})
	if out, err := n.Run(ctx, node.Snapshotter, ref, "echo", "fine"); err != nil || out != "fine\n" {
		t.Errorf("healed: %q, %v", out, err)
	}
}

// unmounted waits until nothing has an image mounted, nor a loop device.
func unmounted(t *testing.T, n *node.Node) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Minute)
	for loopDevices(t, n.Dir()) != nil || erofsMounts(t, n.Dir()) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("still there: %d EROFS mounts, loop devices %q", erofsMounts(t, n.Dir()), loopDevices(t, n.Dir()))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Many images and containers at a time: loop devices are shared where there are any, and everything is back after
// removal, also where the daemon was killed meanwhile. On a tmpfs every kernel needs loop devices.
func TestManyImages(t *testing.T) {
	images, containers := 6, 3
	if scale := os.Getenv("DEDUP_SCALE"); scale != "" {
		if _, err := fmt.Sscanf(scale, "%d,%d", &images, &containers); err != nil {
			t.Fatalf("DEDUP_SCALE=%s: want images,containers", scale)
		}
	}
	for _, row := range []struct{ name, cache string }{{"disk", ""}, {"tmpfs", "shared"}, {"tmpfs", "private"}} {
		t.Run(strings.TrimSpace(row.name+" "+row.cache), func(t *testing.T) {
			manyImages(t, row.name, row.cache, images, containers)
		})
	}
}

func manyImages(t *testing.T, disk, cache string, images, containers int) {
	opts := node.Options{Daemon: map[string]any{}}
	if cache != "" {
		opts.Daemon["page_cache"] = cache
	}
	if disk == "tmpfs" {
		opts.Parent = onTmpfs(t)
	}
	n, r := startNode(t, opts), startRegistry(t)
	f, err := lower.Examine(n.DedupRoot())
	must(t, err)
	if cache == "shared" && f.DataOnly != nil {
		t.Skip(f.DataOnly)
	}
	must(t, n.StartDaemon(testContext(t)))
	base := busybox(t)
	var refs []string
	start := time.Now()
	for i := range images {
		own := layer(t, payload(fmt.Sprint("many", i), "file", 20000))
		refs = append(refs, push(t, r, fmt.Sprint("many:", i), base, own))
		pull(t, n, node.Snapshotter, refs[i])
		progress(t, start, "pulled", i+1)
	}
	var ids []string
	start = time.Now()
	for i := range containers {
		id, err := n.RunDetached(testContext(t), node.Snapshotter, refs[i%images], "sleep", "100000")
		must(t, err)
		ids = append(ids, id)
		progress(t, start, "started", i+1)
	}
	each := time.Since(start) / time.Duration(max(1, containers))
	devices := loopDevices(t, n.Dir())
	t.Logf("row: scale=%d images, %d containers on %s, mode %s (page_cache %q): "+
		"%d EROFS mounts, %d loop devices, %d ms a start", images, containers, disk,
		f.Mode(), cache, erofsMounts(t, n.Dir()), len(devices), each.Milliseconds())
	if f.Loop == (len(devices) == 0) {
		t.Errorf("loop devices: %q", devices)
	}
	sharedOnly(t, devices, f.DataOnly == nil && cache != "private")
	must(t, n.KillDaemon())
	must(t, n.StartDaemon(testContext(t)))
	if after := loopDevices(t, n.Dir()); len(after) != len(devices) {
		t.Errorf("%d loop devices before the daemon was killed, %d after", len(devices), len(after))
	}
	start = time.Now()
	for i, id := range ids {
		must(t, n.RemoveContainer(testContext(t), id))
		progress(t, start, "removed containers", i+1)
	}
	start = time.Now()
	for i, ref := range refs {
		_, err := n.Ctr(testContext(t), "image", "rm", "--sync", ref)
		must(t, err)
		progress(t, start, "removed images", i+1)
	}
	unmounted(t, n)
}

// progress tells each ten, for a test that takes long under emulation.
func progress(t *testing.T, start time.Time, what string, n int) {
	t.Helper()
	if n%10 == 0 {
		t.Logf("%s %d in %s", what, n, time.Since(start).Round(time.Second))
	}
}

// sharedOnly fails the test if a file has more loop devices than it needs: a pack that is mounted has one for chain
// images, and one of its own.
func sharedOnly(t *testing.T, devices []string, mountedPacks bool) {
	t.Helper()
	most := 1
	if mountedPacks {
		most = 2
	}
	count := map[string]int{}
	for _, d := range devices {
		if count[d]++; count[d] == most+1 {
			t.Errorf("more than %d loop devices over %s", most, d)
		}
	}
}

// onTmpfs mounts a tmpfs, from whose files no kernel mounts EROFS.
func onTmpfs(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2g"))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount the tmpfs: %v", err)
		}
	})
	return dir
}
