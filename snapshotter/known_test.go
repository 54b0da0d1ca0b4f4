package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"go.etcd.io/bbolt"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// contentStore is containerd's own, with namespaces.
func contentStore(t testing.TB) ctdcontent.Store {
	t.Helper()
	dir := t.TempDir()
	files, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return metadata.NewDB(db, files, nil).ContentStore()
}

// pulled is an image as a client has it in containerd's content store.
type pulled struct {
	tars   [][]byte
	chains []string
	diffs  []string
}

func newPulled(tars ...[]byte) (p pulled) {
	p.tars = tars
	var diffs []digest.Digest
	for _, b := range tars {
		diffs = append(diffs, digest.FromBytes(b))
		p.diffs = append(p.diffs, digest.FromBytes(b).String())
	}
	for _, c := range identity.ChainIDs(diffs) {
		p.chains = append(p.chains, c.String())
	}
	return p
}

// write puts manifest and config into store, and the blobs of layers.
func (p pulled) write(t testing.TB, ctx context.Context, store ctdcontent.Store, layers ...int) {
	t.Helper()
	var config ocispec.Image
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i, b := range p.tars {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(p.diffs[i]))
		manifest.Layers = append(manifest.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer,
			Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	data, _ := json.Marshal(config)
	manifest.Config = putBlob(t, ctx, store, ocispec.MediaTypeImageConfig, data, nil)
	data, _ = json.Marshal(manifest)
	putBlob(t, ctx, store, ocispec.MediaTypeImageManifest, data,
		map[string]string{"containerd.io/gc.ref.content.config": manifest.Config.Digest.String()})
	for _, i := range layers {
		putBlob(t, ctx, store, ocispec.MediaTypeImageLayer, p.tars[i], nil)
	}
}

func putBlob(t testing.TB, ctx context.Context, store ctdcontent.Store, mediaType string, data []byte,
	labels map[string]string) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	err := ctdcontent.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(data), desc,
		ctdcontent.WithLabels(labels))
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

// openWith is open with a content store.
func openWith(t *testing.T, store ctdcontent.Store, fetchedOnly bool) *Snapshotter {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), FetchedOnly: fetchedOnly,
		Verity: testVerity(), PageCache: testPageCache(), noDense: testNoDense(), Blobs: blobs.New(store, nil)})
	if err != nil {
		t.Fatal(err)
	}
	s.ingestPatience = time.Minute // no test asks whether an ingest is fast; one that asks what is late sets its own
	t.Cleanup(func() {
		if err := stop(s); err != nil {
			t.Error(err)
		}
	})
	return s
}

func prepare(s *Snapshotter, ctx context.Context, parent string, labels map[string]string) ([]mount.Mount, error) {
	ns, _ := namespaces.Namespace(ctx)
	return s.Prepare(ctx, ns+"/1/extract-"+labels[labelRef], parent, snapshots.WithLabels(labels))
}

