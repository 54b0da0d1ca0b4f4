package integration

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// What images may hold and containerd's applier refuses: a hardlink to a file of a lower
// layer (it finds no target), GNU tar's own sparse format and contiguous files (it does not
// know them).
func TestBeyondOverlayfs(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, exact), startRegistry(t)
	src := sparseFiles(t)
	ref := push(t, r, "beyond/overlayfs:1", busybox(t),
		layer(t, image.Dir("d"), image.File("d/target", "of a lower layer")),
		layer(t, image.Hardlink("d/link", "d/target")),
		tarLayer(t, src, "sparse", "--format=gnu", "--sparse", "--hole-detection=seek"),
		layer(t, image.Entry{Name: "contiguous", Type: tar.TypeCont, Content: "regular, but for a real-time system"}))
	pull(t, n, node.Snapshotter, ref)
	tree := dump(t, n, node.Snapshotter, ref)
	if got := tree["d/link"]; got.SHA256 != tree["d/target"].SHA256 || got.SHA256 == "" {
		t.Errorf("d/link is %+v, want the bytes of d/target", got)
	}
	if a, b := tree["d/link"].Group, tree["d/target"].Group; a == "" || a != b {
		t.Errorf("d/link and d/target are in the hardlink groups %q and %q, want one", a, b)
	}
	if got := tree["contiguous"]; got.Type != "file" || got.SHA256 != sha256Hex("regular, but for a real-time system") {
		t.Errorf("contiguous is %+v, want a file", got)
	}
	want, err := rootfs.Dump(src)
	must(t, err)
	for name, w := range want {
		if got := tree[filepath.Join("sparse", name)]; got.Type != w.Type || got.Size != w.Size || got.SHA256 != w.SHA256 {
			t.Errorf("sparse/%s is %+v, want %+v", name, got, w)
		}
	}
}

// What overlayfs shows otherwise than the image spec asks for, or at random: here the
// expectation is written down.
func TestEqualityToSpec(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, exact), startRegistry(t)
	ref := push(t, r, "equality/spec:1", layer(t, torture.SpecBelow()...), layer(t, torture.SpecAbove()...))
	pull(t, n, node.Snapshotter, ref)
	got := dump(t, n, node.Snapshotter, ref)
	want := rootfs.Tree{}
	for path, e := range torture.SpecWant() {
		w := rootfs.Entry{
			Type: "file", Mode: uint32(e.Mode), UID: uint32(e.UID), GID: uint32(e.GID), MTime: e.Time.UTC(), Nlink: 1,
			Size: int64(len(e.Content)), SHA256: sha256Hex(e.Content), Xattrs: e.Xattrs,
		}
		if e.Dir {
			w.Type, w.Nlink, w.Size, w.SHA256 = "dir", 0, 0, ""
		}
		want[path] = w
	}
	// Nothing describes these, and the image spec does not say when they were made:
	// what counts is that it was not the time of the pull.
	for _, path := range []string{".", "implied", "implied/deep"} {
		if since := time.Since(got[path].MTime); since < time.Hour {
			t.Errorf("%s has the mtime %s, that of the pull", path, got[path].MTime)
		}
	}
	equal(t, want, got, rootfs.DiffOptions{Times: []string{".", "implied", "implied/deep"}})
	equal(t, want, dumpActive(t, n, node.Snapshotter, ref),
		rootfs.DiffOptions{Times: []string{".", "implied", "implied/deep"}})
}

func sha256Hex(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}
