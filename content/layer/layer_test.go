package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// member is one tar member of a test layer.
type member struct {
	name  string
	data  string
	mtime int64
	uid   int
}

func makeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.data)), ModTime: time.Unix(m.mtime, 0), Uid: m.uid}
		if strings.HasSuffix(m.name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func compress(t testing.TB, b []byte, level int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func blobOf(b []byte) Blob {
	return Blob{
		Digest: digest.FromBytes(b), Size: int64(len(b)),
		Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
	}
}

func diffIDOf(b []byte) content.DiffID { return content.DiffID{Sum: sha256.Sum256(b)} }

func openStore(t testing.TB, root string, f content.Fidelity, live ...content.LayerID) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Root: root, Fidelity: f}, live)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

// closeStore closes a store, once, and checks it.
func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if s.rootFd < 0 {
		return
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	s.rootFd = -1
	check(t, s)
}

// check verifies, on a closed store, that every tree is whole and names only objects that
// are whole, that nothing else is on the disk, and that the counts are right.
func check(t testing.TB, s *Store) {
	t.Helper()
	refs := map[content.ObjectID]bool{}
	dir, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		t.Fatal(err)
	}
	if len(dir) != len(s.layers) {
		t.Errorf("%d trees on disk, %d layers known", len(dir), len(s.layers))
	}
	for id := range s.layers {
		_, entries, err := tree.Read(s.treePath(id), id)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, e := range entries {
			if !e.Object.IsZero() {
				refs[e.Object] = true
			}
		}
	}
	checkPacks(t, s, refs)
	if left, err := os.ReadDir(s.path(dirIngest)); err != nil || len(left) > 0 {
		t.Errorf("staging holds %v, %v", left, err)
	}
}

// checkPacks verifies, on a closed store, that packs hold exactly these objects, each whole, and that no other file is
// there.
func checkPacks(t testing.TB, s *Store, refs map[content.ObjectID]bool) {
	t.Helper()
	packs, err := object.Open(s.path(dirPacks), t.TempDir(), object.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer packs.Close()
	packs.Load(slices.Collect(maps.Keys(refs)))
	if _, err := packs.Settle(true); err != nil {
		t.Fatal(err)
	}
	for o := range refs {
		b, err := packs.Read(o)
		if err != nil || sha256.Sum256(b) != o.Sum {
			t.Errorf("object %s: %v", o, err)
		}
	}
	if s.objects.Len() != len(refs) {
		t.Errorf("%d objects counted, %d named", s.objects.Len(), len(refs))
	}
	// The store's own view counts: of a payload that is in two packs another open may take the other one.
	if left, err := s.objects.Orphans(context.Background(), false); err != nil || len(left) > 0 {
		t.Errorf("files that hold no object: %+v, %v", left, err)
	}
}

func ingest(t testing.TB, s *Store, b []byte) Ingested {
	t.Helper()
	in, err := s.IngestBlob(t.Context(), blobOf(b))
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func big(seed string) string { return strings.Repeat(seed+"\n", 1000) }

func TestIngestLookupRestartRelease(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Exact)
	plain := makeTar(t, member{"d/", "", 1, 0}, member{"d/small", "tiny", 2, 0}, member{"d/big", big("a"), 3, 0})
	in := ingest(t, s, compress(t, plain, 6))
	if in.DiffID != diffIDOf(plain) || in.TarSize != int64(len(plain)) || in.Added.Inodes != 2 {
		t.Errorf("%+v", in)
	}
	if id, ok := s.Lookup(in.DiffID); !ok || id != in.Layer {
		t.Error(id, ok)
	}
	s.Release(in.Layer)
	closeStore(t, s)

	s = openStore(t, root, content.Exact, in.Layer)
	id, ok := s.Lookup(in.DiffID)
	if !ok || id != in.Layer {
		t.Fatal("layer is forgotten after a restart")
	}
	n, err := s.Merge(t.Context(), []content.LayerID{id})
	if err != nil || len(n.Children) != 1 || len(n.Children[0].Children) != 2 {
		t.Error(n, err)
	}
	s.Release(id)
	s.Release(id)
	s.gc.Wait()
	if _, ok := s.Lookup(in.DiffID); ok || s.objects.Len() != 0 {
		t.Error("a released layer stays")
	}
}

func TestLayersWithoutReferenceAreDroppedAtOpen(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Exact)
	a := ingest(t, s, makeTar(t, member{"a", big("a"), 1, 0}, member{"s", big("shared"), 1, 0}))
	ingest(t, s, makeTar(t, member{"b", big("b"), 1, 0}, member{"s", big("shared"), 1, 0}))
	closeStore(t, s)
	// As after a crash in the middle of an ingest.
	for _, name := range []string{"packs/00064f0a1b2c3.erofs", "packs/half", "ingest/tree-1", "layers/junk"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(root, fileClean)); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, root, content.Exact, a.Layer)
	if s.objects.Len() != 2 {
		t.Errorf("%d objects", s.objects.Len())
	}
}