// files returns what a view of a snapshot shows: the contents of its files by path.
func files(t *testing.T, s *Snapshotter, ctx context.Context, name string) map[string]string {
	t.Helper()
	mounts, err := s.View(ctx, "view-"+name, name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Remove(ctx, "view-"+name); err != nil {
			t.Error(err)
		}
	}()
	got := map[string]string{}
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		return filepath.Walk(root, func(path string, fi os.FileInfo, err error) error {
			if err != nil || !fi.Mode().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			got[strings.TrimPrefix(path, root+"/")] = string(data)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func payload(name string) string { return strings.Repeat(name, 1000) }

func TestBlobAtHand(t *testing.T) {
	for _, fetchedOnly := range []bool{false, true} {
		t.Run(fmt.Sprintf("fetched only %v", fetchedOnly), func(t *testing.T) {
			store := contentStore(t)
			s, ctx := openWith(t, store, fetchedOnly), ns(t, "one")
			img := newPulled(layerTar(t, map[string]string{"a": payload("a")}),
				layerTar(t, map[string]string{"b": payload("b")}))
			img.write(t, ctx, store, 0, 1)
			base := servedBy(t, s, ctx, "", img, 0)
			top := servedBy(t, s, ctx, base, img, 1)
			if got := files(t, s, ctx, top); got["a"] != payload("a") || got["b"] != payload("b") {
				t.Errorf("the image shows %d files", len(got))
			}
			// Another namespace that has no blob is served what is known, unless it has to fetch.
			_, err := prepare(s, ns(t, "two"), "", map[string]string{labelRef: img.chains[0]})
			if errdefs.IsAlreadyExists(err) == fetchedOnly {
				t.Errorf("another namespace gets %v", err)
			}
		})
	}
}

// servedBy prepares layer i of an image without any hint, and adopts what is served.
func servedBy(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled, i int) string {
	t.Helper()
	if _, err := prepare(s, ctx, parent, map[string]string{labelRef: img.chains[i]}); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("layer %d: %v", i, err)
	}
	return adopt(t, s, ctx, img.chains[i], parent)
}

// A blob that is not what the image says, or not at all, is a miss: nothing is served, nothing stays.
func TestBlobAtHandIsNotTheLayer(t *testing.T) {
	store := contentStore(t)
	s, ctx := openWith(t, store, false), ns(t, "one")
	liar := newPulled(layerTar(t, map[string]string{"a": "a"}), layerTar(t, map[string]string{"b": "b"}),
		[]byte("no tar at all"))
	claimed := newPulled(layerTar(t, map[string]string{"good": "good"}))
	liar.diffs[0], liar.chains[0] = claimed.diffs[0], claimed.chains[0]
	liar.write(t, ctx, store, 0, 2)
	for name, chain := range map[string]string{"other tar": liar.chains[0], "missing": liar.chains[1],
		"garbage": liar.chains[2]} {
		mounts, err := prepare(s, ctx, "", map[string]string{labelRef: chain})
		if err != nil || mounts == nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.Remove(ctx, "one/1/extract-"+chain); err != nil {
			t.Error(err)
		}
	}
	s.wg.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(s.path("layers", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("layers stay: %v, %v", left, err)
	}
}

// Labels that do not fit together are ignored: the layer is found without them, or it is a miss, and never a
// wrong one.
func TestWrongHintsInPrepare(t *testing.T) {
	store := contentStore(t)
	s, ctx := openWith(t, store, false), ns(t, "one")
	img := newPulled(layerTar(t, map[string]string{"a": payload("a")}), layerTar(t, map[string]string{"b": payload("b")}))
	other := newPulled(layerTar(t, map[string]string{"x": payload("x")}),
		layerTar(t, map[string]string{"y": payload("y")}))
	for _, p := range []pulled{img, other} {
		p.write(t, ctx, store, 0, 1)
	}
	base := servedBy(t, s, ctx, "", img, 0)
	servedBy(t, s, ctx, base, img, 1)
	otherBase := servedBy(t, s, ctx, "", other, 0)
	// A blob that no image of the namespace explains: only a label leads to it.
	putBlob(t, ns(t, "hints"), store, ocispec.MediaTypeImageLayer, other.tars[1], nil)
	const diffID, parent, blob = "ignoring label " + labelDiffID, "ignoring label " + labelParentChain, "ignoring label " +
		labelCRIDigest
	for name, row := range map[string]struct {
		parent string
		target string
		labels map[string]string
		shows  string // a file of the layer that is served; "" for a miss
		warns  string // "" where nothing is wrong with what was looked at
	}{
		"another diffID": {base, img.chains[1], map[string]string{labelDiffID: other.diffs[1]}, "b", diffID},
		"no diffID":      {base, img.chains[1], map[string]string{labelDiffID: "sha256:zz"}, "b", diffID},
		"another parent": {base, img.chains[1], map[string]string{labelParentChain: other.chains[0],
			labelDiffID: img.diffs[1]}, "b", parent},
		"no parent": {base, img.chains[1],
			map[string]string{labelParentChain: "x", labelDiffID: img.diffs[1]}, "b", parent},
		"another blob": {base, img.chains[1],
			map[string]string{labelCRIDigest: digest.FromBytes(other.tars[1]).String()}, "b", ""},
		"no digest": {base, img.chains[1], map[string]string{labelCRIDigest: "../../etc/passwd"}, "b",
			blob},
		"unknown chain, known diffID": {base, other.chains[1], map[string]string{labelDiffID: other.diffs[1]}, "", diffID},
		"unknown chain, known blob": {base, other.chains[1],
			map[string]string{labelCRIDigest: digest.FromBytes(other.tars[1]).String()}, "", "ignoring blob " +
				digest.FromBytes(other.tars[1]).String()},
		"unknown chain, no such blob": {base, other.chains[1],
			map[string]string{labelCRIDigest: digest.FromString("x").String()}, "", ""},
		"chain of another parent": {otherBase, img.chains[1],
			map[string]string{labelDiffID: img.diffs[1], labelParentChain: img.chains[0]}, "", parent},
		"a base layer with a parent": {"", img.chains[0],
			map[string]string{labelDiffID: img.diffs[0], labelParentChain: other.chains[0]}, "a", parent},
		"a parent and no diffID": {"", img.chains[1], map[string]string{labelParentChain: img.chains[0]}, "", ""},
		"a parent that does not fit": {"", img.chains[1], map[string]string{labelParentChain: other.chains[0],
			labelDiffID: img.diffs[1]}, "", diffID},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, said := logged(ns(t, "hints"))
			row.labels[labelRef] = row.target
			mounts, err := prepare(s, ctx, row.parent, row.labels)
			switch {
			case row.shows != "":
				if !errdefs.IsAlreadyExists(err) {
					t.Fatalf("not served: %v, %v", mounts, err)
				}
				if got := files(t, s, ctx, adopt(t, s, ctx, row.target, row.parent)); got[row.shows] != payload(row.shows) {
					t.Errorf("shows %d files, none as wanted", len(got))
				}
			case err != nil || mounts == nil || mounts[0].ReadOnly():
				t.Fatalf("served %v, %v", mounts, err)
			default:
				if err := s.Remove(ctx, "hints/1/extract-"+row.target); err != nil {
					t.Error(err)
				}
			}
			if got := said.String(); !strings.Contains(got, row.warns) || row.warns == "" && got != "" {
				t.Errorf("the log says %q, want %q", got, row.warns)
			}
		})
	}
}

// logged returns a ctx whose warnings can be read.
func logged(ctx context.Context) (context.Context, *bytes.Buffer) {
	var said bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&said)
	logger.SetLevel(logrus.WarnLevel)
	return log.WithLogger(ctx, logrus.NewEntry(logger)), &said
}

