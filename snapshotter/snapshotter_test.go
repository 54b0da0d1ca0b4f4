package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// open starts a snapshotter on root and checks at the end that it leaves nothing mounted.
func open(t *testing.T, root string) *Snapshotter {
	t.Helper()
	needRoot(t)
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact,
		Verity: testVerity(), PageCache: testPageCache(), noDense: testNoDense()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(s); err != nil {
			t.Error(err)
		}
		if left := mountsBelow(t, root); len(left) > 0 {
			t.Errorf("still mounted: %v", left)
		}
	})
	return s
}

func layerTar(t *testing.T, files map[string]string) []byte {
	t.Helper()
	b, err := tarOfFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tarOfFiles(files map[string]string) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)),
			ModTime: time.Unix(1700000000, 0)}); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, data); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}

func ns(t *testing.T, name string) context.Context {
	return namespaces.WithNamespace(t.Context(), name)
}

func unpack(t *testing.T, s *Snapshotter, namespace, parent string, blob []byte, labels map[string]string) (name string,
	applied bool) {
	t.Helper()
	ctx := ns(t, namespace)
	var parentChain content.ChainID
	if parent != "" {
		parentChain, _ = chainOfName(parent)
	}
	diffID := content.DiffID{Sum: mustParse(t, digest.FromBytes(blob).String())}
	chain := parentChain.Chain(diffID).Digest().String()
	opts := []snapshots.Opt{snapshots.WithLabels(map[string]string{labelRef: chain}), snapshots.WithLabels(labels)}
	key := namespace + "/1/extract-" + chain
	mounts, err := s.Prepare(ctx, key, parent, opts...)
	if errdefs.IsAlreadyExists(err) {
		return adopt(t, s, ctx, chain, parent), false
	}
	if err != nil {
		t.Fatal(err)
	}
	upper, ok, err := s.Extraction(ctx, mounts)
	if err != nil || !ok {
		t.Fatalf("no extraction: %v, %v", mounts, err)
	}
	in, err := s.Layers().IngestBlob(ctx, layer.Blob{Digest: digest.FromBytes(append([]byte(key), blob...)),
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(blob)), nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Applied(ctx, upper, in); err != nil {
		t.Fatal(err)
	}
	name = namespace + "/2/" + chain
	if err := s.Commit(ctx, name, key, opts...); err != nil {
		t.Fatal(err)
	}
	return name, true
}

func mustParse(t *testing.T, text string) content.Sum {
	t.Helper()
	sum, err := content.ParseSum(text)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// adopt finds a served snapshot as containerd's metadata store does.
func adopt(t *testing.T, s *Snapshotter, ctx context.Context, chain, parent string) string {
	t.Helper()
	var found []string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			found = append(found, info.Name)
		}
		return nil
	}, `labels."containerd.io/snapshot.ref"==`+chain+`,parent=="`+parent+`"`)
	if err != nil || len(found) == 0 {
		t.Fatal(found, err)
	}
	return found[0]
}

