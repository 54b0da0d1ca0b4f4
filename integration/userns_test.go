package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// ownedImage is an image with owners of all kinds, in two layers.
func ownedImage(t *testing.T, name string) []*image.Layer {
	own := func(e image.Entry, uid, gid int) image.Entry {
		e.UID, e.GID = uid, gid
		return e
	}
	return []*image.Layer{busybox(t), layer(t,
		own(image.Dir("app"), 1, 2), own(image.File("app/owned", "owned"), 7, 8),
		own(image.File("app/high", "high"), 65534, 65535),
		own(payload(name, "app/file", 9000), 3, 4), own(image.Symlink("app/link", "file"), 5, 6), image.Dir("etc"),
		image.File("etc/passwd", "root:x:0:0::/:/bin/sh\nsomeone:x:1234:1235::/:/bin/sh\n"),
		image.File("etc/group", "root:x:0:\nsome:x:1235:\n"),
	)}
}

// reachable lets root of a user namespace get to its root file system.
func reachable(t *testing.T, n *node.Node) {
	for _, dir := range []string{n.Dir(), filepath.Join(n.Dir(), "s")} {
		must(t, os.Chmod(dir, 0o711))
	}
}

// listOwners prints the owner of every entry that an image has.
const listOwners = "cat /proc/self/uid_map | tr -s ' '; find / -xdev | sort | xargs stat -c '%u:%g %a %F %n' | " +
	"grep -v -e ' /proc' -e ' /sys' -e ' /dev' -e ' /etc/resolv.conf' -e ' /run'; sha256sum /app/file"

// A container in a user namespace sees the owners that it sees with overlayfs: where containerd maps them by itself,
// which each 2.x does in its own way, and where it makes a copy.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			userNamespace(t, node.Options{Version: version})
		})
	}
	t.Run("no remap-ids", func(t *testing.T) {
		t.Parallel()
		userNamespace(t, node.Options{NoRemapIDs: true})
	})
}

func userNamespace(t *testing.T, opts node.Options) {
	// Nothing holds the copy that ctr has made for a mapping until its container is there: a garbage collection, a while
	// after the container before has gone, takes it, with any snapshotter. This lets more than an hour pass.
	opts.Plugins = map[string]map[string]any{"io.containerd.gc.v1.scheduler": {"pause_threshold": 1e-6}}
	n, r := startDedup(t, opts), startRegistry(t)
	ctx := testContext(t)
	reachable(t, n)
	ref := push(t, r, "userns:1", ownedImage(t, "userns")...)
	see := func(snapshotter, command string, flags ...string) string {
		t.Helper()
		out, err := n.RunWith(ctx, snapshotter, flags, ref, "sh", "-c", command)
		must(t, err)
		return out
	}
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, ref)
	}
	write := "; echo new > /app/owned; echo new > /app/new; chown 9:9 /app/high; stat -c '%u:%g %n' /app/*; cat /app/owned"
	mapped := []string{"--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"}
	for _, flags := range [][]string{mapped, append([]string{"--remap-labels"}, mapped...)} {
		want := see("overlayfs", listOwners+write, flags...)
		if !strings.Contains(want, "100000") || !strings.Contains(want, "7:8") {
			t.Fatalf("nothing is mapped here: %s", want)
		}
		if diff := cmp.Diff(want, see(node.Snapshotter, listOwners+write, flags...)); diff != "" {
			t.Errorf("in a user namespace, %v (-overlayfs +dedup):\n%s", flags, diff)
		}
	}
	// Before 2.3 containerd looks users up in mounts that it has made read-only.
	named := append([]string{"--remap-labels", "--user", "someone"}, mapped...)
	if got := see(node.Snapshotter, "id -u; id -g", named...); got != "1234\n1235\n" {
		t.Errorf("a user by name is %q", got)
	}
	if diff := cmp.Diff(see("overlayfs", listOwners), see(node.Snapshotter, listOwners)); diff != "" {
		t.Errorf("without one, afterwards (-overlayfs +dedup):\n%s", diff)
	}
	objectsUntouched(t, n)
}

// Containers of one image with a mapping each occupy nothing but what they write.
func TestManyMappings(t *testing.T) {
	t.Parallel()
	const containers = 20
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	reachable(t, n)
	layers := append(ownedImage(t, "mappings"), layer(t, payload("mappings", "app/large", 8<<20)))
	ref := push(t, r, "mappings:1", layers...)
	grown := map[string]rootfs.Used{}
	for snapshotter, dir := range map[string]string{
		"overlayfs":      filepath.Join(n.Dir(), "c", "io.containerd.snapshotter.v1.overlayfs"),
		node.Snapshotter: n.DedupRoot(),
	} {
		pull(t, n, snapshotter, ref)
		start := func(i int) (id, out string) {
			id = node.NewID("mapping")
			ids := fmt.Sprintf("0:%d:65536", (i+1)*65536)
			path := filepath.Join(t.TempDir(), "output") // ctr's own reading loses some now and then
			_, err := n.Ctr(ctx, "run", "--snapshotter", snapshotter, "--runc-root", n.Dir()+"/runc", "--remap-labels",
				"--log-uri", "file://"+path, "--uidmap", ids, "--gidmap", ids, ref, id, "sh", "-c", listOwners)
			must(t, err)
			shown, err := os.ReadFile(path)
			must(t, err)
			return id, string(shown)
		}
		first, want := start(0) // the first one may have an image built
		settle(t, n)
		before, err := rootfs.Usage(dir)
		must(t, err)
		ids := []string{first}
		for i := 1; i <= containers; i++ {
			id, got := start(i)
			ids = append(ids, id)
			if !strings.Contains(got, fmt.Sprint((i+1)*65536)) {
				t.Fatalf("container %d has another mapping: %s", i, got)
			}
			_, got, _ = strings.Cut(got, "\n")
			if _, rest, _ := strings.Cut(want, "\n"); got != rest {
				t.Fatalf("%s: owners in container %d:\n%s", snapshotter, i, cmp.Diff(rest, got))
			}
		}
		settle(t, n)
		after, err := rootfs.Usage(dir)
		must(t, err)
		grown[snapshotter] = rootfs.Used{Bytes: after.Bytes - before.Bytes, Inodes: after.Inodes - before.Inodes}
		for _, id := range ids {
			_, err := n.Ctr(ctx, "containers", "rm", id)
			must(t, err)
		}
	}
	t.Logf("%d more containers with mappings of their own: overlayfs %+v, dedup %+v",
		containers, grown["overlayfs"], grown[node.Snapshotter])
	if grown[node.Snapshotter].Bytes > grown["overlayfs"].Bytes+containers*4096 {
		t.Errorf("dedup grew by %+v, overlayfs by %+v", grown[node.Snapshotter], grown["overlayfs"])
	}
}