// One tree: other compression, other diffID (here by padding at the end) or known blob.
func TestSameTreeIsStoredOnce(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Exact)
	plain := makeTar(t, member{"a", big("a"), 1, 0})
	first := ingest(t, s, compress(t, plain, 1))
	padded := append(bytes.Clone(plain), make([]byte, 4096)...)
	for name, b := range map[string][]byte{"recompressed": compress(t, plain, 9), "other diffID": padded} {
		in := ingest(t, s, b)
		if in.Layer != first.Layer || in.Added != (Usage{}) {
			t.Errorf("%s: %+v", name, in)
		}
	}
	if id, ok := s.Lookup(diffIDOf(padded)); !ok || id != first.Layer {
		t.Error("second diffID is unknown")
	}
	known := blobOf(compress(t, plain, 9))
	known.Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("opened") }
	if in, err := s.IngestBlob(t.Context(), known); err != nil || in.DiffID != first.DiffID {
		t.Error(in, err)
	}
	closeStore(t, s)
	s = openStore(t, root, content.Exact, first.Layer)
	if _, ok := s.Lookup(diffIDOf(padded)); !ok {
		t.Error("second diffID is forgotten after a restart")
	}
}

func TestInfer(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	a := ingest(t, s, makeTar(t, member{"a", "1", 1, 0})).DiffID
	b := ingest(t, s, makeTar(t, member{"b", "2", 1, 0})).DiffID
	var none content.ChainID
	base := none.Chain(a)
	if d, ok := s.Infer(none, base); !ok || d != a {
		t.Error("base layer not inferred")
	}
	if d, ok := s.Infer(base, base.Chain(b)); !ok || d != b {
		t.Error("upper layer not inferred")
	}
	if _, ok := s.Infer(base, base.Chain(content.DiffID{})); ok {
		t.Error("unknown layer inferred")
	}
}

func TestFidelityDoesNotMix(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Exact)
	in := ingest(t, s, makeTar(t, member{"a", big("a"), 1, 0}))
	closeStore(t, s)
	s = openStore(t, root, content.Python, in.Layer)
	if _, ok := s.Lookup(in.DiffID); ok {
		t.Error("a layer ingested as exact is served as python")
	}
	if _, err := s.Merge(t.Context(), []content.LayerID{in.Layer}); err != nil {
		t.Error(err)
	}
}

// pycOf is a timestamp .pyc of CPython 3.11 for a source of the given mtime and size.
func pycOf(mtime, size uint32, code string) string {
	b := []byte{0xa7, 0x0d, '\r', '\n', 0, 0, 0, 0, 0, 0, 0, 0, byte(size), byte(size >> 8), byte(size >> 16),
		byte(size >> 24)}
	content.SetPycTime(b, mtime)
	return string(b) + code
}

func pythonLayer(t testing.TB, mtime int64, uid int) []byte {
	src, code := big("import os"), big("bytecode")
	stamp := func(delta int64) string { return pycOf(uint32(mtime+delta), uint32(len(src)), code) }
	return makeTar(t,
		member{"p/", "", mtime, uid}, member{"p/__pycache__/", "", mtime, uid},
		member{"p/__pycache__/m.cpython-311.pyc", stamp(0), mtime + 1, uid},
		member{"p/__pycache__/stale.cpython-311.pyc", stamp(-1), mtime + 1, uid},
		member{"p/__pycache__/lone.cpython-311.pyc", stamp(0), mtime + 1, uid},
		member{"p/__pycache__/tiny.cpython-311.pyc", pycOf(uint32(mtime), 4, "t"), mtime + 1, uid},
		member{"p/m.py", src, mtime, uid}, member{"p/stale.py", src + "#", mtime, uid},
		member{"p/tiny.py", "pass", mtime, uid})
}

