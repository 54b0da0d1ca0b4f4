package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// stoppedStore is a store with an image of two layers and a container, whose daemon has stopped.
func stoppedStore(t *testing.T) (root string, names []string) {
	t.Helper()
	root = t.TempDir()
	s := open(t, root)
	parent := ""
	for i := range 2 {
		blob := layerTar(t, map[string]string{fmt.Sprint("file", i): strings.Repeat(fmt.Sprint("payload", i), 5000)})
		parent, _ = unpack(t, s, "one", parent, blob, nil)
		names = append(names, parent)
	}
	if _, err := s.Prepare(t.Context(), "container", parent); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Mounts(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	if err := stop(s); err != nil {
		t.Fatal(err)
	}
	return root, names
}

// state lists all files with size, mode and times.
func state(t *testing.T, root string) (lines []string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		lines = append(lines, fmt.Sprint(path, " ", fi.Mode(), " ", fi.Size(), " ", fi.ModTime()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// looked is what a check without a daemon finds; it changes nothing.
func looked(t *testing.T, root string) []Finding {
	t.Helper()
	before := state(t, root)
	o, err := OpenOffline(t.Context(), root, filepath.Join(root, "run"))
	if err != nil {
		t.Fatal(err)
	}
	found, err := o.Check(t.Context(), func(string, int64, int64) {})
	if err := errors.Join(err, o.Close()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, state(t, root)); diff != "" {
		t.Errorf("the check has changed something (-before +after):\n%s", diff)
	}
	return found
}

func kinds(found []Finding) (all []layer.FindingKind) {
	for _, f := range found {
		all = append(all, f.Kind)
	}
	return all
}

// flipText changes a byte of a file that holds text.
func flipText(t *testing.T, path, text string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte(text))
	if at < 0 {
		t.Fatalf("%s does not hold %q", path, text)
	}
	b[at] ^= 1
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func onlyFile(t *testing.T, pattern string) string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatal(pattern, paths, err)
	}
	return paths[0]
}

// packWith returns the pack that holds a text.
func packWith(t *testing.T, root, text string) string {
	t.Helper()
	paths, _ := filepath.Glob(filepath.Join(root, "packs", "*"))
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil && bytes.Contains(b, []byte(text)) {
			return p
		}
	}
	t.Fatalf("no pack holds %q", text)
	return ""
}

// A store is verified while its daemon is down, and no byte of it changes.
func TestCheckWithoutDaemon(t *testing.T) {
	if testVerity() == "on" {
		t.Skip("files with fs-verity cannot be written to")
	}
	for name, row := range map[string]struct {
		damage func(t *testing.T, root string, names []string)
		kinds  []layer.FindingKind
		harms  int // which of names, at least
	}{
		"nothing is damaged": {func(*testing.T, string, []string) {}, nil, -1},
		"a payload": {func(t *testing.T, root string, _ []string) {
			flipText(t, packWith(t, root, "payload0"), "payload0")
		}, []layer.FindingKind{layer.DamagedObject}, 0},
		"a pack is gone": {func(t *testing.T, root string, _ []string) {
			if err := os.Remove(packWith(t, root, "payload1")); err != nil {
				t.Fatal(err)
			}
		}, []layer.FindingKind{layer.DamagedObject}, 1},
		"a tree": {func(t *testing.T, root string, _ []string) {
			path := onlyFile(t, filepath.Join(root, "layers", "*"))
			if err := os.Truncate(path, 50); err != nil {
				t.Fatal(err)
			}
		}, []layer.FindingKind{layer.DamagedTree}, -1},
		"a chain image": {func(t *testing.T, root string, _ []string) {
			for _, path := range mustGlob(t, filepath.Join(root, "chains", "*")) {
				if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte("file1")) {
					flipText(t, path, "file1")
				}
			}
		}, []layer.FindingKind{DamagedChain}, 1},
		"what no snapshot uses": {func(t *testing.T, root string, _ []string) {
			if err := os.Mkdir(filepath.Join(root, "snapshots", "12345"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, []layer.FindingKind{StrayDirectory}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			root, names := stoppedStore(t)
			row.damage(t, root, names)
			found := looked(t, root)
			if !slices.Equal(kinds(found), row.kinds) {
				t.Fatalf("%+v", found)
			}
			if row.harms >= 0 && !slices.Contains(found[0].Snapshots, names[row.harms]) {
				t.Errorf("%q harms %q, not %q", found[0].Path, found[0].Snapshots, names[row.harms])
			}
		})
	}
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// With a metadata.db for which the daemon refuses to start, packs and trees are verified all the same, and nothing is
// called unused.
func TestCheckWithoutMetadata(t *testing.T) {
	root, _ := stoppedStore(t)
	flipText(t, packWith(t, root, "payload0"), "payload0")
	db := filepath.Join(root, "metadata.db")
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func() error{
		"gone":    func() error { return os.Remove(db) },
		"empty":   func() error { return os.WriteFile(db, nil, 0o600) },
		"garbage": func() error { return os.WriteFile(db, bytes.Repeat([]byte("garbage\n"), 4096), 0o600) },
		"cut":     func() error { return os.WriteFile(db, whole[:5000], 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			if s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run")}); err == nil {
				t.Fatal("the daemon starts", stop(s))
			}
			found := looked(t, root)
			if diff := cmp.Diff([]layer.FindingKind{DamagedMetadata, layer.DamagedObject}, kinds(found)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			o, err := OpenOffline(t.Context(), root, filepath.Join(root, "run"))
			if err != nil {
				t.Fatal(err)
			}
			defer o.Close()
			found, err = o.Unused(t.Context(), GCOptions{})
			if err == nil || !strings.Contains(err.Error(), "put the file back") {
				t.Error(found, err)
			}
		})
	}
}

// A store that a daemon serves is not read behind its back, and one that starts meanwhile makes what was found void.
func TestCheckBesideDaemon(t *testing.T) {
	root, _ := stoppedStore(t)
	o, err := OpenOffline(t.Context(), root, filepath.Join(root, "run"))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	s := open(t, root)
	if _, err := OpenOffline(t.Context(), root, filepath.Join(root, "run")); !errors.Is(err, ErrServed) {
		t.Error(err)
	}
	if _, err := o.Check(t.Context(), func(string, int64, int64) {}); !errors.Is(err, ErrServed) {
		t.Error(err)
	}
	if err := stop(s); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Unused(t.Context(), GCOptions{}); !errors.Is(err, ErrServed) {
		t.Error("a daemon came and went:", err)
	}
}

// What a start would remove is listed before.
func TestUnusedWithoutDaemon(t *testing.T) {
	root, _ := stoppedStore(t)
	left := filepath.Join(root, "layers", strings.Repeat("ab", 32))
	if err := os.WriteFile(left, []byte("no tree"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := state(t, root)
	o, err := OpenOffline(t.Context(), root, filepath.Join(root, "run"))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	found, err := o.Unused(t.Context(), GCOptions{Chains: true})
	if err != nil || len(found) < 1 || !slices.ContainsFunc(found, func(f Finding) bool { return f.Path == left }) {
		t.Errorf("%+v, %v", found, err)
	}
	for _, f := range found { // the chain of the first layer alone is in use by nothing
		if f.Path != left && f.Kind != StrayChain {
			t.Errorf("%+v", f)
		}
	}
	if diff := cmp.Diff(before, state(t, root)); diff != "" {
		t.Errorf("(-before +after)\n%s", diff)
	}
}