// containerd 2.4 prepares layers without their parents when it unpacks side by side: a known one is
// staged, and gets its parent at Commit.
func TestStagedLayers(t *testing.T) {
	store := contentStore(t)
	s, ctx := openWith(t, store, false), ns(t, "one")
	img := newPulled(layerTar(t, map[string]string{"a": payload("a"), "gone": "x"}),
		layerTar(t, map[string]string{"b": payload("b"), ".wh.gone": ""}), layerTar(t, map[string]string{"c": payload("c")}))
	img.write(t, ctx, store, 0, 1, 2)
	base := servedBy(t, s, ctx, "", img, 0)
	known := base
	for i := 1; i < 3; i++ {
		known = servedBy(t, s, ctx, known, img, i)
	}
	parent := base
	for i := 1; i < 3; i++ {
		labels := map[string]string{labelRef: img.chains[i], labelDiffID: img.diffs[i], labelParentChain: img.chains[i-1]}
		mounts, err := prepare(s, ctx, "", labels)
		if err != nil || len(mounts) == 0 || !mounts[len(mounts)-1].ReadOnly() {
			t.Fatalf("layer %d is not staged: %v, %v", i, mounts, err)
		}
		key, name := "one/1/extract-"+img.chains[i], "one/2/"+img.chains[i]
		again, err := s.Mounts(ctx, key)
		if err != nil || !again[len(again)-1].ReadOnly() {
			t.Errorf("the mounts of a staged layer: %v, %v", again, err)
		}
		if err := s.Commit(ctx, name, key, snapshots.WithLabels(labels), snapshots.WithParent(parent)); err != nil {
			t.Fatal(err)
		}
		parent = name
	}
	got := files(t, s, ctx, parent)
	if _, hidden := got["gone"]; got["a"] != payload("a") || got["b"] != payload("b") || got["c"] != payload("c") ||
		hidden {
		t.Errorf("shows %d files", len(got))
	}
	// One that is given up leaves nothing.
	labels := map[string]string{labelRef: img.chains[2], labelDiffID: img.diffs[2], labelParentChain: img.chains[1]}
	if _, err := prepare(s, ns(t, "two"), "", labels); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, "two/1/extract-"+img.chains[2]); err != nil {
		t.Error(err)
	}
}