func TestPythonPairs(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	const m1, m2 = 1700000000, 1700009999
	a := ingest(t, s, pythonLayer(t, m1, 0))
	b := ingest(t, s, pythonLayer(t, m2, 5))
	if a.Layer == b.Layer {
		t.Error("layers with other mtimes are taken for the same")
	}
	// stale and lone are no pairs: their exact bytes differ.
	if got := b.Added.Inodes; got != 2 {
		t.Errorf("the rebuild added %d inodes, want a pack and a tree", got)
	}
	if st := s.objects.Packs().Stats(); st.Packs != 2 || st.Live != 21*content.BlockSize {
		t.Errorf("%+v", st)
	}
	fa, _ := s.Facts(a.Layer)
	fb, _ := s.Facts(b.Layer)
	if fa.Payload == fb.Payload {
		t.Error("payload digests agree although bytecode that is no pair differs")
	}
	_, entries, err := tree.Read(s.treePath(b.Layer), b.Layer)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]content.Flags{"m": content.PycPaired, "tiny": content.PycPaired, "stale": 0, "lone": 0}
	sources := map[string]*content.Entry{}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(strings.TrimPrefix(e.Path, "p/"), ".py"); ok {
			sources[name] = e
			if (e.Flags&content.PySource != 0) != (want[name] == content.PycPaired) {
				t.Errorf("%s: flags %d", e.Path, e.Flags)
			}
		}
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(strings.TrimPrefix(e.Path, "p/__pycache__/"), ".cpython-311.pyc")
		if !ok {
			continue
		}
		body := e.Data
		if body == nil {
			if body, err = s.objects.Read(e.Object); err != nil {
				t.Fatal(err)
			}
		}
		h, _ := content.ParsePyc(body)
		stamp := map[string]uint32{"stale": m2 - 1, "lone": m2}[name]
		if want[name] == content.PycPaired {
			stamp = sources[name].SourceTime()
		}
		if e.Flags != want[name] || h.Mtime != stamp {
			t.Errorf("%s: flags %d, stamp %d", name, e.Flags, h.Mtime)
		}
	}
}

// A later hard link changes an entry while its payload is on the way; run with -race.
func TestHardlinkedBytecode(t *testing.T) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	code := pycOf(1700000000, 4, big("code"))
	for i := range 300 {
		name := fmt.Sprintf("z%d.pyc", i)
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(code))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, code); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("a%d.pyc", i), Typeflag: tar.TypeLink, Linkname: name,
			Uid: i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), content.Python)
	in := ingest(t, s, buf.Bytes())
	_, entries, err := tree.Read(s.treePath(in.Layer), in.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Flags&content.PycPaired != 0 {
			t.Errorf("%s with two names is taken for half of a pair", e.Path)
		}
	}
}

func pureLayer(t testing.TB, mtime int64, uid int) []byte {
	src := big("import os")
	return makeTar(t, member{"p/", "", mtime, uid}, member{"p/__pycache__/", "", mtime, uid},
		member{"p/__pycache__/m.cpython-311.pyc", pycOf(uint32(mtime), uint32(len(src)), big("bytecode")), mtime, uid},
		member{"p/m.py", src, mtime, uid})
}

func TestNormalizedReusesPayload(t *testing.T) {
	for f, same := range map[content.Fidelity]bool{content.Exact: false, content.Python: false, content.Normalized: true} {
		t.Run(string(f), func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root, f)
			a, b := ingest(t, s, pureLayer(t, 1700000000, 0)), ingest(t, s, pureLayer(t, 1700000007, 9))
			if (a.Layer == b.Layer) != same {
				t.Errorf("same layer: %v", a.Layer == b.Layer)
			}
			fa, _ := s.Facts(a.Layer)
			fb, _ := s.Facts(b.Layer)
			if fa.Payload != fb.Payload {
				t.Error("payload digests differ")
			}
			closeStore(t, s)
			s = openStore(t, root, f, a.Layer, b.Layer)
			if id, ok := s.Lookup(b.DiffID); !ok || id != b.Layer {
				t.Error("forgotten after a restart")
			}
		})
	}
}

