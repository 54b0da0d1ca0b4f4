package integration

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// The root is on another file system than usual: small blocks, no holes in files, reflinks, copy on write. Images show
// what plain overlayfs shows, containers write, what two images share is stored once, and all of it goes again.
func TestFileSystems(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, fs, packages string
		args               []string
	}{
		{"ext4 with blocks of 1 KiB", "ext4", "e2fsprogs", []string{"-q", "-F", "-b", "1024"}},
		{"without holes", "ext2", "e2fsprogs", []string{"-q", "-F"}},
		{"XFS with reflinks", "xfs", "xfsprogs", []string{"-q", "-f", "-m", "reflink=1"}},
		{"XFS with blocks of 1 KiB", "xfs", "xfsprogs", []string{"-q", "-f", "-b", "size=1024"}},
		{"btrfs", "btrfs", "btrfs-progs", []string{"-q", "-f"}},
	} {
		t.Run(strings.ReplaceAll(row.name, " ", "-"), func(t *testing.T) {
			must(t, node.Require(testContext(t), nil, node.Command{Name: "mkfs." + row.fs, Packages: row.packages}))
			n := startNode(t, exact) // its end unmounts what is mounted there
			mountFileSystem(t, n.DedupRoot(), row.fs, row.args)
			must(t, n.StartDaemon(testContext(t)))
			worksOn(t, n)
		})
	}
}

func worksOn(t *testing.T, n *node.Node) {
	t.Helper()
	r, ctx := startRegistry(t), testContext(t)
	layers := tortureImage(t)
	ref := push(t, r, "torture:1", layers...)
	for _, s := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, s, ref)
	}
	want, implied := dump(t, n, "overlayfs", ref), torture.ImpliedParents()
	correctTorture(want)
	equal(t, want, dump(t, n, node.Snapshotter, ref), rootfs.DiffOptions{Times: implied, Owners: implied})
	big := payload("file systems", "big", 2<<20)
	app := push(t, r, "app:1", busybox(t), layer(t, big))
	pull(t, n, node.Snapshotter, app)
	before := packed(n)
	again := push(t, r, "app:2", busybox(t), layer(t, big, image.File("added", "by the rebuild")))
	pull(t, n, node.Snapshotter, again)
	if more := packed(n) - before; more > 1<<20 {
		t.Errorf("the rebuild takes %d bytes in packs", more)
	}
	const writes = "echo x >> /big && rm /bin/sh && mkdir /new && test $(wc -c < /big) = 2097154"
	out, err := n.Run(ctx, node.Snapshotter, again, "sh", "-c", writes)
	if err != nil {
		t.Errorf("%q, %v", out, err)
	}
	must(t, errors.Join(n.StopDaemon(), n.StartDaemon(ctx)))
	if r := fsck(t, n, 0); len(r.Findings) > 0 {
		t.Errorf("%+v", r.Findings)
	}
	for _, image := range []string{ref, app, again} {
		_, err := n.Ctr(ctx, "image", "rm", "--sync", image)
		must(t, err)
	}
	waitForNothing(t, n)
}

// mountFileSystem mounts a new file system.
func mountFileSystem(t *testing.T, at, kind string, args []string, options ...string) {
	t.Helper()
	mkfs, err := node.LookPath("mkfs." + kind)
	must(t, err)
	file := filepath.Join(t.TempDir(), "image")
	must(t, errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 1<<30)))
	if out, err := exec.CommandContext(testContext(t), mkfs, append(args, file)...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", mkfs, args, err, out)
	}
	m := mount.Mount{Type: kind, Source: file, Options: append(options, "loop")}
	if err := m.Mount(at); err != nil {
		t.Skipf("this kernel does not mount %s: %v", kind, err)
	}
}
