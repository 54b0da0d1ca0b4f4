package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	l := &image.Layer{Hash: hashOf(blob), Diff: hashOf(claimed), Length: int64(len(blob)), TarSize: int64(len(claimed)), Media: media}
	l.File = filepath.Join(t.TempDir(), l.Hash.Hex)
	must(t, os.WriteFile(l.File, blob, 0o600))
	return l
}

func tarOf(t *testing.T, headers ...*tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		must(t, w.WriteHeader(h))
	}
	must(t, w.Close())
	return buf.Bytes()
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
	name  string
	layer *image.Layer
	says  string // what ctr has to print
}

func badLayers(t *testing.T) []badRow {
	const (
		plainType = types.OCIUncompressedLayer
		gzipType  = types.OCILayer
		zstdType  = types.OCILayerZStd
	)
	noise := make([]byte, 20000)
	for i := range noise {
		noise[i] = byte(i * i >> 3)
	}
	good := append(tarOf(t, &tar.Header{Name: "first"})[:512], tarOf(t, &tar.Header{Name: "f", PAXRecords: map[string]string{"X.noise": hex.EncodeToString(noise)}})...)
	z, err := zstd.NewWriter(nil)
	must(t, err)
	zipped, zstded := gz(t, good), z.EncodeAll(good, nil)
	one := func(h *tar.Header) *image.Layer {
		b := tarOf(t, &tar.Header{Name: "first"}, h)
		return rawLayer(t, b, b, plainType)
	}
	two := func(a, b *tar.Header) *image.Layer {
		x := tarOf(t, a, b)
		return rawLayer(t, x, x, plainType)
	}
	huge := tarOf(t, &tar.Header{Name: "first"})[:512]
	var buf bytes.Buffer
	must(t, tar.NewWriter(&buf).WriteHeader(&tar.Header{Name: "huge", Mode: 0o644, Size: 1 << 55}))
	huge = append(huge, buf.Bytes()...)
	garbage := bytes.Repeat([]byte("this is no tar. "), 500)
	return []badRow{
		{"truncated gzip", rawLayer(t, zipped[:len(zipped)/2], good, gzipType), "truncated"},
		{"corrupt gzip", rawLayer(t, flip(zipped, len(zipped)/2), good, gzipType), "gzip"},
		{"truncated zstd", rawLayer(t, zstded[:len(zstded)/2], good, zstdType), "truncated"},
		{"corrupt zstd", rawLayer(t, flip(zstded, len(zstded)/2), good, zstdType), "zstd"},
		{"truncated tar", rawLayer(t, good[:1024+300], good[:1024+300], plainType), "invalid layer archive"},
		{"garbage", rawLayer(t, garbage, garbage, plainType), "invalid tar header"},
		{"wrong diffID", rawLayer(t, zipped, []byte("another tar"), gzipType), "wrong diff id"},
		{"path above the root", one(&tar.Header{Name: "../../etc/evil"}), "leads above the root"},
		{"hard link above the root", one(&tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}), "above the root"},
		{"symlink above the root", two(&tar.Header{Name: "up", Typeflag: tar.TypeSymlink, Linkname: "../../.."}, &tar.Header{Name: "up/evil"}), "above the root"},
		{"overlay xattr", one(&tar.Header{Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/00/secret"}}), "trusted.overlay.redirect"},
		{"huge declared size", rawLayer(t, huge, huge, plainType), "huge"},
		{"unknown media type", rawLayer(t, good, good, "application/vnd.oci.image.layer.v1.tar+lzma"), "lzma"},
	}
}

// Bad input gives an error in ctr's output that says what is wrong, leaves nothing
// behind, and other images pull and run.
func TestBadInput(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	for i, row := range badLayers(t) {
		t.Run(row.name, func(t *testing.T) {
			ref := push(t, r, "bad:"+string(rune('a'+i)), row.layer)
			err := n.Pull(ctx, node.Snapshotter, ref)
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("ctr says %v, want %q in it", err, row.says)
			}
		})
	}
	leavesNothing(t, n)
	ref := push(t, r, "good:1", busybox(t))
	pull(t, n, node.Snapshotter, ref)
	out, err := n.Run(ctx, node.Snapshotter, ref, "echo", "still fine")
	must(t, err)
	if out != "still fine\n" {
		t.Errorf("%q", out)
	}
}

// leavesNothing waits until the store is empty: what was ingested ahead of a
// failed layer stays for some seconds.
func leavesNothing(t *testing.T, n *node.Node) {
	t.Helper()
	var left []string
	for range 300 {
		left = nil
		for _, dir := range []string{"objects", "layers", "chains", "snapshots", "ingest"} {
			must(t, filepath.WalkDir(filepath.Join(n.DedupRoot(), dir), func(path string, d os.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					left = append(left, path)
				}
				return nil // what vanishes meanwhile is what we wait for
			}))
		}
		if len(left) == 0 {
			out, err := n.Ctr(testContext(t), "snapshots", "--snapshotter", node.Snapshotter, "ls")
			must(t, err)
			if lines := strings.Count(out, "\n"); lines > 1 {
				t.Errorf("snapshots stay:\n%s", out)
			}
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%d files stay, the first %s", len(left), left[0])
}

// What containerd's overlayfs puts inside the root lands in the same place here.
func TestContainedPaths(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": "exact"}}), startRegistry(t)
	ref := push(t, r, "contained:1", busybox(t), layer(t,
		image.Dir("/absolute"), image.File("/absolute/file", "a"), image.Dir("real"), image.Symlink("link", "/real"), image.File("link/below", "b")))
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
	text := "root = '" + root + "'\naddress = '" + filepath.Join(dir, "s.sock") + "'\ncontainerd_address = '" + n.Address() + "'\n"
	must(t, os.WriteFile(config, []byte(text), 0o600))
	module, err := node.ModuleRoot()
	must(t, err)
	out, err := exec.CommandContext(testContext(t), filepath.Join(module, "bin/containerd-dedup-grpc"), "--config", config).CombinedOutput()
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
	must(t, unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work"))
	defer func() { must(t, unix.Unmount(merged, unix.MNT_DETACH)) }()
	out := daemonFails(t, n, filepath.Join(merged, "root"))
	if !strings.Contains(out, "use ext4") {
		t.Error(out)
	}
	left, err := filepath.Glob(filepath.Join(merged, "root", "probe-*"))
	must(t, err)
	if len(left) > 0 {
		t.Errorf("the probe leaves %v", left)
	}
}
