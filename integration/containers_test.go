package integration

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// objectsUntouched checks that every object has the bytes that its name says.
func objectsUntouched(t *testing.T, n *node.Node) {
	t.Helper()
	all := payloads(t, n)
	for _, p := range all {
		if sha256.Sum256(p.read(t)) != p.id.Sum {
			t.Errorf("object %s has other bytes", p.id)
		}
	}
	if len(all) == 0 {
		t.Error("there are no objects to check")
	}
}

// Whatever a container does to its files, the store's objects stay as they are.
func TestContainerWrites(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	ref := push(t, r, "writes:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	script := strings.Join([]string{
		"set -e", "chown -R 7:8 /data", "chmod 600 /data/b", "echo more >> /data/a", "mv /data/b /data/renamed",
		"ln /data/c /data/linked",
		"rm /data/small-a", "echo again > /data/small-a", "rm -r /root", "mkdir /root", "truncate -s 3 /data/c",
		"touch -d @5 /data/small-b",
		"stat -c '%n %u:%g %a %s %h' /data/*", "tail -c 5 /data/a", "cat /data/linked /data/small-a",
		"mv /data /moved", "mkdir /data", "echo new > /data/c", "ls /data /moved", "wc -c < /moved/renamed",
		"chmod 700 /bin/busybox", "stat -c '%a' /bin/busybox", "rm /bin/busybox",
	}, "\n")
	want := "/data/a 7:8 644 9005 1\n/data/c 7:8 644 3 2\n/data/linked 7:8 644 3 2\n/data/renamed 7:8 600 9000 1\n" +
		"/data/small-a 0:0 644 6 1\n/data/small-b 7:8 644 1 1\n/data/small-c 7:8 644 1 1\nmore\ncccagain\n" +
		"/data:\nc\n\n/moved:\na\nc\nlinked\nrenamed\nsmall-a\nsmall-b\nsmall-c\n9000\n700\n"
	run := func() (string, error) { return n.Run(ctx, node.Snapshotter, ref, "sh", "-c", script) }
	exec := func() (string, error) {
		id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sleep", "1000")
		must(t, err)
		return n.Exec(ctx, id, "sh", "-c", script)
	}
	for _, row := range []struct { // the second container of each sees nothing of the first
		name string
		do   func() (string, error)
	}{{"run", run}, {"run again", run}, {"exec", exec}, {"exec again", exec}} {
		t.Run(row.name, func(t *testing.T) {
			out, err := row.do()
			must(t, err)
			if diff := cmp.Diff(want, out); diff != "" {
				t.Errorf("what the container sees of its changes (-want +got):\n%s", diff)
			}
			objectsUntouched(t, n)
		})
	}
}

func TestReadOnlyRoot(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	ref := push(t, r, "ro:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	out, err := n.RunWith(ctx, node.Snapshotter, []string{"--read-only"}, ref, "sh", "-c",
		"{ echo x > /x; } 2> /dev/null || wc -c < /data/a")
	must(t, err)
	if out != "9000\n" {
		t.Errorf("%q", out)
	}
	must(t, n.View(ctx, node.Snapshotter, ref, func(root string) error {
		err := os.WriteFile(filepath.Join(root, "x"), nil, 0o600)
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("writing to a view: %v", err)
		}
		return nil
	}))
}

// An image may have more layers than overlayfs could stack.
func TestManyLayers(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	layers := []*image.Layer{busybox(t)}
	const many = 130
	for i := range many {
		layers = append(layers, layer(t, image.File(fmt.Sprint("f", i), fmt.Sprint(i)), image.File("last", fmt.Sprint(i))))
	}
	ref := push(t, r, "many:1", layers...)
	pull(t, n, node.Snapshotter, ref)
	out, err := n.Run(testContext(t), node.Snapshotter, ref, "sh", "-c", "ls /f* | wc -l; cat /last")
	must(t, err)
	if want := fmt.Sprintf("%d\n%d", many, many-1); out != want {
		t.Errorf("%q, want %q", out, want)
	}
}