// Ten clients that want images with the same unknown layers at once ingest each layer once; one that
// goes away while it waits harms nobody.
func TestTenClients(t *testing.T) {
	const clients, layers = 10, 5
	var tars [][]byte
	for i := range layers {
		tars = append(tars, layerTar(t, map[string]string{fmt.Sprint(i): payload(fmt.Sprint("shared ", i))}))
	}
	img := newPulled(tars...)
	// Clients 2, 5 and 8 go away, each at a layer of its own that somebody else is reading by then. That one reads on
	// after they have gone.
	leaver := func(c, i int) bool { return c%3 == 2 && i == c%layers }
	opened := &gatedStore{Store: contentStore(t), gates: map[digest.Digest]*gate{}}
	for i, b := range tars {
		g := &gate{opened: make(chan struct{})}
		for c := range clients {
			if leaver(c, i) {
				g.leaving.Add(1)
			}
		}
		opened.gates[digest.FromBytes(b)] = g
	}
	s := openWith(t, opened, false)
	var wg sync.WaitGroup
	for c := range clients {
		name := fmt.Sprintf("client-%d", c)
		img.write(t, ns(t, name), opened.Store, 0, 1, 2, 3, 4)
		wg.Go(func() {
			ctx, parent := namespaces.WithNamespace(t.Context(), name), ""
			for i, chain := range img.chains {
				if leaver(c, i) {
					g := opened.gates[digest.FromBytes(tars[i])]
					<-g.opened
					short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
					_, err := prepare(s, short, parent, map[string]string{labelRef: chain})
					cancel()
					g.leaving.Done()
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("%s, layer %d: %v", name, i, err)
					}
					return
				}
				if _, err := prepare(s, ctx, parent, map[string]string{labelRef: chain}); !errdefs.IsAlreadyExists(err) {
					t.Errorf("%s, layer %d: %v", name, i, err)
					return
				}
				parent = hitName(name, parent, chain)
			}
		})
	}
	wg.Wait()
	for i, b := range tars {
		if n := opened.gates[digest.FromBytes(b)].times.Load(); n != 1 {
			t.Errorf("the blob of layer %d was read %d times", i, n)
		}
	}
}

// gatedStore counts how often layers' blobs are opened, and lets a first reader wait.
type gatedStore struct {
	ctdcontent.Store
	gates map[digest.Digest]*gate
}

type gate struct {
	times   atomic.Int64
	opened  chan struct{} // closed by the first reader
	leaving sync.WaitGroup
}

func (s *gatedStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ctdcontent.ReaderAt, error) {
	if g := s.gates[desc.Digest]; g != nil {
		if g.times.Add(1) == 1 {
			close(g.opened)
		}
		g.leaving.Wait()
	}
	return s.Store.ReaderAt(ctx, desc)
}