func TestBadBlobsLeaveNothing(t *testing.T) {
	plain := makeTar(t, member{"a", big("a"), 1, 0}, member{"b", big("b"), 1, 0})
	zip := compress(t, plain, 6)
	s := openStore(t, t.TempDir(), content.Exact)
	for name, b := range map[string][]byte{
		"truncated gzip":         zip[:len(zip)-20],
		"truncated gzip trailer": zip[:len(zip)-1],
		"corrupt gzip":           append(bytes.Clone(zip[:60]), append([]byte{0xff, 0xff, 0xff}, zip[63:]...)...),
		"truncated tar":          plain[:len(plain)/2],
		"garbage":                bytes.Repeat([]byte("garbage "), 1000),
		"climbing path":          makeTar(t, member{"ok", big("ok"), 1, 0}, member{"../x", "x", 1, 0}),
	} {
		if in, err := s.IngestBlob(t.Context(), blobOf(b)); err == nil {
			t.Errorf("%s: %+v", name, in)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	if s.objects.Len() != 0 {
		t.Errorf("%d objects stay", s.objects.Len())
	}
}

// slowBlob starts to deliver when told.
func slowBlob(b []byte, start <-chan struct{}, opened *int) Blob {
	blob := blobOf(b)
	open := blob.Open
	blob.Open = func(ctx context.Context) (io.ReadCloser, error) {
		*opened++
		select {
		case <-start:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return open(ctx)
	}
	return blob
}

func TestConcurrentIngestOfOneBlob(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	start, opened := make(chan struct{}), 0
	blob := slowBlob(makeTar(t, member{"a", big("a"), 1, 0}), start, &opened)
	gone, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	results := make(chan Ingested, 10)
	for i := range 10 {
		ctx := t.Context()
		if i < 5 {
			ctx = gone
		}
		wg.Go(func() {
			in, err := s.IngestBlob(ctx, blob)
			switch {
			case err == nil:
				results <- in
			case !errors.Is(err, context.Canceled) || ctx != gone:
				t.Error(err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	cancel()
	time.Sleep(20 * time.Millisecond)
	close(start)
	wg.Wait()
	close(results)
	if opened != 1 || len(results) < 5 {
		t.Errorf("opened %d times, %d results", opened, len(results))
	}
	for in := range results {
		s.Release(in.Layer)
	}
	s.gc.Wait()
	if s.objects.Len() != 0 {
		t.Error("holds are miscounted")
	}
}

func TestCancelledIngestStops(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	ctx, cancel := context.WithCancel(t.Context())
	start, opened := make(chan struct{}), 0
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := s.IngestBlob(ctx, slowBlob(makeTar(t), start, &opened)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	s.flights.wait()
}

// Random layers that share objects are ingested and released from many sides at once.
func TestConcurrentIngestRelease(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := openStore(t, t.TempDir(), content.Python)
	var blobs [][]byte
	r := rand.New(rand.NewPCG(seed, 0))
	for range 12 {
		var m []member
		for i := range 8 {
			m = append(m, member{fmt.Sprint("f", i), big(fmt.Sprint(r.IntN(10))), 1, 0})
		}
		blobs = append(blobs, makeTar(t, m...))
	}
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g+1)))
			var held []content.LayerID
			for range 60 {
				if len(held) > 0 && r.IntN(2) == 0 {
					s.Release(held[0])
					held = held[1:]
					continue
				}
				in, err := s.IngestBlob(t.Context(), blobOf(blobs[r.IntN(len(blobs))]))
				if err != nil {
					t.Error(err)
					continue
				}
				if _, err := s.Merge(t.Context(), []content.LayerID{in.Layer}); err != nil {
					t.Error(err)
				}
				held = append(held, in.Layer)
			}
			for _, id := range held {
				if g > 0 {
					s.Release(id)
				}
			}
		})
	}
	wg.Wait()
}

// A payload over bufferMax is staged in a file instead of memory.
func TestLargePayload(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	data := strings.Repeat("0123456789abcdef", (bufferMax+4096)/16)
	plain := makeTar(t, member{"large", data, 1, 0})
	first := ingest(t, s, plain)
	if first.Added.Bytes < bufferMax {
		t.Errorf("%+v", first)
	}
	again := ingest(t, s, makeTar(t, member{"other", data, 2, 0}))
	if again.Added.Inodes != 1 {
		t.Errorf("%+v", again)
	}
}

func TestHugeDeclaredSize(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: "huge", Size: 1 << 60}); err != nil {
		t.Fatal(err)
	}
	buf.WriteString("not that much")
	_, err := s.IngestBlob(t.Context(), blobOf(buf.Bytes()))
	if err == nil || !strings.Contains(err.Error(), "huge") || !strings.Contains(err.Error(), "free") {
		t.Error(err)
	}
}
