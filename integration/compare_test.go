package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	trees "github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// compiled are sources with valid bytecode.
func compiled(count int) (entries []image.Entry) {
	at := time.Unix(1_600_000_000, 0)
	for i := range 9 {
		entries = append(entries, image.Dir(fmt.Sprintf("py/p%d", i)))
	}
	entries = append(entries, image.Dir("py"))
	for i := range count {
		source := fmt.Sprintf("print(%d)\n", i)
		pyc := binary.LittleEndian.AppendUint32(nil, 3495|'\r'<<16|'\n'<<24)
		for _, word := range []uint32{0, uint32(at.Unix()), uint32(len(source))} {
			pyc = binary.LittleEndian.AppendUint32(pyc, word)
		}
		dir := fmt.Sprintf("py/p%d", i%9)
		py := image.File(fmt.Sprintf("%s/m%d.py", dir, i), source)
		py.Time = at
		entries = append(entries, py,
			image.File(fmt.Sprintf("%s/__pycache__/m%d.cpython-311.pyc", dir, i), string(pyc)+strings.Repeat("code", 300+i)))
	}
	return entries
}

func toChange(t *testing.T) *image.Layer {
	t.Helper()
	capable := image.File("d/capable", "c")
	capable.Xattrs = map[string]string{"security.capability": capNetRaw}
	entries := []image.Entry{image.Dir("d"), image.Dir("opaque"), image.Dir("gone"), image.Dir("replaced"), capable}
	for _, dir := range []string{"d", "opaque/inner", "gone/deep", "replaced", "z"} {
		for _, name := range []string{"one", "two", "three", "four", "five"} {
			entries = append(entries, image.File(dir+"/"+name, strings.Repeat(dir+name, 300)))
		}
	}
	links := []image.Entry{image.Symlink("d/link", "one"), image.Hardlink("d/hard", "d/one")}
	entries = append(append(entries, links...), image.File("z/unchanged", "u"))
	return layer(t, append(entries, compiled(90)...)...)
}