// resident returns how many pages of a file are in the page cache.
func resident(t *testing.T, path string) (in, of int) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	fi, err := f.Stat()
	must(t, err)
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(mem)) }()
	return mincore(t, mem)
}

// dropFile takes a file out of the page cache, as far as it goes.
func dropFile(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return // a pack that was merged, an image that was unmounted meanwhile
	}
	must(t, err)
	defer f.Close()
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// Containers of different images that have equal files share one copy of them in memory: what
// one has read, the other finds there, and so does whoever looks at the object itself.
func TestPageCacheIsShared(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	big := payload("shared", "a", 4<<20)
	other := big
	other.Name, other.UID, other.Mode, other.Time = "d/b", 5, 0o600, time.Unix(1e9, 0)
	base := busybox(t)
	start := func(name string, l *image.Layer) (id string, root string) {
		ref := push(t, r, name, base, l)
		pull(t, n, node.Snapshotter, ref)
		id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sleep", "1000")
		must(t, err)
		return id, fmt.Sprintf("/proc/%d/root", pidOf(t, n, id))
	}
	one, first := start("one:1", layer(t, big))
	_, second := start("two:1", layer(t, image.Dir("d"), other))
	paths := map[string]string{
		"the container that read it": filepath.Join(first, "a"),
		"the other container":        filepath.Join(second, "d/b"),
	}
	for _, path := range paths {
		dropFile(t, path)
	}
	for who, path := range paths {
		if in, of := resident(t, path); in > of/10 {
			t.Skipf("through %s: %d of %d pages stay in memory: the cache cannot be dropped here", who, in, of)
		}
	}
	_, err := n.Exec(ctx, one, "cat", "/a")
	must(t, err)
	for who, path := range paths {
		if in, of := resident(t, path); in != of {
			t.Errorf("through %s: %d of %d pages are in memory", who, in, of)
		}
	}
}

// What a container changed becomes an image that is pushed, pulled and run.
func TestCommitContainer(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	ref := push(t, r, "commit:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sleep", "1000")
	must(t, err)
	_, err = n.Exec(ctx, id, "sh", "-c",
		"echo committed > /data/new; rm /data/a; chown 3 /data/b; head -c 5000 /data/c > /data/part")
	must(t, err)
	next := r.Ref("commit:2")
	commit(ctx, t, n.Client(), id, ref, next)
	must(t, n.RemoveContainer(ctx, id))
	_, err = n.Ctr(ctx, "image", "push", "--plain-http", next)
	must(t, err)
	_, err = n.Ctr(ctx, "image", "rm", "--sync", next, ref)
	must(t, err)

	pull(t, n, node.Snapshotter, next)
	out, err := n.Run(ctx, node.Snapshotter, next, "sh", "-c",
		"cat /data/new; ls /data; stat -c %u /data/b; wc -c < /data/part")
	must(t, err)
	if want := "committed\nb\nc\nnew\npart\nsmall-a\nsmall-b\nsmall-c\n3\n5000\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
	objectsUntouched(t, n)
}

// commit makes an image of a container's changes, as nerdctl commit does.
func commit(ctx context.Context, t *testing.T, c *client.Client, id, base, name string) {
	t.Helper()
	ctx, done, err := c.WithLease(ctx)
	must(t, err)
	defer func() { must(t, done(ctx)) }()
	container, err := c.LoadContainer(ctx, id)
	must(t, err)
	info, err := container.Info(ctx)
	must(t, err)
	desc, err := rootfs.CreateDiff(ctx, info.SnapshotKey, c.SnapshotService(info.Snapshotter), c.DiffService())
	must(t, err)
	img, err := c.GetImage(ctx, base)
	must(t, err)
	manifest, err := images.Manifest(ctx, c.ContentStore(), img.Target(), img.Platform())
	must(t, err)
	var config ocispec.Image
	readJSON(ctx, t, c.ContentStore(), manifest.Config, &config)
	blob, err := c.ContentStore().Info(ctx, desc.Digest)
	must(t, err)
	diffID, err := digest.Parse(blob.Labels["containerd.io/uncompressed"])
	must(t, err)
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	manifest.Layers = append(manifest.Layers, desc)
	manifest.Config = writeJSON(ctx, t, c.ContentStore(), manifest.Config.MediaType, config, nil)
	labels := map[string]string{"containerd.io/gc.ref.content.0": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.%d", i+1)] = l.Digest.String()
	}
	target := writeJSON(ctx, t, c.ContentStore(), ocispec.MediaTypeImageManifest, manifest, labels)
	_, err = c.ImageService().Create(ctx, images.Image{Name: name, Target: target})
	must(t, err)
}