// read mounts a view of a snapshot and returns a file's content.
func read(t *testing.T, s *Snapshotter, parent, file string) string {
	t.Helper()
	key := "view-" + t.Name() + file
	mounts, err := s.View(t.Context(), key, parent)
	if err != nil {
		t.Fatal(err)
	}
	var data []byte
	err = mount.WithTempMount(t.Context(), mounts, func(root string) (err error) {
		data, err = os.ReadFile(filepath.Join(root, file))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestKnownLayers(t *testing.T) {
	s := open(t, t.TempDir())
	base := layerTar(t, map[string]string{"a": strings.Repeat("base", 1000)})
	upper := layerTar(t, map[string]string{"b": strings.Repeat("upper", 1000)})
	other := layerTar(t, map[string]string{"c": "other"})

	base1, applied := unpack(t, s, "one", "", base, nil)
	if !applied {
		t.Fatal("an unknown layer is served")
	}
	upper1, _ := unpack(t, s, "one", base1, upper, nil)

	// In another namespace, without any label but the target's, as containerd before 2.3 sends it.
	base2, applied := unpack(t, s, "two", "", base, nil)
	if applied || base2 == base1 {
		t.Errorf("base layer: applied %v, same snapshot %v", applied, base1 == base2)
	}
	upper2, applied := unpack(t, s, "two", base2, upper, nil)
	if applied || upper2 == upper1 {
		t.Errorf("upper layer: applied %v, same snapshot %v", applied, upper1 == upper2)
	}
	// Under another parent, with the label of containerd 2.3.
	other2, _ := unpack(t, s, "two", "", other, nil)
	moved, applied := unpack(t, s, "two", other2, upper, map[string]string{labelDiffID: digest.FromBytes(upper).String()})
	if applied {
		t.Error("a known layer on another parent is applied again")
	}
	if got := read(t, s, moved, "b") + read(t, s, moved, "c"); got != strings.Repeat("upper", 1000)+"other" {
		t.Errorf("%d bytes", len(got))
	}
	// What one namespace removes, another keeps.
	for _, name := range []string{upper1, base1} {
		if err := s.Remove(ns(t, "one"), name); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, s, upper2, "a"); got != strings.Repeat("base", 1000) {
		t.Errorf("%d bytes", len(got))
	}
}

// The diff service serves nothing but empty extractions: what somebody wrote would be lost.
func TestOnlyEmptyExtractionsAreApplied(t *testing.T) {
	s := open(t, t.TempDir())
	for _, row := range []struct {
		key   string
		write bool
		want  bool
	}{{"default/1/extract-1 sha256:00", false, true}, {"default/2/extract-2 sha256:00", true, false},
		{"default/3/container", false, false}} {
		mounts, err := s.Prepare(t.Context(), row.key, "")
		if err != nil {
			t.Fatal(err)
		}
		upper, _ := s.upperOf(mounts)
		if row.write {
			if err := os.WriteFile(filepath.Join(upper, "f"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, ok, err := s.Extraction(t.Context(), mounts); ok != row.want || err != nil {
			t.Errorf("%s: %v, %v", row.key, ok, err)
		}
	}
}

// A name may be taken again while the directory of its former owner is ingested.
func TestNameTakenAgainDuringIngest(t *testing.T) {
	s := open(t, t.TempDir())
	for i := range 5 {
		for _, text := range []string{"first", "second"} {
			mounts, err := s.Prepare(t.Context(), "active", "")
			if err != nil {
				t.Fatal(err)
			}
			upper, _ := s.upperOf(mounts)
			if err := os.WriteFile(filepath.Join(upper, "f"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := s.Commit(t.Context(), "name", "active"); err != nil {
				t.Fatal(err)
			}
			if text == "first" {
				if err := s.Remove(t.Context(), "name"); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got := read(t, s, "name", "f"); got != "second" {
			t.Fatalf("round %d: %q", i, got)
		}
		if err := s.Remove(t.Context(), "name"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFetchedOnlyServesNothingInPrepare(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), FetchedOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stop(s) }()
	blob := layerTar(t, map[string]string{"a": "x"})
	unpack(t, s, "one", "", blob, nil)
	if _, applied := unpack(t, s, "two", "", blob, nil); !applied {
		t.Error("a known layer is served to a pull that did not fetch it")
	}
}

func TestWrongHintsAreIgnored(t *testing.T) {
	s := open(t, t.TempDir())
	known := layerTar(t, map[string]string{"secret": "x"})
	unpack(t, s, "one", "", known, nil)
	for name, hint := range map[string]string{
		"known diffID that does not fit": digest.FromBytes(known).String(),
		"unknown diffID":                 digest.FromString("no").String(),
		"garbage":                        "sha256:../../x",
	} {
		_, err := s.Prepare(ns(t, "two"), "k"+name, "", snapshots.WithLabels(map[string]string{
			labelRef: digest.FromString("target").String(), labelDiffID: hint,
			labelLayer: strings.Repeat("0", 64), labelPending: "true",
		}))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		info, err := s.Stat(t.Context(), "k"+name)
		if err != nil || info.Labels[labelLayer] != "" || info.Labels[labelPending] != "" {
			t.Errorf("%s: %+v, %v", name, info, err)
		}
	}
}

func TestPrivateLabelsSurviveUpdate(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": "text"}),
		map[string]string{"containerd.io/snapshot/x": "1"})
	info, err := s.Stat(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	info.Labels = map[string]string{"mine": "2", labelLayer: "stolen"}
	if info, err = s.Update(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{"mine": "2"}, info.Labels); d != "" {
		t.Error(d)
	}
	if _, err := s.Update(t.Context(), info, "labels."+labelLayer); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if got := read(t, s, name, "a"); got != "text" {
		t.Errorf("%q", got)
	}
}

func TestRestartAndReboot(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("text", 1000)}), nil)
	mounts, err := s.Prepare(t.Context(), "container", name)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	want := map[lower.PageCache]int{lower.PageCacheShared: 2, lower.PageCachePrivate: 1} // the chain image, and its pack
	if len(mountsBelow(t, root)) != want[s.PageCache()] {
		t.Errorf("a stop of the daemon unmounts what a container may need: %v", mountsBelow(t, root))
	}
	for _, loss := range []string{"nothing", "mounts", "chain images too"} {
		t.Run(loss, func(t *testing.T) {
			if loss != "nothing" {
				if err := stop(s); err != nil {
					t.Fatal(err)
				}
				if err := os.RemoveAll(filepath.Join(root, "run")); err != nil {
					t.Fatal(err)
				}
			}
			if loss == "chain images too" {
				if err := os.RemoveAll(filepath.Join(root, dirChains)); err != nil {
					t.Fatal(err)
				}
			}
			s = open(t, root)
			again, err := s.Mounts(t.Context(), "container")
			if err != nil || cmp.Diff(mounts, again) != "" {
				t.Fatal(cmp.Diff(mounts, again), err)
			}
			err = mount.WithTempMount(t.Context(), again, func(dir string) error {
				data, err := os.ReadFile(filepath.Join(dir, "a"))
				if len(data) != 4000 {
					t.Errorf("%d bytes", len(data))
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDamagedChainImageIsBuiltAgain(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": "text"}), nil)
	if got := read(t, s, name, "a"); got != "text" {
		t.Fatalf("%q", got)
	}
	images, err := filepath.Glob(filepath.Join(root, dirChains, "*"+lower.ImageSuffix))
	if err != nil || len(images) != 1 {
		t.Fatal(images, err)
	}
	if err := errors.Join(os.Remove(images[0]), os.WriteFile(images[0], []byte("not an image"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, name, "a"); got != "text" {
		t.Errorf("%q", got)
	}
}

// A directory that is committed right before the daemon stops becomes a layer later.
func TestPendingSurvivesRestart(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	mounts, err := s.Prepare(t.Context(), "active", "")
	if err != nil {
		t.Fatal(err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "written"), []byte(strings.Repeat("w", 5000)), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "committed", "active"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, root)
	if got := read(t, s, "committed", "written"); len(got) != 5000 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestRemoveFreesEverything(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	base, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("a", 9000)}), nil)
	top, _ := unpack(t, s, "one", base, layerTar(t, map[string]string{"b": strings.Repeat("b", 9000)}), nil)
	if _, err := s.Prepare(t.Context(), "container", top); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"container", top, base} {
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("still mounted: %v", left)
	}
	for _, dir := range []string{dirSnapshots, dirChains, dirIngest, "layers", "packs"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				t.Errorf("%s stays", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestOneDaemonPerRoot(t *testing.T) {
	root := t.TempDir()
	open(t, root)
	if _, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run2")}); err == nil ||
		!strings.Contains(err.Error(), "another daemon") {
		t.Error(err)
	}
}

// Without metadata.db nobody knows what is in use: nothing is served, and nothing removed.
func TestMissingMetadataIsRefused(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("a", 5000)}), nil)
	if err := stop(s); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(root, "metadata.db")); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"),
		Fidelity: content.Exact}); err == nil || !strings.Contains(err.Error(), "metadata.db is missing") {
		t.Fatalf("opened: %v", err)
	}
	for _, pattern := range []string{"packs/*", "layers/*"} {
		if found, err := filepath.Glob(filepath.Join(root, pattern)); err != nil || len(found) != 1 {
			t.Errorf("%s: %v, %v", pattern, found, err)
		}
	}
}

func TestUnknownLayoutIsRefused(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "format"), []byte("99\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run")}); err == nil ||
		!strings.Contains(err.Error(), `version "99"`) {
		t.Error(err)
	}
}

// metadata.db is durable before the directories of an active snapshot are: a power cut may leave it without, and its
// container still has to start.
func TestDirectoriesThatAPowerCutTook(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": "text"}), nil)
	mounts, err := s.Prepare(t.Context(), "container", name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(upperIn(t, s, mounts))); err != nil {
		t.Fatal(err)
	}
	again, err := s.Mounts(t.Context(), "container")
	if err != nil || cmp.Diff(mounts, again) != "" {
		t.Fatal(cmp.Diff(mounts, again), err)
	}
	err = mount.WithTempMount(t.Context(), again, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "a"), []byte("changed"), 0o600)
	})
	if err != nil {
		t.Error(err)
	}
}

func upperIn(t *testing.T, s *Snapshotter, mounts []mount.Mount) string {
	t.Helper()
	upper, ok := s.upperOf(mounts)
	if !ok {
		t.Fatalf("no upper directory in %+v", mounts)
	}
	return upper
}