const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// changeAll makes each kind of change that a step of a build can make.
func changeAll(root string) error {
	at := func(path string) string { return filepath.Join(root, path) }
	write := func(path, data string) func() error {
		return func() error { return os.WriteFile(at(path), []byte(data), 0o644) }
	}
	remove := func(path string) func() error { return func() error { return os.RemoveAll(at(path)) } }
	mkdir := func(path string) func() error { return func() error { return os.Mkdir(at(path), 0o750) } }
	steps := []func() error{
		func() error { return os.Rename(at("d/two"), at("d/renamed")) },
		func() error { return os.Link(at("d/three"), at("linked")) }, // the file itself does not change
		func() error { return os.Link(at("z/unchanged"), at("a-link-before-its-file")) },
		func() error { return os.Chmod(at("d/hard"), 0o600) },
		func() error { return unix.Setxattr(at("d/four"), "user.note", []byte("n"), 0) },
		func() error { return unix.Setxattr(at("d/five"), "security.capability", []byte(capNetRaw), 0) },
		func() error { return unix.Removexattr(at("d/capable"), "security.capability") },
		remove("gone"), remove("opaque"), mkdir("opaque"), mkdir("opaque/inner"),
		write("opaque/inner/two", "new"), write("opaque/own", "new"),
		func() error { return os.Chmod(at("z/one"), 0o4755) },
		func() error { return os.Lchown(at("z/two"), 7, 8) },
		func() error { return unix.Mknod(at("z/device"), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 3))) },
		func() error { return unix.Mkfifo(at("z/fifo"), 0o644) },
		remove("d/link"), func() error { return os.Symlink("elsewhere", at("d/link")) },
		write("z/sparse", "begin"), func() error { return os.Truncate(at("z/sparse"), 3<<20) },
		remove("z/three"), mkdir("z/three"), write("z/three/inside", "a file was here"),
		remove("replaced"), write("replaced", "a directory was here"),
		remove("z/four"), write("z/four", "made again"),
		func() error { return os.Chtimes(at("z/five"), time.Unix(1e9, 0), time.Unix(1e9, 7)) },
		write("z/passing", "p"), remove("z/passing"),
		write("py/p1/m1.py", "print('changed')\n"),
	}
	for i, do := range steps {
		if err := do(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// step is what one snapshotter makes of a change, and the layers that its differs write of it.
type step struct {
	t         *testing.T
	ctx       context.Context
	n         *node.Node
	sn        snapshots.Snapshotter
	base, key string
	begun     time.Time
}

func take(
	ctx context.Context, t *testing.T, n *node.Node, snapshotter, ref string, change func(root string) error,
) *step {
	t.Helper()
	base, err := n.ChainID(ctx, ref)
	must(t, err)
	s := &step{
		t: t, ctx: ctx, n: n, base: base,
		sn: n.Client().SnapshotService(snapshotter), begun: time.Now().Truncate(time.Second),
	}
	s.key = node.NewID("step")
	_, err = s.sn.Prepare(ctx, s.key, base)
	must(t, err)
	mounts, err := s.sn.Mounts(ctx, s.key) // it waits for a chain image that takes long
	must(t, err)
	must(t, n.WithMounts(mounts, change))
	return s
}

// active compares the snapshot with its parent, as `nerdctl commit` does.
func (s *step) active() ocispec.Descriptor {
	s.t.Helper()
	desc, err := rootfs.CreateDiff(s.ctx, s.key, s.sn, s.n.Client().DiffService())
	must(s.t, err)
	return desc
}

// committed commits the snapshot and compares two views, as BuildKit does.
func (s *step) committed(media string) (name string, desc ocispec.Descriptor) {
	s.t.Helper()
	name = node.NewID("committed")
	must(s.t, s.sn.Commit(s.ctx, name, s.key))
	return name, s.compare(s.base, name, media)
}

func (s *step) compare(lower, upper, media string) ocispec.Descriptor {
	s.t.Helper()
	var mounts [2][]mount.Mount
	for i, parent := range []string{lower, upper} {
		key, err := node.NewID("view"), error(nil)
		mounts[i], err = s.sn.View(s.ctx, key, parent)
		must(s.t, err)
		defer func() { must(s.t, s.sn.Remove(s.ctx, key)) }()
	}
	desc, err := s.n.Client().DiffService().Compare(s.ctx, mounts[0], mounts[1], diff.WithMediaType(media))
	must(s.t, err)
	return desc
}

// members lists a layer; times since the step began are "now".
func (s *step) members(desc ocispec.Descriptor) (all []string) {
	s.t.Helper()
	data, err := ctdcontent.ReadBlob(s.ctx, s.n.Client().ContentStore(), desc)
	must(s.t, err)
	var r io.Reader = bytes.NewReader(data)
	if desc.MediaType == ocispec.MediaTypeImageLayerGzip {
		r, err = gzip.NewReader(r)
		must(s.t, err)
	}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return all
		}
		must(s.t, err)
		sum := sha256.New()
		_, err = io.Copy(sum, tr)
		must(s.t, err)
		when := h.ModTime.String()
		if !h.ModTime.Before(s.begun) {
			when = "now"
		}
		all = append(all, fmt.Sprintf("%s %c %o %d:%d %d %q %d:%d %s %q %x", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size,
			h.Linkname, h.Devmajor, h.Devminor, when, h.PAXRecords, sum.Sum(nil)[:8]))
	}
}

// applied dumps what a layer shows over the base, with the snapshotter of the step.
func (s *step) applied(desc ocispec.Descriptor) (tree trees.Tree) {
	s.t.Helper()
	key := node.NewID("extract-applied")
	mounts, err := s.sn.Prepare(s.ctx, key, s.base)
	must(s.t, err)
	_, err = s.n.Client().DiffService().Apply(s.ctx, desc, mounts)
	must(s.t, err)
	name := node.NewID("applied")
	must(s.t, s.sn.Commit(s.ctx, name, key))
	mounts, err = s.sn.View(s.ctx, name+"-view", name)
	must(s.t, err)
	must(s.t, s.n.WithMounts(mounts, func(root string) (err error) {
		tree, err = trees.Dump(root)
		return err
	}))
	for path, e := range tree {
		if !e.MTime.Before(s.begun) {
			e.MTime = time.Time{}
			tree[path] = e
		}
	}
	return tree
}

