package snapshotter

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// formerStore unpacks a store that the last build with layout 3 has written: the layers of formerTars, and a container
// over them. sameBoot: the machine has not been started again since, so the container may be running.
func formerStore(t *testing.T, sameBoot bool) string {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	f, err := os.Open("testdata/layout-3.tar.gz")
	must(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	must(t, err)
	r := tar.NewReader(z)
	for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
		must(t, err)
		at := filepath.Join(root, h.Name)
		if h.Typeflag == tar.TypeDir {
			must(t, os.MkdirAll(at, 0o700))
			continue
		}
		data, err := io.ReadAll(r)
		must(t, err)
		must(t, os.WriteFile(at, data, h.FileInfo().Mode()))
	}
	boot := []byte("another boot\n")
	if sameBoot {
		boot, err = os.ReadFile("/proc/sys/kernel/random/boot_id")
		must(t, err)
	}
	must(t, os.WriteFile(filepath.Join(root, "running"), boot, 0o600))
	if sameBoot {
		runFormer(t, root)
	}
	return root
}

// runFormer has an overlay mounted as a container of then has.
func runFormer(t *testing.T, root string) {
	t.Helper()
	needRoot(t)
	at, image := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(image, "file"), nil, 0o600))
	options := "lowerdir=" + image + "::" + filepath.Join(root, "objects")
	if kernelHere(t).Metacopy {
		options += ",metacopy=on"
	}
	must(t, unix.Mount("overlay", at, "overlay", 0, options))
	t.Cleanup(func() { must(t, unix.Unmount(at, unix.MNT_DETACH)) })
}

// kernelHere is what the kernel can do here.
func kernelHere(t *testing.T) lower.Features {
	t.Helper()
	needRoot(t)
	f, err := lower.Examine(t.TempDir())
	must(t, err)
	return f
}

func openPython(t *testing.T, root string, step func(string)) (*Snapshotter, error) {
	t.Helper()
	return New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Verity: testVerity(), Step: step,
		noDense: testNoDense()})
}

// top returns the committed snapshot that the container lies on.
func top(t *testing.T, s *Snapshotter) string {
	t.Helper()
	info, err := s.Stat(t.Context(), "container")
	must(t, err)
	return info.Parent
}

// shown lists the files of a snapshot's view: mtime and content, or target.
func shown(t *testing.T, s *Snapshotter, name string) map[string]string {
	t.Helper()
	mounts, err := s.View(t.Context(), "shown", name)
	must(t, err)
	files := map[string]string{}
	must(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			text, err := os.Readlink(path)
			if err != nil {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				text = string(data)
			}
			files[strings.TrimPrefix(path, root+"/")] = fmt.Sprintf("%d %s", fi.ModTime().Unix(), text)
			return nil
		})
	}))
	must(t, s.Remove(t.Context(), "shown"))
	return files
}

// freshStore pulls the same layers anew: what an upgrade has to come to.
func freshStore(t *testing.T) (files map[string]string, layers []content.LayerID) {
	t.Helper()
	s, err := openPython(t, t.TempDir(), nil)
	must(t, err)
	defer func() { must(t, stop(s)) }()
	parent := ""
	for _, blob := range formerTars(t) {
		parent, _ = unpack(t, s, "one", parent, blob, nil)
	}
	layers, err = s.resolve(t.Context(), parent)
	must(t, err)
	return shown(t, s, parent), layers
}

// A store of the layout in which all pairs of Python's files had one timestamp becomes what a pull of the same images
// makes today, killed at any step; what a container may need that runs over an old chain image stays as long as it is
// there.
func TestUpgradeFromLayout3(t *testing.T) {
	want, layers := freshStore(t)
	steps := map[string]int{}
	var mu sync.Mutex // guards steps: two workers come by
	count := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		steps[name]++
	}
	boots := []bool{true, false}
	if missing := kernelHere(t).DataOnly; missing != nil {
		t.Logf("no container of then runs here: %v", missing)
		boots = []bool{false}
	}
	for _, sameBoot := range boots {
		t.Run(fmt.Sprintf("same boot %v", sameBoot), func(t *testing.T) {
			root := formerStore(t, sameBoot)
			old := objectPaths(t, root)
			s, err := openPython(t, root, count)
			must(t, err)
			isUpgraded(t, s, want, layers)
			must(t, stop(s))
			leavesOldObjects(t, root, old, sameBoot)
		})
	}
	for _, step := range []string{
		"former.noted", "ingest.object", "former.tree", "ingest.renamed", "former.renamed", "remove.tree", "remove.object",
	} {
		for nth := 1; nth <= 3; nth++ {
			if nth > steps[step]/len(boots) {
				if nth == 1 {
					t.Errorf("an upgrade does not come by %s: %v", step, steps)
				}
				continue
			}
			t.Run(fmt.Sprintf("killed at %s %d", step, nth), func(t *testing.T) {
				root := formerStore(t, boots[0])
				old := objectPaths(t, root)
				stopUpgrade(t, root, step, nth)
				s, err := openPython(t, root, nil)
				must(t, err)
				isUpgraded(t, s, want, layers)
				must(t, stop(s))
				leavesOldObjects(t, root, old, boots[0])
			})
		}
	}
}

