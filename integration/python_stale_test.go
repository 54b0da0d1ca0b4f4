package integration

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// pythonSource is one of two releases of a module, which differ in one character.
func pythonSource(version int) string { return fmt.Sprintf("x = 'version-%d'\n", version) }

// compiledLayer has CPython itself compile sources, in a container of ref, and returns them and all that it made as a
// layer of files.
func compiledLayer(t *testing.T, n *node.Node, ref string, sources map[string]string) *image.Layer {
	t.Helper()
	var entries []image.Entry
	must(t, n.Active(testContext(t), "overlayfs", ref, func(root string) error {
		top := filepath.Join(root, "app")
		for i, name := range sortedKeys(sources) {
			path := filepath.Join(top, name)
			at := time.Unix(1_700_000_000+int64(i)*1000, 0)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			err := os.WriteFile(path, []byte(sources[name]), 0o644)
			if err := errors.Join(err, os.Chtimes(path, at, at)); err != nil {
				return err
			}
		}
		compile := exec.Command("chroot", root, "python3", "-m", "compileall", "-q", "/app")
		if out, err := compile.CombinedOutput(); err != nil {
			return fmt.Errorf("compile: %w: %s", err, out)
		}
		return filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			e := image.Dir(strings.TrimPrefix(path, root+"/"))
			if !d.IsDir() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				e = image.File(strings.TrimSuffix(e.Name, "/"), string(data))
			}
			e.Time = fi.ModTime()
			entries = append(entries, e)
			return nil
		})
	}))
	return layer(t, entries...)
}

func sortedKeys(m map[string]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// inRoot runs a shell's commands in /app of a root file system, and then asks Python there what it imports.
func inRoot(root, script, imported string, env ...string) (string, error) {
	if out, err := shell(filepath.Join(root, "app"), script); err != nil {
		return "", fmt.Errorf("%s: %w: %s", script, err, out)
	}
	var versions []string
	for range 2 { // the second has what the first has compiled
		program := "import sys; sys.path.insert(0, '/app/" + imported + "'); import m; print(m.x)"
		cmd := exec.Command("chroot", root, "python3", "-c", program)
		cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("python: %w: %s", err, out)
		}
		versions = append(versions, strings.TrimSpace(string(out)))
	}
	return strings.Join(slices.Compact(versions), " and then "), nil
}

func shell(dir, script string) ([]byte, error) {
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = dir
	return cmd.CombinedOutput()
}

// debianPython is the layer of Debian with its Python alone.
func debianPython(t *testing.T) *image.Layer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: debootstrap and chroot do")
	}
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	base, err := set.Debian(testContext(t))
	must(t, err)
	return base
}

// A source that comes to be where another one of the same size was, by whatever keeps its times, runs: never the code
// of the other one.
func TestPythonTellsSourcesApart(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := debianPython(t)
	baseRef := pushDemo(t, r, "stale/base:1", base)
	pull(t, n, "overlayfs", baseRef)
	releases := map[string]string{"v1/m.py": pythonSource(1), "v2/m.py": pythonSource(2)}
	both := pushDemo(t, r, "stale/app:1", base, compiledLayer(t, n, baseRef, releases))
	rows := []struct{ name, script, imported string }{
		{"as it is", "true", "v2"},
		{"cp -a", "cp -a v2/m.py v1/m.py", "v1"},
		{"cp -a of the directory", "cp -a v2/. v1", "v1"},
		{"mv", "mv v2/m.py v1/m.py", "v1"},
		{"rsync -a", "rsync -a v2/m.py v1/m.py", "v1"},
		{"rsync -a of the directory", "rsync -a v2/ v1/", "v1"},
		{"tar", "tar -C v2 -c m.py | tar -C v1 -x", "v1"},
		{"symlink", "ln -sf ../v2/m.py v1/m.py", "v1"},
		{"symlink to the directory", "rm -r v1; ln -s v2 v1", "v1"},
		{"hard link", "ln -f v2/m.py v1/m.py", "v1"},
		{"symlink of __pycache__", "rm -r v2/__pycache__; ln -s ../v1/__pycache__ v2/__pycache__", "v2"},
		{"compileall", "cp -a v2/m.py v1/m.py; chroot .. python3 -m compileall /app/v1 | grep -q ^Compiling", "v1"},
		{"symlink of a compiled file", "cd v2/__pycache__; ln -sf ../../v1/__pycache__/*.pyc .", "v2"},
	}
	for _, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
		pull(t, n, snapshotter, both)
		for _, row := range rows {
			t.Run(snapshotter+"/"+row.name, func(t *testing.T) {
				if _, err := exec.LookPath("rsync"); err != nil && strings.HasPrefix(row.script, "rsync") {
					t.Skip("rsync is missing: apt-get install rsync")
				}
				must(t, n.Active(testContext(t), snapshotter, both, func(root string) error {
					got, err := inRoot(root, row.script, row.imported)
					if err == nil && got != "version-2" {
						t.Errorf("%s: Python runs %s", row.script, got)
					}
					return err
				}))
			})
		}
	}
	upgradedImage(t, n, base, baseRef, r.Ref)
}