// What Compare writes has the entries that containerd's walking differ writes over overlayfs, whether the step is still
// active or committed, and gives the same tree over the parent.
func TestCompareLikeOverlayfs(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := leased(t, n)
	ref := push(t, r, "compare:1", busybox(t), toChange(t))
	var steps []*step
	var active []ocispec.Descriptor
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, ref)
		s := take(ctx, t, n, snapshotter, ref, changeAll)
		if len(steps) > 0 {
			s.begun = steps[0].begun
		}
		desc := s.active()
		if again := s.active(); again.Digest != desc.Digest {
			t.Errorf("%s: %s, then %s", snapshotter, desc.Digest, again.Digest)
		}
		steps, active = append(steps, s), append(active, desc)
	}
	want, got := steps[0].members(active[0]), steps[1].members(active[1])
	if d := cmp.Diff(want, got); d != "" || len(want) < 30 {
		t.Errorf("%d entries of an active snapshot (-overlayfs +dedup):\n%s", len(want), d)
	}
	for _, s := range steps { // both layers, over the parent
		equal(t, s.applied(active[0]), s.applied(active[1]), trees.DiffOptions{})
	}
	for i, s := range steps {
		name, desc := s.committed(ocispec.MediaTypeImageLayerGzip)
		if d := cmp.Diff(want, s.members(desc)); d != "" {
			t.Errorf("entries of a committed snapshot (-overlayfs +got):\n%s", d)
		}
		if desc.Digest != active[i].Digest {
			t.Errorf("active: %s, committed: %s", active[i].Digest, desc.Digest)
		}
		plain := s.compare(s.base, name, ocispec.MediaTypeImageLayer)
		if d := cmp.Diff(want, s.members(plain)); d != "" {
			t.Errorf("entries of a plain tar:\n%s", d)
		}
	}
}

// leased is a context under a lease: nothing in it is collected.
func leased(t *testing.T, n *node.Node) context.Context {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	ctx, _, err := n.Client().WithLease(ctx)
	must(t, err)
	return ctx
}

// A layer that deletes every __pycache__ holds the whiteouts and no source.
func TestCompareDeletedBytecode(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := leased(t, n)
	ref := push(t, r, "bytecode:1", busybox(t), toChange(t))
	remove := func(root string) error {
		all, err := filepath.Glob(filepath.Join(root, "py/*/__pycache__"))
		for _, dir := range all {
			if err == nil {
				err = os.RemoveAll(dir)
			}
		}
		return err
	}
	var want []string
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, ref)
		_, desc := take(ctx, t, n, snapshotter, ref, remove).committed(ocispec.MediaTypeImageLayerGzip)
		got := (&step{t: t, ctx: ctx, n: n, begun: time.Now().Add(-time.Minute)}).members(desc)
		if want == nil {
			want = got
		}
		if d := cmp.Diff(want, got); d != "" || len(got) != 19 { // py, nine directories in it, nine whiteouts
			t.Errorf("%s: %d entries, (-overlayfs +got):\n%s", snapshotter, len(got), d)
		}
	}
}

// An image that is made here is known here: its push and a pull of it, in whatever namespace, read no blob and ingest
// none.
func TestPushedImageIsKnown(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"log_level": "debug"}}), startRegistry(t)
	ctx := leased(t, n)
	ref := push(t, r, "known:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sleep", "1000")
	must(t, err)
	_, err = n.Exec(ctx, id, "sh", "-c", "echo committed > /data/new; rm /data/a; head -c 50000 /dev/urandom > /data/part")
	must(t, err)
	next := r.Ref("known:2")
	commit(ctx, t, n.Client(), id, ref, next)
	_, err = n.Ctr(ctx, "image", "push", "--plain-http", next)
	must(t, err)
	before := ingests(t, n)
	fetched, err := r.Fetched()
	must(t, err)
	for _, namespace := range []string{node.Namespace, "another"} {
		ctx := namespaces.WithNamespace(testContext(t), namespace)
		must(t, n.Pull(ctx, node.Snapshotter, next))
		must(t, n.PullClient(ctx, node.Snapshotter, next, client.WithPullUnpack))
	}
	if d := cmp.Diff(before, ingests(t, n)); d != "" {
		t.Errorf("a pull read blobs (-before +after):\n%s", d)
	}
	again, err := r.Fetched()
	must(t, err)
	if blobs := len(again) - len(fetched); blobs > 2 { // manifest and config
		t.Errorf("%d blobs were fetched: %v", blobs, again[len(fetched):])
	}
	must(t, n.RemoveContainer(ctx, id))
	out, err := n.Run(ctx, node.Snapshotter, next, "sh", "-c", "cat /data/new; ls /data; wc -c < /data/part")
	must(t, err)
	if want := "committed\nb\nc\nnew\npart\nsmall-a\nsmall-b\nsmall-c\n50000\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
	objectsUntouched(t, n)
}