// Layers come and go while hits on them are served: what is served is whole, and never dangles.
func TestRemovalRaces(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	store := contentStore(t)
	s := openWith(t, store, false)
	img := newPulled(layerTar(t, map[string]string{"a": payload("a")}), layerTar(t, map[string]string{"b": payload("b")}))
	img.write(t, ns(t, "stocked"), store, 0, 1)
	var hits, misses atomic.Int64
	var wg sync.WaitGroup
	for c := range 6 {
		r := rand.New(rand.NewPCG(seed, uint64(c)))
		ctx := namespaces.WithNamespace(t.Context(), fmt.Sprintf("client-%d", c))
		if c == 0 {
			ctx = ns(t, "stocked") // it brings the layers in again and again
		}
		wg.Go(func() {
			for round := range 60 {
				if err := race(s, ctx, r, img, round, &hits, &misses); err != nil {
					t.Errorf("client %d, round %d: %v", c, round, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			if err := s.Cleanup(t.Context()); err != nil {
				t.Errorf("cleanup: %v", err)
			}
		}
	})
	wg.Wait()
	t.Logf("%d hits, %d misses", hits.Load(), misses.Load())
	if hits.Load() == 0 {
		t.Error("nothing was ever served")
	}
	s.wg.Wait()
	s.layers.Wait()
	if err := s.Cleanup(t.Context()); err != nil { // chain images keep the packs that they name
		t.Error(err)
	}
	// Every hold was given back: nothing is left, and nothing was left dangling.
	for _, pattern := range []string{"layers/*", "packs/*", "snapshots/*"} {
		left, err := filepath.Glob(s.path(pattern))
		if err != nil || len(left) > 0 {
			t.Errorf("%d of %s stay: %v", len(left), pattern, err)
		}
	}
}

// race pulls an image as far as it is known, looks at it, and removes it.
func race(s *Snapshotter, ctx context.Context, r *rand.Rand, img pulled, round int, hits, misses *atomic.Int64) error {
	space, _ := namespaces.Namespace(ctx)
	var names []string
	parent := ""
	for i, chain := range img.chains {
		labels := map[string]string{labelRef: chain}
		if r.IntN(2) == 0 {
			labels[labelDiffID] = img.diffs[i]
		}
		key := fmt.Sprintf("%s/%d/extract-%s", space, round, chain)
		if r.IntN(4) == 0 {
			labels = nil // as client.Image.Unpack does: never served, always applied
		}
		mounts, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		if err == nil {
			misses.Add(1)
			if labels != nil && r.IntN(2) == 0 {
				if err := s.Remove(ctx, key); err != nil {
					return err
				}
				break
			}
			parent = fmt.Sprintf("%s/%d/%s", space, round, chain)
			names = append(names, parent)
			if err := applyTar(s, ctx, img.tars[i], mounts, key, parent); err != nil {
				return err
			}
			continue
		}
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
		hits.Add(1)
		parent = hitName(space, parent, chain)
		names = append(names, parent)
	}
	if parent != "" {
		if err := look(s, ctx, fmt.Sprintf("%s/%d/view", space, round), parent, len(names)); err != nil {
			return err
		}
	}
	for i := len(names) - 1; i >= 0; i-- {
		if err := s.Remove(ctx, names[i]); err != nil {
			return err
		}
	}
	return nil
}

// applyTar is what containerd and our diff service do with a layer that is not served.
func applyTar(s *Snapshotter, ctx context.Context, tar []byte, mounts []mount.Mount, key, name string) error {
	upper, ok, err := s.Extraction(ctx, mounts)
	if err != nil || !ok {
		return fmt.Errorf("no extraction snapshot: %v, %w", ok, err)
	}
	in, err := s.layers.IngestBlob(ctx, layer.Blob{
		Digest: digest.FromBytes(tar), Size: int64(len(tar)),
		Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tar)), nil },
	})
	if err != nil {
		return err
	}
	if err := s.Applied(ctx, upper, in); err != nil {
		return err
	}
	return s.Commit(ctx, name, key)
}

func look(s *Snapshotter, ctx context.Context, key, parent string, layers int) error {
	mounts, err := s.View(ctx, key, parent)
	if err != nil {
		return fmt.Errorf("view: %w", err)
	}
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		for i := range layers {
			name := string(rune('a' + i))
			data, err := os.ReadFile(filepath.Join(root, name))
			if err != nil {
				return err
			}
			if string(data) != payload(name) {
				return fmt.Errorf("%s has %d other bytes", name, len(data))
			}
		}
		return nil
	})
	return errors.Join(err, s.Remove(ctx, key))
}