func readJSON(ctx context.Context, t *testing.T, store content.Store, desc ocispec.Descriptor, v any) {
	t.Helper()
	b, err := content.ReadBlob(ctx, store, desc)
	must(t, err)
	must(t, json.Unmarshal(b, v))
}

func writeJSON(ctx context.Context, t *testing.T, store content.Store, media string, v any,
	labels map[string]string) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	desc := ocispec.Descriptor{MediaType: media, Digest: digest.FromBytes(b), Size: int64(len(b))}
	must(t, content.WriteBlob(ctx, store, desc.Digest.String(), strings.NewReader(string(b)), desc,
		content.WithLabels(labels)))
	return desc
}

// Without the diff plugin everything works too, and the log says once what to add.
func TestWithoutDiffPlugin(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{NoDiffer: true}), startRegistry(t)
	ref := push(t, r, "plain:1", busybox(t), dataLayer(t), layer(t, image.File("data/.wh.a", ""), image.File("top", "t")))
	pull(t, n, node.Snapshotter, ref)
	out, err := n.Run(testContext(t), node.Snapshotter, ref, "sh", "-c", "ls /data; wc -c < /data/b; cat /top")
	must(t, err)
	if want := "b\nc\nsmall-a\nsmall-b\nsmall-c\n9000\nt"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
	log, err := os.ReadFile(n.LogPath("dedup"))
	must(t, err)
	if got := strings.Count(string(log), "proxy_plugins.dedup-diff"); got != 1 {
		t.Errorf("the log tells %d times what to configure", got)
	}
	objectsUntouched(t, n)
	// The store takes the directories in: soon none holds files any more. That of the container goes
	// with containerd's garbage collection.
	var left []string
	for range 1200 {
		left, err = filepath.Glob(filepath.Join(n.DedupRoot(), "snapshots", "*", "fs", "*"))
		must(t, err)
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("directories keep %v", left)
}

func mincore(t *testing.T, mem []byte) (in, of int) {
	t.Helper()
	page := os.Getpagesize()
	vec := make([]byte, (len(mem)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)),
		uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, v := range vec {
		in += int(v & 1)
	}
	return in, len(vec)
}

// An image's files can be looked at without a container: what `ctr snapshots mounts` prints does it, as
// docs/troubleshooting.md says.
func TestSnapshotMountsByHand(t *testing.T) {
	t.Parallel()
	n, ctx := startDedup(t, node.Options{}), testContext(t)
	file := payload("mounts", "file", 9000)
	ref := push(t, startRegistry(t), "app:1", busybox(t), layer(t, file))
	pull(t, n, node.Snapshotter, ref)
	chain, err := n.ChainID(ctx, ref)
	must(t, err)
	ctr := func(args ...string) string {
		t.Helper()
		out, err := n.Ctr(ctx, append([]string{"snapshots", "--snapshotter", node.Snapshotter}, args...)...)
		must(t, err)
		return out
	}
	ctr("prepare", "look", chain) // a view nothing keeps from containerd's garbage collection
	dir := t.TempDir()
	first, _, _ := strings.Cut(ctr("mounts", dir, "look"), "\n")
	if out, err := exec.CommandContext(ctx, "sh", "-c", first).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", first, err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, file.Name))
	must(t, errors.Join(err, mount.UnmountAll(dir, 0)))
	if string(got) != file.Content {
		t.Errorf("the file has %d bytes, want %d", len(got), len(file.Content))
	}
	ctr("rm", "look")
}