// stopUpgrade ends an upgrade at a step, as a kill would: nothing that would be done after it is.
func stopUpgrade(t *testing.T, root, step string, nth int) {
	t.Helper()
	copied := t.TempDir()
	s, err := openPython(t, root, func(name string) {
		if name != step {
			return
		}
		if nth--; nth == 0 { // what a kill would leave
			must(t, os.CopyFS(copied, os.DirFS(root)))
		}
	})
	must(t, err)
	must(t, stop(s))
	must(t, os.RemoveAll(root))
	must(t, os.RemoveAll(filepath.Join(copied, "run")))
	must(t, os.Rename(copied, root))
}

func isUpgraded(t *testing.T, s *Snapshotter, want map[string]string, layers []content.LayerID) {
	t.Helper()
	if diff := cmp.Diff(want, shown(t, s, top(t, s))); diff != "" {
		t.Errorf("not what a pull shows (-pulled +upgraded):\n%s", diff)
	}
	chain, err := s.resolve(t.Context(), top(t, s))
	must(t, err)
	if !slices.Equal(chain, layers) {
		t.Errorf("layers %s, and pulled ones are %s", chain, layers)
	}
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil || len(found) > 0 {
		t.Errorf("check: %+v, %v", found, err)
	}
	if b, err := os.ReadFile(s.path("format")); err != nil || string(b) != layoutVersion+"\n" {
		t.Errorf("format: %q, %v", b, err)
	}
	for _, blob := range formerTars(t) { // known, and not ingested again
		in, err := s.layers.IngestBlob(t.Context(), blobOfBytes(blob))
		must(t, err)
		if !slices.Contains(layers, in.Layer) || in.Added.Inodes > 0 {
			t.Errorf("the same tar is layer %s, and adds %+v", in.Layer, in.Added)
		}
		s.layers.Release(in.Layer)
	}
}

// objectPaths lists the objects on the disk.
func objectPaths(t *testing.T, root string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(root, "objects/*/*"))
	must(t, err)
	for i := range paths {
		paths[i] = strings.TrimPrefix(paths[i], root)
	}
	return paths
}

// leavesOldObjects checks that a container that runs over the old chain image finds all objects, over restarts, until
// it is removed.
func leavesOldObjects(t *testing.T, root string, old []string, running bool) {
	t.Helper()
	missing := func() (n int) {
		have := objectPaths(t, root)
		for _, o := range old {
			if !slices.Contains(have, o) {
				n++
			}
		}
		return n
	}
	s, err := openPython(t, root, nil)
	must(t, err)
	if n := missing(); running && n > 0 {
		t.Errorf("%d objects are missing that the container needs", n)
	}
	must(t, s.Remove(t.Context(), "container"))
	must(t, stop(s))
	s, err = openPython(t, root, nil)
	must(t, err)
	defer func() { must(t, stop(s)) }()
	if missing() < len(old) {
		t.Error("objects that nothing needs any more stay")
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("check: %+v, %v", found, err)
	}
	if _, err := os.Stat(s.path("former")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the list of what the container needed: %v", err)
	}
}

// A layer that is damaged does not keep the others from being upgraded. It is out of service, and a pull brings it
// back.
func TestUpgradeOfDamagedLayer(t *testing.T) {
	want, layers := freshStore(t)
	root := formerStore(t, false)
	trees, err := filepath.Glob(filepath.Join(root, "layers/*"))
	must(t, err)
	for _, path := range trees {
		sum := mustParse(t, "sha256:"+filepath.Base(path))
		f, ok, err := tree.ReadFormer(path, content.LayerID{Sum: sum})
		must(t, err)
		if ok && len(f.Bytecode) > 1 {
			must(t, os.Remove(filepath.Join(root, "objects", f.Bytecode[0].Path())))
		}
	}
	s, err := openPython(t, root, nil)
	must(t, err)
	defer func() { must(t, stop(s)) }()
	if _, err := s.View(t.Context(), "v", top(t, s)); err == nil || !strings.Contains(err.Error(), "pull it again") {
		t.Errorf("a view of it: %v", err)
	}
	removeAll(t, s)
	parent := ""
	for _, blob := range formerTars(t) {
		parent, _ = unpack(t, s, "one", parent, blob, nil)
	}
	chain, err := s.resolve(t.Context(), parent)
	must(t, err)
	if diff := cmp.Diff(want, shown(t, s, parent)); diff != "" || !slices.Equal(chain, layers) {
		t.Errorf("pulled again: %s", diff)
	}
}

// removeAll removes all snapshots, children first.
func removeAll(t *testing.T, s *Snapshotter) {
	t.Helper()
	for range 4 {
		var names []string
		must(t, s.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
			names = append(names, info.Name)
			return nil
		}))
		for _, name := range names {
			_ = s.Remove(t.Context(), name) // one with children goes later
		}
	}
	s.layers.Wait()
}
