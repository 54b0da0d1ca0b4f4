package object

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// disk is a directory for stores that follow one another.
type disk struct {
	root  string
	dense bool
}

// forBothKinds runs a test with stores whose packs are coarse, and dense.
func forBothKinds(t *testing.T, f func(t *testing.T, d disk)) {
	for name, dense := range map[string]bool{"coarse": false, "dense": true} {
		t.Run(name, func(t *testing.T) { f(t, newDisk(t, dense)) })
	}
}

func newDisk(t testing.TB, dense bool) disk {
	t.Helper()
	d := disk{t.TempDir(), dense}
	if err := os.Mkdir(filepath.Join(d.root, "staging"), 0o700); err != nil {
		t.Fatal(err)
	}
	return d
}

// on is the same directory for stores that make packs of the other kind.
func (d disk) on(dense bool) disk { return disk{d.root, dense} }

// space is what payloads take.
func (d disk) space(seeds ...any) (bytes int64) {
	for _, seed := range seeds {
		bytes += erofs.Space(int64(len(payload(seed))), d.dense)
	}
	return bytes
}

// opened is a store of which nothing has been loaded yet.
func (d disk) opened(t testing.TB, opts Options) *Store {
	t.Helper()
	opts.Dense = d.dense
	s, err := Open(filepath.Join(d.root, "packs"), filepath.Join(d.root, "staging"), opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// open opens the store with references to these objects.
func (d disk) open(t testing.TB, named ...content.ObjectID) *Store {
	t.Helper()
	s := d.opened(t, Options{})
	s.Load(named)
	if _, err := s.Settle(false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.check(t, s) })
	return s
}

// check verifies that the counts are those of the files, that every object is whole, and that nothing else is there.
func (d disk) check(t testing.TB, s *Store) {
	t.Helper()
	s.mu.Lock()
	var ids []content.ObjectID
	for id := range s.refs {
		ids = append(ids, id)
	}
	live := map[content.PackID]int64{}
	for _, r := range s.refs {
		if r.pack != nil {
			live[r.pack.id] += r.pack.space(r.n)
		}
	}
	for id, p := range s.packs.all {
		if live[id] != p.live || p.dead() < 0 {
			t.Errorf("pack %s has %d live bytes, counted %d, dead %d", id, live[id], p.live, p.dead())
		}
		if fi, err := os.Stat(s.packs.Path(id)); err != nil || fi.Size() != int64(p.blocks)*content.BlockSize {
			t.Errorf("pack %s: %v", id, err)
		}
	}
	s.mu.Unlock()
	for _, id := range ids {
		if _, err := s.Read(id); err != nil && !s.IsBad(id) {
			t.Error(err)
		}
	}
	if found, err := s.Orphans(t.Context(), false); t.Context().Err() == nil && (err != nil || len(found) > 0) {
		t.Errorf("orphans: %+v, %v", found, err)
	}
	if left, err := os.ReadDir(filepath.Join(d.root, "staging")); err != nil || len(left) > 0 {
		t.Errorf("staging holds %v, %v", left, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	s.refs, s.packs.all = nil, nil // its successor is checked from now on
}

func idOf(b []byte) content.ObjectID { return content.ObjectID{Sum: sha256.Sum256(b)} }

func payload(seed any) []byte { return bytes.Repeat(fmt.Appendf(nil, "payload %v\n", seed), 100) }

// put stores payloads through one writer, seals it, and keeps a reference to each.
func put(t testing.TB, s *Store, seeds ...any) (ids []content.ObjectID) {
	t.Helper()
	w := s.Begin()
	for _, seed := range seeds {
		data := payload(seed)
		if _, err := w.Put(idOf(data), data); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, idOf(data))
	}
	if _, err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	if err := w.End(ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

func unref(t testing.TB, s *Store, ids ...content.ObjectID) {
	t.Helper()
	for _, id := range ids {
		if err := s.Unref(id, 1); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPutSealUnref(t *testing.T) { forBothKinds(t, testPutSealUnref) }

func testPutSealUnref(t *testing.T, d disk) {
	s := d.open(t)
	w := s.Begin()
	data := payload("a")
	id := idOf(data)
	for i, want := range []int64{int64(len(data)), 0} {
		if added, err := w.Put(id, data); err != nil || added != want {
			t.Fatalf("put %d added %d, %v", i, added, err)
		}
	}
	if _, ok := s.Place(id); ok {
		t.Error("a payload is seen before its pack is sealed")
	}
	if got, err := w.Read(id); err != nil || !bytes.Equal(got, data) {
		t.Error("a payload does not read back before its pack is sealed", err)
	}
	if used, err := w.Seal(); err != nil || used.Files != 1 || used.Bytes != packSize(t, d, data) {
		t.Error(used, err)
	}
	if err := w.End([]content.ObjectID{id}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Read(id); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	other := s.Begin()
	if added, err := other.Put(id, nil); err != nil || added != 0 {
		t.Error(added, err)
	}
	if err := other.End(nil); err != nil {
		t.Error(err)
	}
	unref(t, s, id)
	if st := s.packs.Stats(); st.Packs != 0 {
		t.Errorf("%+v", st)
	}
}

// packSize is how large a pack of some payloads is.
func packSize(t *testing.T, d disk, payloads ...[]byte) int64 {
	t.Helper()
	var sizes []int64
	for _, data := range payloads {
		sizes = append(sizes, int64(len(data)))
	}
	size, err := erofs.PackSize(sizes, d.dense)
	if err != nil {
		t.Fatal(err)
	}
	return size
}

func TestWriterGivenUp(t *testing.T) { forBothKinds(t, testWriterGivenUp) }

func testWriterGivenUp(t *testing.T, d disk) {
	s := d.open(t)
	known := put(t, s, "known")
	w := s.Begin()
	for _, seed := range []string{"known", "new"} {
		if _, err := w.Put(idOf(payload(seed)), payload(seed)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.End(nil); err != nil {
		t.Fatal(err)
	}
	if s.Len() != 1 || s.Has(idOf(payload("new"))) {
		t.Errorf("%d objects", s.Len())
	}
	unref(t, s, known...)
}

func TestPutStream(t *testing.T) { forBothKinds(t, testPutStream) }

func testPutStream(t *testing.T, d disk) {
	s := d.open(t)
	w := s.Begin()
	data := bytes.Repeat([]byte("large "), 1<<20)
	sum := func() content.ObjectID { return idOf(data) }
	for i, want := range []int64{int64(len(data)), 0} {
		if id, added, err := w.PutStream(bytes.NewReader(data), int64(len(data)), sum); err != nil || added != want ||
			id != idOf(data) {
			t.Fatal(i, added, err)
		}
	}
	if _, _, err := w.PutStream(bytes.NewReader(data[:100]), int64(len(data)), sum); err == nil {
		t.Error("a payload that is cut is stored")
	}
	if _, err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	if st := s.packs.Stats(); st.Live != erofs.Space(int64(len(data)), d.dense) || st.Dead != 0 {
		t.Errorf("%+v: room that was given back is counted", st)
	}
	if err := w.End([]content.ObjectID{idOf(data)}); err != nil {
		t.Fatal(err)
	}
}

// Two ingests that store one payload at the same time: one copy is dead, and a restart counts one of them.
func TestSealedTwice(t *testing.T) { forBothKinds(t, testSealedTwice) }

func testSealedTwice(t *testing.T, d disk) {
	s := d.open(t)
	a, b := s.Begin(), s.Begin()
	id := idOf(payload("both"))
	for i, w := range []*Writer{a, b} {
		for _, seed := range []any{"both", i} {
			if _, err := w.Put(idOf(payload(seed)), payload(seed)); err != nil {
				t.Fatal(err)
			}
		}
		if i == 1 {
			for _, w := range []*Writer{b, a} {
				if _, err := w.Seal(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := errors.Join(a.End([]content.ObjectID{id, idOf(payload(0))}),
		b.End([]content.ObjectID{id, idOf(payload(1))})); err != nil {
		t.Fatal(err)
	}
	if st := s.packs.Stats(); st.Packs != 2 || st.Live != d.space("both", 0, 1) || st.Dead != d.space("both") {
		t.Errorf("%+v", st)
	}
	d.check(t, s)
	s = d.open(t, id, id, idOf(payload(0)), idOf(payload(1)))
	if st := s.packs.Stats(); st.Packs != 2 || st.Live != d.space("both", 0, 1) || st.Dead != d.space("both") {
		t.Errorf("after a restart: %+v", st)
	}
}

// A sweep that comes by while a pack has its name but is not yet known leaves it alone.
func TestSweepWhilePacksAreSealed(t *testing.T) { forBothKinds(t, testSweepWhilePacksAreSealed) }

func testSweepWhilePacksAreSealed(t *testing.T, d disk) {
	s := d.open(t)
	swept := map[string]int{}
	s.packs.opts.Step = func(name string) {
		if name == "pack.renamed" || name == "merge.synced" {
			swept[name]++
			if found, err := s.Orphans(t.Context(), true); err != nil || len(found) > 0 {
				t.Errorf("at %s: removed %+v, %v", name, found, err)
			}
		}
	}
	sync := func() (func() error, func(), error) { return func() error { return nil }, func() {}, nil }
	for i := range tierWidth + 1 {
		put(t, s, i)
	}
	if err := NewCompactor(s, CompactOptions{Sync: sync}).Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := s.packs.Stats(); st.Packs != 1 || swept["merge.synced"] != 1 || swept["pack.renamed"] != tierWidth+2 {
		t.Errorf("%+v, swept %v", st, swept)
	}
}

// What is named only by a tree that could not be read at first is found again.
func TestLoadAfterSettle(t *testing.T) { forBothKinds(t, testLoadAfterSettle) }

func testLoadAfterSettle(t *testing.T, d disk) {
	s := d.open(t)
	ids := put(t, s, "a", "b")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.refs, s.packs.all = nil, nil
	again := d.opened(t, Options{})
	again.Load(ids[:1])
	if _, err := again.Settle(true); err != nil {
		t.Fatal(err)
	}
	again.Load(append(ids, idOf([]byte("nowhere"))))
	if bad := again.Bad(); !slices.Equal(bad, []content.ObjectID{idOf([]byte("nowhere"))}) {
		t.Errorf("bad: %v", bad)
	}
	if st := again.packs.Stats(); st.Live != d.space("a", "b") || st.Dead != 0 {
		t.Errorf("%+v", st)
	}
	unref(t, again, idOf([]byte("nowhere")))
	d.check(t, again)
}

// An ingest that is larger than a pack may be makes several.
func TestLargeIngest(t *testing.T) {
	for _, fail := range []bool{false, true} {
		t.Run(fmt.Sprint("fails ", fail), func(t *testing.T) {
			d := newDisk(t, false)
			s := d.open(t)
			s.packMax = 4 * content.BlockSize
			w := s.Begin()
			var ids []content.ObjectID
			for i := range 10 {
				data := payload(i)
				if i == 5 {
					data = bytes.Repeat([]byte("large"), 10_000)
				}
				if _, err := w.Put(idOf(data), data); err != nil {
					t.Fatal(err)
				}
				if got, err := w.Read(idOf(data)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("payload %d: %v", i, err)
				}
				ids = append(ids, idOf(data))
			}
			if len(w.packs) != 5 {
				t.Errorf("%d packs", len(w.packs))
			}
			if fail {
				n := 0
				s.packs.opts.Step = func(name string) { // the third cannot be renamed
					if n++; name == "pack.sealed" && n == 5 {
						if err := os.Mkdir(s.packs.Path(w.packs[0].ID()), 0o700); err != nil {
							t.Fatal(err)
						}
					}
				}
				_, err := w.Seal()
				s.packs.opts.Step = nil
				if err == nil {
					t.Fatal("sealed over a directory")
				}
				if err := w.End(nil); err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(filepath.Join(s.packs.Dir(), leftIn(t, s.packs.Dir()))); err != nil {
					t.Fatal(err)
				}
				if st := s.packs.Stats(); st.Packs != 0 || s.Len() != 0 || len(s.packs.sealing) > 0 {
					t.Errorf("%+v", st)
				}
				return
			}
			used, err := w.Seal()
			if err != nil {
				t.Fatal(err)
			}
			if err := w.End(ids); err != nil {
				t.Fatal(err)
			}
			if bytes, files := s.packs.Used(); used != (Counts{bytes, files}) || files != 5 {
				t.Errorf("%+v, used %d in %d", used, bytes, files)
			}
			if len(w.Wrote()) != 10 {
				t.Errorf("wrote %d", len(w.Wrote()))
			}
			d.check(t, s)
			d.open(t, ids...)
		})
	}
}

// leftIn is the name of the only file in a directory.
func leftIn(t *testing.T, dir string) string {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	return names[0].Name()
}

func TestOpenDropsWhatNothingNames(t *testing.T) { forBothKinds(t, testOpenDropsWhatNothingNames) }

func testOpenDropsWhatNothingNames(t *testing.T, d disk) {
	s := d.open(t)
	keep := put(t, s, "a", "b")
	put(t, s, "c")
	for _, name := range []string{"stranger", "00064f0a1b2c3.erofs"} {
		if err := os.WriteFile(filepath.Join(s.packs.Dir(), name), []byte("x"), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.refs, s.packs.all = nil, nil
	s2 := d.open(t, keep[0])
	if st := s2.packs.Stats(); st.Packs != 1 || st.Live != d.space("a") || st.Dead != d.space("b") {
		t.Errorf("%+v", st)
	}
}

func TestMissingPackMakesObjectsBad(t *testing.T) { forBothKinds(t, testMissingPackMakesObjectsBad) }

func testMissingPackMakesObjectsBad(t *testing.T, d disk) {
	s := d.open(t)
	ids := put(t, s, "a")
	place, _ := s.Place(ids[0])
	if err := os.Remove(s.packs.Path(place.Pack)); err != nil {
		t.Fatal(err)
	}
	s.refs, s.packs.all = nil, nil
	d2 := d.open(t, ids...)
	if !d2.IsBad(ids[0]) {
		t.Error("an object without a place is not bad")
	}
	if _, err := d2.Places(ids); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	healed := put(t, d2, "a")
	if d2.IsBad(ids[0]) {
		t.Error("a put does not heal")
	}
	unref(t, d2, healed...)
}

// Whatever the order of puts, seals, unrefs and merges, none is lost while it has a reference, and none stays without.
func TestConcurrent(t *testing.T) { forBothKinds(t, testConcurrent) }

func testConcurrent(t *testing.T, d disk) {
	s := d.open(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var merges sync.WaitGroup
	c := NewCompactor(s, CompactOptions{})
	merges.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := c.Compact(t.Context()); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for g := range 6 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			held := map[content.ObjectID]uint32{}
			for range 150 {
				w := s.Begin()
				var keep []content.ObjectID
				for range 1 + r.IntN(8) {
					data := payload(r.IntN(30))
					if _, err := w.Put(idOf(data), data); err != nil {
						t.Error(err)
					}
					keep = append(keep, idOf(data))
				}
				if r.IntN(4) == 0 {
					keep = nil
				} else if _, err := w.Seal(); err != nil {
					t.Error(err)
				}
				if err := w.End(keep); err != nil {
					t.Error(err)
				}
				for _, id := range keep {
					held[id]++
				}
				for id, n := range held {
					if _, err := s.Read(id); err != nil {
						t.Error(err)
					}
					if r.IntN(2) == 0 {
						if err := s.Unref(id, n); err != nil {
							t.Error(err)
						}
						delete(held, id)
					}
				}
			}
			for id, n := range held {
				if g > 0 {
					if err := s.Unref(id, n); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	merges.Wait()
}

// plenty of room for merging.
const plenty = math.MaxInt64

// TestRemovedPacksAreFreed: a pack goes in the background when nothing names it, and not while a chain image does.
func TestRemovedPacksAreFreed(t *testing.T) { forBothKinds(t, testRemovedPacksAreFreed) }

func testRemovedPacksAreFreed(t *testing.T, d disk) {
	s := d.open(t)
	ids := put(t, s, "a", "b", "c")
	placed, err := s.Places(ids)
	if err != nil {
		t.Fatal(err)
	}
	file := s.packs.all[placed.IDs()[0]].file
	if err := s.UnrefAll(ids); err != nil {
		t.Fatal(err)
	}
	s.packs.Wait()
	got := make([]byte, len(payload("a")))
	if _, err := file.ReadAt(got, content.BlockSize); err != nil || !bytes.Equal(got, payload("a")) {
		t.Errorf("a chain image names the pack, which does not read: %v", err)
	}
	if err := placed.Release(); err != nil {
		t.Fatal(err)
	}
	s.packs.Wait()
	if _, err := file.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a pack that was removed is still open: %v", err)
	}
	if _, err := os.Stat(s.packs.Path(placed.IDs()[0])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a pack that nothing names is still there: %v", err)
	}
}
