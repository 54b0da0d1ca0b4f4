package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// demoImages are the layers of the images of `make demo`: one Debian root, and a pip
// install of its own for each.
func demoImages(t *testing.T) (base *image.Layer, apps [2]*image.Layer) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: debootstrap and chroot do")
	}
	ctx := testContext(t)
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	base, err = set.Debian(ctx)
	must(t, err)
	for i := range apps {
		apps[i], err = set.App(ctx, i+1)
		must(t, err)
	}
	return base, apps
}

// pushDemo is push without sending the large blobs through a socket first.
func pushDemo(t *testing.T, r *registry.Registry, name string, layers ...*image.Layer) string {
	t.Helper()
	must(t, image.Seed(r.Dir(), layers...))
	return push(t, r, name, layers...)
}

// The second image is pulled into a store that holds nearly all of its objects, and its
// base layer is a hit. What each takes on the disk comes out in lines that begin with "row: ".
func TestEqualityDemo(t *testing.T) {
	t.Parallel()
	base, apps := demoImages(t)
	n, r := startDedup(t, exact), startRegistry(t)
	first := pushDemo(t, r, "demo/one:1", base, apps[0])
	second := pushDemo(t, r, "demo/two:1", base, apps[1])
	for _, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
		pull(t, n, snapshotter, first)
		one := diskOf(t, n, snapshotter)
		pull(t, n, snapshotter, second)
		t.Logf("row: demo %s=%s, %s", snapshotter, one, diskOf(t, n, snapshotter))
	}
	equal(t, dump(t, n, "overlayfs", first), dump(t, n, node.Snapshotter, first), noRootTime)
	equal(t, dump(t, n, "overlayfs", second), dumpActive(t, n, node.Snapshotter, second), noRootTime)
}

// The default fidelity changes the timestamp of valid pairs of Python source and
// compiled file, in the header of the one and as the mtime of the other, and nothing else.
func TestPythonDiffersOnlyInPairs(t *testing.T) {
	t.Parallel()
	base, apps := demoImages(t)
	n := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": "python"}})
	r := startRegistry(t)
	ref := pushDemo(t, r, "demo/two:1", base, apps[1])
	pull(t, n, node.Snapshotter, ref)
	pull(t, n, "overlayfs", ref)
	ctx := testContext(t)
	must(t, n.View(ctx, "overlayfs", ref, func(wantRoot string) error {
		return n.View(ctx, node.Snapshotter, ref, func(gotRoot string) error {
			want, err := rootfs.Dump(wantRoot)
			if err != nil {
				return err
			}
			got, err := rootfs.Dump(gotRoot)
			if err != nil {
				return err
			}
			p := pythonCheck{t: t, want: want, got: got, wantRoot: wantRoot, gotRoot: gotRoot}
			p.undo()
			equal(t, want, got, noRootTime)
			return nil
		})
	}))
}

// pythonCheck compares the image's tree with what the python fidelity made of it.
type pythonCheck struct {
	t                 *testing.T
	want, got         rootfs.Tree
	wantRoot, gotRoot string
}

// undo checks every compiled file, and takes back in got what may differ in valid pairs.
func (p pythonCheck) undo() {
	changed, kept, sources := 0, 0, map[string]bool{}
	for path, w := range p.want {
		source, ok := content.PycSource(path)
		if !ok || w.Type != "file" || p.got[path].Type != "file" {
			continue
		}
		if link := p.want[source]; link.Type == "symlink" && filepath.IsAbs(link.Target) {
			source = strings.TrimPrefix(filepath.Clean(link.Target), "/")
		} else if link.Type == "symlink" {
			source = filepath.Join(filepath.Dir(source), link.Target)
		}
		a, b := p.read(p.wantRoot, path), p.read(p.gotRoot, path)
		header, ok := content.ParsePyc(a)
		if !ok || !valid(header, p.want[source]) {
			kept++
			continue // equal compares it as it is
		}
		after, ok := content.ParsePyc(b)
		if !ok || !valid(after, p.got[source]) {
			p.t.Errorf("%s was valid for Python in the image, and is not any more", path)
		}
		if bytes.Equal(a, b) {
			kept++
			continue
		}
		changed++
		content.SetPycTime(b, header.Mtime)
		if stamp := sourceTime(p.t, p.want[source]); int64(after.Mtime) != stamp.Unix() || !bytes.Equal(a, b) {
			p.t.Errorf("%s differs in more than the timestamp of its source's bytes, %s", path, stamp)
			continue
		}
		e := p.got[path]
		e.SHA256 = w.SHA256
		p.got[path] = e
		sources[source] = true
	}
	for source := range sources {
		e := p.got[source]
		if stamp := sourceTime(p.t, p.want[source]); !e.MTime.Equal(stamp) {
			p.t.Errorf("%s has the mtime %s, and its compiled file %s", source, e.MTime, stamp)
		}
		e.MTime = p.want[source].MTime
		p.got[source] = e
	}
	p.t.Logf("%d compiled files with timestamps that follow from %d sources, %d as they were", changed, len(sources), kept)
	if changed < 1000 {
		p.t.Errorf("only %d pairs got another timestamp: the setting did nothing", changed)
	}
}

// sourceTime is the mtime that a source of a pair is to show.
func sourceTime(t *testing.T, source rootfs.Entry) time.Time {
	t.Helper()
	sum, err := content.ParseSum("sha256:" + source.SHA256)
	must(t, err)
	return time.Unix(int64(content.SourceTime(sum)), 0)
}

func valid(h content.PycHeader, source rootfs.Entry) bool {
	return source.Type == "file" && uint32(source.MTime.Unix()) == h.Mtime && uint32(source.Size) == h.Size
}

func (p pythonCheck) read(root, path string) []byte {
	data, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		p.t.Fatal(err)
	}
	if !strings.HasSuffix(path, ".pyc") {
		p.t.Fatalf("%s was taken for a compiled file", path)
	}
	return data
}