// upgradedImage keeps compiled files on a volume (PYTHONPYCACHEPREFIX), while the image that they are of is replaced
// by the next one.
func upgradedImage(t *testing.T, n *node.Node, base *image.Layer, baseRef string, ref func(string) string) {
	t.Helper()
	var refs []string
	for version := 1; version <= 2; version++ {
		app := compiledLayer(t, n, baseRef, map[string]string{"cur/m.py": pythonSource(version)})
		img, err := image.New(image.Options{}, base, app)
		must(t, err)
		refs = append(refs, ref(fmt.Sprintf("stale/release:%d", version)))
		must(t, image.Push(testContext(t), refs[version-1], img))
	}
	// The sources have the same time: overlayfs runs the old code, and we must not.
	pull(t, n, node.Snapshotter, refs[0])
	pull(t, n, node.Snapshotter, refs[1])
	volume := t.TempDir()
	for i, want := range []string{"version-1", "version-2"} {
		must(t, n.Active(testContext(t), node.Snapshotter, refs[i], func(root string) error {
			if out, err := shell(root, "mkdir cache && cp -a "+volume+"/. cache/"); err != nil {
				return fmt.Errorf("fill the cache: %w: %s", err, out)
			}
			got, err := inRoot(root, "true", "cur", "PYTHONPYCACHEPREFIX=/cache")
			if err == nil && got != want {
				t.Errorf("PYTHONPYCACHEPREFIX: Python runs %s, and the image has %s", got, want)
			}
			if out, cerr := shell(root, "cp -a cache/. "+volume+"/ && ls -R cache | grep -q pyc"); cerr != nil {
				err = errors.Join(err, fmt.Errorf("keep the cache: %w: %s", cerr, out))
			}
			return err
		}))
	}
}

// A layer that deletes all compiled files is exported as that: no source has changed.
func TestDeletedBytecodeChangesNothingElse(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := debianPython(t)
	baseRef := pushDemo(t, r, "deleted/base:1", base)
	pull(t, n, "overlayfs", baseRef)
	app := compiledLayer(t, n, baseRef, map[string]string{
		"a/m.py": pythonSource(1), "a/n.py": pythonSource(2), "b/m.py": strings.Repeat(pythonSource(1), 100),
	})
	gone := image.Entry{Name: "app/a/.wh.__pycache__", Type: tar.TypeReg, Mode: 0o644}
	also := image.Entry{Name: "app/b/.wh.__pycache__", Type: tar.TypeReg, Mode: 0o644}
	bb := busybox(t)
	before, after := push(t, r, "deleted/app:1", bb, app), push(t, r, "deleted/app:2", bb, app, layer(t, gone, also))
	exported := map[string][]string{}
	for _, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
		pull(t, n, snapshotter, before)
		pull(t, n, snapshotter, after)
		exported[snapshotter] = exportedBetween(t, n, snapshotter, before, after)
	}
	if d := cmp.Diff(exported["overlayfs"], exported[node.Snapshotter]); d != "" || len(exported["overlayfs"]) == 0 {
		t.Errorf("exported (-overlayfs +dedup):\n%s", d)
	}
	for _, fidelity := range []content.Fidelity{content.Normalized, content.Exact} {
		other := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": string(fidelity)}})
		pull(t, other, node.Snapshotter, before)
		pull(t, other, node.Snapshotter, after)
		if d := cmp.Diff(exported["overlayfs"], exportedBetween(t, other, node.Snapshotter, before, after)); d != "" {
			t.Errorf("%s: exported (-overlayfs +dedup):\n%s", fidelity, d)
		}
	}
}

// exportedBetween names what containerd's differ writes as the layer between two images.
func exportedBetween(t *testing.T, n *node.Node, snapshotter, before, after string) (names []string) {
	t.Helper()
	ctx, done, err := n.Client().WithLease(testContext(t))
	must(t, err)
	defer func() { must(t, done(context.WithoutCancel(ctx))) }()
	var sides [2][]mount.Mount
	sn := n.Client().SnapshotService(snapshotter)
	for i, ref := range []string{before, after} {
		chain, err := n.ChainID(ctx, ref)
		must(t, err)
		key := node.NewID("exported")
		sides[i], err = sn.View(ctx, key, chain)
		must(t, err)
		defer func() { must(t, sn.Remove(context.WithoutCancel(ctx), key)) }()
	}
	plain := diff.WithMediaType(ocispec.MediaTypeImageLayer)
	desc, err := n.Client().DiffService().Compare(ctx, sides[0], sides[1], plain)
	must(t, err)
	ra, err := n.Client().ContentStore().ReaderAt(ctx, desc)
	must(t, err)
	defer ra.Close()
	r := tar.NewReader(io.NewSectionReader(ra, 0, desc.Size))
	for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
		must(t, err)
		names = append(names, h.Name)
	}
	slices.Sort(names)
	return names
}
