package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

func hashOf(b []byte) v1.Hash {
	sum := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// rawLayer is a layer with any bytes for a blob, which claims to hold a tar.
func rawLayer(t *testing.T, blob, claimed []byte, media types.MediaType) *image.Layer {
	t.Helper()
	l := &image.Layer{Hash: hashOf(blob), Diff: hashOf(claimed), Length: int64(len(blob)), TarSize: int64(len(claimed)),
		Media: media}
	l.File = filepath.Join(t.TempDir(), l.Hash.Hex)
	must(t, os.WriteFile(l.File, blob, 0o600))
	return l
}

// tarEnd is the length of what archive/tar ends a tar with.
const tarEnd = 1024

func tarOf(t *testing.T, entries ...image.Entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	must(t, image.WriteEntries(&buf, entries))
	return buf.Bytes()
}

// payload is a file that nothing else on the node holds and that does not compress away.
func payload(row, name string, size int) image.Entry {
	seed := sha256.Sum256([]byte(row + name))
	noise := make([]byte, size/2)
	_, _ = rand.NewChaCha8(seed).Read(noise) // it never fails
	return image.File(name, hex.EncodeToString(noise))
}

func gz(t *testing.T, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, err := w.Write(b)
	must(t, err)
	must(t, w.Close())
	return buf.Bytes()
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	for i := range 8 {
		b[at+i] ^= 0xff
	}
	return b
}

type badRow struct {
	name string
	bad  *image.Layer
	says string // what ctr has to print
	// Layers that are fine, below and above the bad one.
	below, above *image.Layer
}

func badLayers(t *testing.T) []badRow {
	rows := append(badBlobs(t), badMembers(t)...)
	for i := range rows {
		rows[i].below = layer(t, payload(rows[i].name, "below", 8000))
		rows[i].above = layer(t, payload(rows[i].name, "above", 8000))
	}
	return rows
}

// badBlobs are cut or damaged in their second member, so that a first one has been stored.
func badBlobs(t *testing.T) []badRow {
	good := func(row string) []byte { return tarOf(t, payload(row, "first", 8000), payload(row, "second", 40000)) }
	z, err := zstd.NewWriter(nil)
	must(t, err)
	cut := func(b []byte) []byte { return b[:len(b)*3/4] }
	damaged := func(b []byte) []byte { return flip(b, len(b)*3/4) }
	compressed := func(row string, compress func([]byte) []byte, damage func([]byte) []byte,
		media types.MediaType) *image.Layer {
		b := good(row)
		return rawLayer(t, damage(compress(b)), b, media)
	}
	gzip := func(b []byte) []byte { return gz(t, b) }
	zstd := func(b []byte) []byte { return z.EncodeAll(b, nil) }
	same := func(b []byte) []byte { return b }
	short := rawLayer(t, gz(t, good("short")), good("short"), types.OCILayer)
	must(t, os.Truncate(short.File, short.Length/2))
	noTail := cut(good("tar"))
	garbage := bytes.Repeat([]byte("this is no tar. "), 500)
	late := good("late")
	late = append(late[:len(late)-tarEnd], garbage...)
	return []badRow{
		{name: "blob shorter than its descriptor", bad: short, says: "short read"},
		{name: "truncated gzip", bad: compressed("gzip-", gzip, cut, types.OCILayer), says: "truncated"},
		{name: "corrupt gzip", bad: compressed("gzip!", gzip, damaged, types.OCILayer), says: "gzip"},
		{name: "truncated zstd", bad: compressed("zstd-", zstd, cut, types.OCILayerZStd), says: "truncated"},
		{name: "corrupt zstd", bad: compressed("zstd!", zstd, damaged, types.OCILayerZStd), says: "zstd"},
		{name: "truncated tar", bad: rawLayer(t, noTail, noTail, types.OCIUncompressedLayer), says: "invalid layer archive"},
		{name: "garbage", bad: rawLayer(t, garbage, garbage, types.OCIUncompressedLayer), says: "invalid tar header"},
		{name: "garbage after a member", bad: rawLayer(t, late, late, types.OCIUncompressedLayer),
			says: "invalid tar header"},
		{name: "wrong diffID", bad: rawLayer(t, gz(t, good("diffID")), []byte("another tar"), types.OCILayer),
			says: "wrong diff id"},
		{name: "unknown media type", bad: compressed("media", same, same, "application/vnd.oci.image.layer.v1.tar+lzma"),
			says: "lzma"},
	}
}

// badMembers are valid tars whose last member is not to be had.
func badMembers(t *testing.T) []badRow {
	after := func(members ...image.Entry) *image.Layer {
		b := tarOf(t, append([]image.Entry{payload(members[0].Name, "first", 8000)}, members...)...)
		return rawLayer(t, b, b, types.OCIUncompressedLayer)
	}
	up := image.Symlink("up", "../../..")
	huge := tarOf(t, payload("huge", "first", 8000))
	huge = huge[:len(huge)-tarEnd]
	var header bytes.Buffer
	must(t, tar.NewWriter(&header).WriteHeader(&tar.Header{Name: "huge", Mode: 0o644, Size: 1 << 55}))
	huge = append(huge, header.Bytes()...)
	overlay := image.Entry{Name: "x", Xattrs: map[string]string{"trusted.overlay.redirect": "/00/secret"}}
	return []badRow{
		{name: "path above the root", bad: after(image.File("../../etc/evil", "")), says: "leads above the root"},
		{name: "hard link above the root", bad: after(image.Hardlink("l", "../../etc/passwd")), says: "above the root"},
		{name: "hard link through a symlink above the root", bad: after(up, image.Hardlink("l", "up/etc/passwd")),
			says: "above the root"},
		{name: "symlink above the root", bad: after(up, image.File("up/evil", "")), says: "above the root"},
		{name: "overlay xattr", bad: after(overlay), says: "trusted.overlay.redirect"},
		{name: "huge declared size", bad: rawLayer(t, huge, huge, types.OCIUncompressedLayer), says: "huge"},
	}
}

// Bad input between good layers gives an error in ctr's output that says what is wrong, and
// leaves nothing behind. The good layers are worth as much as before.
func TestBadInput(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	rows, base := badLayers(t), busybox(t)
	refs := make([]string, len(rows))
	fails := func(t *testing.T, i int) {
		t.Helper()
		err := n.Pull(testContext(t), node.Snapshotter, refs[i])
		if err == nil || !strings.Contains(err.Error(), rows[i].says) {
			t.Errorf("ctr says %v, want %q in it", err, rows[i].says)
		}
	}
	for i, row := range rows {
		must(t, image.Seed(r.Dir(), row.bad)) // a push would refuse what is not what it claims
		refs[i] = push(t, r, fmt.Sprintf("bad:%d", i), row.below, row.bad, row.above)
		t.Run(row.name, func(t *testing.T) { fails(t, i) })
	}
	leavesNothing(t, n)

	for i, row := range rows {
		t.Run(row.name+", then a good image", func(t *testing.T) {
			fails(t, i)
			ref := push(t, r, fmt.Sprintf("good:%d", i), base, row.below, row.above)
			pull(t, n, node.Snapshotter, ref)
			out, err := n.Run(testContext(t), node.Snapshotter, ref, "cat", "/below", "/above")
			must(t, err)
			if want := payload(row.name, "below", 8000).Content + payload(row.name, "above", 8000).Content; out != want {
				t.Errorf("the container reads %d other bytes, want %d", len(out), len(want))
			}
		})
	}
	objectsUntouched(t, n)
}

// leavesNothing waits until the store is empty: what was ingested ahead of a failed layer
// stays for some seconds.
func leavesNothing(t *testing.T, n *node.Node) {
	t.Helper()
	var left []string
	for try := range 1200 {
		// containerd puts its own collection off by fifty times what the last one took.
		if try%10 == 0 {
			collectGarbage(t, n)
		}
		left = nil
		for _, pattern := range []string{"dedup/packs/*", "dedup/layers/*", "dedup/chains/*", "dedup/snapshots/*",
			"dedup/ingest/*", "run/chains/*", "run/p/*", "run/v/*"} {
			found, err := filepath.Glob(filepath.Join(n.Dir(), pattern))
			must(t, err)
			left = append(left, found...)
		}
		out, err := n.Ctr(testContext(t), "snapshots", "--snapshotter", node.Snapshotter, "ls")
		must(t, err)
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) > 1 { // the first is a heading
			left = append(left, lines[1:]...)
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%d things stay: %q", len(left), left)
}

// collectGarbage has containerd remove what nothing needs any more.
func collectGarbage(t *testing.T, n *node.Node) {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	lease, err := n.Client().LeasesService().Create(ctx, leases.WithRandomID())
	must(t, err)
	must(t, n.Client().LeasesService().Delete(ctx, lease, leases.SynchronousDelete))
}

// What containerd's overlayfs puts inside the root lands in the same place here.
func TestContainedPaths(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": "exact"}}), startRegistry(t)
	ref := push(t, r, "contained:1", busybox(t), layer(t,
		image.Dir("/absolute"), image.File("/absolute/file", "a"), image.Dir("real"), image.Symlink("link", "/real"),
		image.File("link/below", "b")))
	pull(t, n, "overlayfs", ref)
	pull(t, n, node.Snapshotter, ref)
	got := dump(t, n, node.Snapshotter, ref)
	for _, path := range []string{"absolute/file", "real/below"} {
		if _, ok := got[path]; !ok {
			t.Errorf("%s is missing", path)
		}
	}
	equal(t, dump(t, n, "overlayfs", ref), got, noRootTime)
}

// daemonFails runs the daemon with a root and returns what it prints before it gives up.
func daemonFails(t *testing.T, n *node.Node, root string) string {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	text := "root = '" + root + "'\naddress = '" + filepath.Join(dir, "s.sock") + "'\ncontainerd_address = '" +
		n.Address() + "'\n"
	must(t, os.WriteFile(config, []byte(text), 0o600))
	module, err := node.ModuleRoot()
	must(t, err)
	out, err := exec.CommandContext(testContext(t), filepath.Join(module, "bin/containerd-dedup-grpc"), "--config",
		config).CombinedOutput()
	if err == nil {
		t.Errorf("the daemon ends without an error: %s", out)
	}
	return string(out)
}

func TestSecondDaemonOnOneRoot(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	if out := daemonFails(t, n, n.DedupRoot()); !strings.Contains(out, "another daemon serves from") {
		t.Error(out)
	}
}

// A root inside an overlayfs cannot hold upper directories; the daemon says so at start.
func TestRootThatCannotServe(t *testing.T) {
	t.Parallel()
	n, dir := startNode(t, node.Options{}), t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	merged := filepath.Join(dir, "merged")
	must(t, unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+
		"/work"))
	defer func() { must(t, unix.Unmount(merged, unix.MNT_DETACH)) }()
	out := daemonFails(t, n, filepath.Join(merged, "root"))
	for _, want := range []string{merged, "overlayfs's upper directories", "use ext4"} {
		if !strings.Contains(out, want) {
			t.Errorf("the daemon does not say %q: %s", want, out)
		}
	}
	left, err := filepath.Glob(filepath.Join(merged, "root", "probe-*"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("the probe leaves %v", left)
	}
}

// A tmpfs cannot be mounted from by file, so chain images take a loop device there.
func TestRootOnTmpfs(t *testing.T) {
	t.Parallel()
	n, r := startNode(t, node.Options{}), startRegistry(t)
	must(t, unix.Mount("tmpfs", n.DedupRoot(), "tmpfs", 0, "mode=0700"))
	must(t, n.StartDaemon(testContext(t)))
	ref := push(t, r, "tmpfs:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	out, err := n.Run(testContext(t), node.Snapshotter, ref, "sh", "-c",
		"echo more >> /data/a; wc -c < /data/a; cat /data/small-b")
	must(t, err)
	if out != "9005\nb" {
		t.Errorf("%q", out)
	}
	objectsUntouched(t, n)
}
