package object

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// roomForAll is what Coarsen asks where nothing is refused.
func roomForAll(int64) error { return nil }

// shut closes a store whose directory the next one opens.
func (d disk) shut(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.refs, s.packs.all = nil, nil
}

// fromDense fills packs of a dense store, one for each list of seeds, and opens them for a kernel that mounts none of
// them.
func fromDense(t *testing.T, packs ...[]any) (d disk, s *Store, ids [][]content.ObjectID) {
	t.Helper()
	d = newDisk(t, true)
	s = d.open(t)
	var all []content.ObjectID
	for _, seeds := range packs {
		ids = append(ids, put(t, s, seeds...))
		all = append(all, ids[len(ids)-1]...)
	}
	d.shut(t, s)
	d = d.on(false)
	return d, d.open(t, all...), ids
}

// packOf is the pack of an object.
func packOf(t testing.TB, s *Store, id content.ObjectID) *pack {
	t.Helper()
	s.lock()
	defer s.unlock()
	p := s.refs[id].pack
	if p == nil {
		t.Fatalf("object %s has no place", id)
	}
	return p
}

// readPlaced compares the bytes that a chain image over these places would show.
func readPlaced(t testing.TB, s *Store, placed *Placed, ids []content.ObjectID) {
	t.Helper()
	for _, id := range ids {
		place, ok := placed.Place(id)
		b := make([]byte, place.Size)
		f, err := os.Open(s.packs.Path(place.Pack))
		if err == nil {
			_, err = f.ReadAt(b, place.Offset)
			err = errors.Join(err, f.Close())
		}
		if !ok || err != nil || idOf(b) != id {
			t.Errorf("object %s at %+v: %v", id, place, err)
		}
	}
}

// wantStats compares what is counted.
func (d disk) wantStats(t testing.TB, s *Store, live, dead int64) {
	t.Helper()
	if st := s.packs.Stats(); st.Live != live || st.Dead != dead {
		t.Errorf("%d bytes live and %d dead, want %d and %d", st.Live, st.Dead, live, dead)
	}
}

func TestStatsAddUp(t *testing.T) {
	forBothKinds(t, func(t *testing.T, d disk) {
		s := d.open(t)
		seeds := []any{"a", "bb", "ccc", "a longer one than others", "e"}
		ids := put(t, s, seeds...)
		d.wantStats(t, s, d.space(seeds...), 0)
		unref(t, s, ids[1], ids[4])
		live, dead := d.space(seeds[0], seeds[2], seeds[3]), d.space(seeds[1], seeds[4])
		d.wantStats(t, s, live, dead)
		for _, seed := range seeds {
			if id := idOf(payload(seed)); s.Has(id) && s.Space(id, 0) != d.space(seed) {
				t.Errorf("%v takes %d bytes", seed, s.Space(id, 0))
			}
		}
		d.check(t, s)
		kept := []content.ObjectID{ids[0], ids[2], ids[3]}
		for _, dense := range []bool{true, false} { // what packs are does not hang on what new ones would be
			s = d.on(dense).open(t, kept...)
			d.wantStats(t, s, live, dead)
			d.check(t, s)
		}
	})
}

// No chain image is made over packs that the kernel does not mount, until their objects are copied to others. Packs
// that it does not need stay.
func TestCoarsen(t *testing.T) {
	d, s, ids := fromDense(t, []any{"a", "b", "dies"}, []any{"c"}, []any{"d", "e"})
	unref(t, s, ids[0][2])
	other, heldPack := packOf(t, s, ids[2][0]), packOf(t, s, ids[0][0])
	if err := s.packs.Hold([]content.PackID{heldPack.id}); err != nil { // a chain image of the other kernel's
		t.Fatal(err)
	}
	var moved []content.PackID
	s.packs.opts.Moved = func(packs []content.PackID, damaged bool) {
		if moved = append(moved, packs...); damaged {
			t.Error("the packs are said to be damaged")
		}
	}
	more := put(t, s, "new")
	names := append(slices.Clone(more), ids[0][1], ids[1][0])
	for range 2 {
		if _, err := s.Places(names); !errors.Is(err, ErrTooDense) || errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	}
	if heldPack.holders != 1 {
		t.Errorf("a pack that no places came of has %d holders", heldPack.holders)
	}
	if st := s.packs.Stats(); st.TooDense != 3 {
		t.Errorf("%d packs are said to be too dense", st.TooDense)
	}
	s.Load(slices.Repeat(ids[0][:1], 4)) // counts go with what they count
	asked := int64(0)
	err := NewCompactor(s, CompactOptions{}).Coarsen(t.Context(), names, func(n int64) error { asked += n; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if asked != d.space("a", "b", "c") {
		t.Errorf("asked for %d bytes", asked)
	}
	if !slices.Equal(moved, []content.PackID{heldPack.id}) {
		t.Errorf("moved %v", moved)
	}
	placed, err := s.Places(append(names, ids[0][0]))
	if err != nil || placed.Dense() || len(placed.IDs()) != 3 {
		t.Fatal(placed, err)
	}
	readPlaced(t, s, placed, append(names, ids[0][0]))
	if s.refs[ids[0][0]].count != 5 || s.refs[ids[0][1]].count != 1 {
		t.Error("the counts are others")
	}
	if packOf(t, s, ids[2][0]) != other || !other.dense {
		t.Error("a pack was copied that nobody asked for")
	}
	dense := disk{dense: true}
	d.wantStats(t, s, d.space("new", "a", "b", "c")+dense.space("d", "e"), dense.space("a", "b", "dies"))
	unref(t, s, ids[0][0], ids[0][0], ids[0][0], ids[0][0])
	if err := errors.Join(placed.Release(), s.packs.Release([]content.PackID{heldPack.id})); err != nil {
		t.Fatal(err)
	}
	d.check(t, s)
	s = d.open(t, slices.Concat(ids[0][:2], ids[1], ids[2], more)...)
	d.wantStats(t, s, d.space("new", "a", "b", "c")+dense.space("d", "e"), 0)
}

// As long as a tree cannot be read, dense packs keep what it may name; what comes to light later is copied as well.
func TestCoarsenWhileDeadIsKept(t *testing.T) {
	d := newDisk(t, true)
	s := d.open(t)
	ids := put(t, s, "a", "b")
	d.shut(t, s)
	d = d.on(false)
	s = d.opened(t, Options{})
	s.Load(ids[:1])
	if _, err := s.Settle(true); err != nil {
		t.Fatal(err)
	}
	c := NewCompactor(s, CompactOptions{})
	for n := range ids {
		if n > 0 {
			s.Load(ids[n:])
		}
		if _, err := s.Places(ids[:n+1]); !errors.Is(err, ErrTooDense) {
			t.Error(err)
		}
		if err := c.Coarsen(t.Context(), ids[:n+1], roomForAll); err != nil {
			t.Fatal(err)
		}
		placed, err := s.Places(ids[:n+1])
		if err != nil {
			t.Fatal(err)
		}
		readPlaced(t, s, placed, ids[:n+1])
		if err := placed.Release(); err != nil {
			t.Fatal(err)
		}
		if st := s.packs.Stats(); st.Packs != n+2 {
			t.Errorf("%+v", st)
		}
	}
	d.shut(t, s)
	s = d.open(t, ids...)
	if st := s.packs.Stats(); st.Packs != 2 || st.Dead != 0 {
		t.Errorf("%+v", st)
	}
}

// An object that is bad stays in its dense pack, and is damage; it keeps nobody else from being copied.
func TestCoarsenAroundBadObject(t *testing.T) {
	for _, known := range []bool{false, true} {
		t.Run(fmt.Sprint("known ", known), func(t *testing.T) {
			d, s, ids := fromDense(t, []any{"a", "bad", "c"})
			c := NewCompactor(s, CompactOptions{})
			corrupt(t, s, ids[0][1], 0)
			if known {
				s.SetBad(ids[0][1])
			}
			if err := c.Coarsen(t.Context(), ids[0], roomForAll); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Places(ids[0]); !errors.Is(err, ErrDamaged) || errors.Is(err, ErrTooDense) {
				t.Error(err)
			}
			whole := []content.ObjectID{ids[0][0], ids[0][2]}
			placed, err := s.Places(whole)
			if err != nil {
				t.Fatal(err)
			}
			readPlaced(t, s, placed, whole)
			if err := placed.Release(); err != nil {
				t.Fatal(err)
			}
			// Nothing is left to copy, so nobody is asked, and there is nothing for merging either.
			err = c.Coarsen(t.Context(), ids[0], func(int64) error { return unix.ENOSPC })
			if err != nil || c.Needed() {
				t.Errorf("%v, needed: %v", err, c.Needed())
			}
			if st := s.packs.Stats(); st.Packs != 2 {
				t.Errorf("%+v", st)
			}
			healed := put(t, s, "bad")
			placed, err = s.Places(ids[0])
			if err != nil || placed.Dense() {
				t.Fatal(err)
			}
			readPlaced(t, s, placed, ids[0])
			unref(t, s, healed...)
			if err := placed.Release(); err != nil {
				t.Fatal(err)
			}
			if st := s.packs.Stats(); st.Packs != 2 || st.Dead != 0 {
				t.Errorf("%+v", st)
			}
			d.check(t, s)
		})
	}
}

// Where there is no room, or nobody waits any more, everything stays as it was.
func TestCoarsenRefused(t *testing.T) {
	d, s, ids := fromDense(t, []any{"a", "b"}, []any{"c"})
	before := s.packs.Stats()
	all := slices.Concat(ids...)
	c := NewCompactor(s, CompactOptions{})
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		c    *Compactor
		room func(int64) error
		want error
	}{
		"no room":       {t.Context(), c, func(int64) error { return unix.ENOSPC }, unix.ENOSPC},
		"nobody waits":  {gone, c, roomForAll, context.Canceled},
		"does not sync": {t.Context(), NewCompactor(s, CompactOptions{Sync: brokenSync}), roomForAll, unix.EIO},
	} {
		err := c.c.Coarsen(c.ctx, all, c.room)
		if !errors.Is(err, c.want) || !errors.Is(err, ErrTooDense) || errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		if st := s.packs.Stats(); st != before {
			t.Errorf("%s: %+v, before %+v", name, st, before)
		}
		if _, err := s.Places(all); !errors.Is(err, ErrTooDense) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d.check(t, s)
}

func brokenSync() (func() error, func(), error) {
	return func() error { return unix.EIO }, func() {}, nil
}

// Compact asks for as much room as coarse copies take, not for what they take in dense packs.
func TestCompactDenseWithoutRoom(t *testing.T) {
	d, s, _ := fromDense(t, []any{"a", "b", "c", "d"})
	room := int64(0)
	c := NewCompactor(s, CompactOptions{Room: func() int64 { return room }})
	for room = 0; room < d.space("a", "b", "c", "d"); room += content.BlockSize {
		if c.Needed() {
			t.Errorf("merges with room for %d bytes", room)
		}
	}
	if room *= 2; !c.Needed() {
		t.Error("does not merge")
	}
}

// Who waits for some objects does not wait until all are copied.
func TestCoarsenBetweenMerges(t *testing.T) {
	var packs [][]any
	for i := range 40 {
		packs = append(packs, []any{i + 100})
	}
	_, s, ids := fromDense(t, packs...)
	// One pack at a time, in the order of their ids.
	c := NewCompactor(s, CompactOptions{Room: func() int64 { return 2 * content.BlockSize }})
	var wg sync.WaitGroup
	begun := false
	last := ids[len(ids)-1]
	s.packs.opts.Step = func(name string) {
		time.Sleep(100 * time.Microsecond) // the other may run
		if name != "merge.copied" || packOf(t, s, ids[1][0]).dense == packOf(t, s, ids[0][0]).dense {
			return
		}
		begun = true
		wg.Go(func() {
			if err := c.Coarsen(t.Context(), last, roomForAll); err != nil {
				t.Error(err)
			}
			if packOf(t, s, last[0]).dense || !packOf(t, s, ids[len(ids)-2][0]).dense {
				t.Error("Coarsen waited for Compact")
			}
		})
	}
	if err := c.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if !begun {
		t.Error("packs are not merged one by one")
	}
}

// Packs of both kinds become one of the kind that new ones have.
func TestMergeBothKinds(t *testing.T) {
	for _, dense := range []bool{true, false} {
		t.Run(fmt.Sprint("dense ", dense), func(t *testing.T) {
			d := newDisk(t, !dense)
			s := d.open(t)
			var ids []content.ObjectID
			var seeds []any
			fill := func(from int) {
				for i := from; i < from+tierWidth; i++ {
					seeds = append(seeds, i, fmt.Sprint(i, " too"))
					ids = append(ids, put(t, s, seeds[len(seeds)-2:]...)...)
				}
			}
			fill(0)
			d.check(t, s)
			d = d.on(dense)
			s = d.open(t, ids...)
			fill(100)
			if dense { // one dense pack is enough, wherever it is among the others
				placed, err := s.Places([]content.ObjectID{ids[0], ids[len(ids)-2], ids[len(ids)-1]})
				if err != nil || !placed.Dense() || len(placed.IDs()) != 2 {
					t.Fatal(placed, err)
				}
				if err := placed.Release(); err != nil {
					t.Fatal(err)
				}
			}
			if err := NewCompactor(s, CompactOptions{}).Compact(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, p := range s.packs.all {
				if p.dense != dense {
					t.Errorf("pack %s is of the other kind", p.id)
				}
			}
			if st := s.packs.Stats(); st.Packs > tierWidth+1 {
				t.Errorf("%+v", st)
			}
			d.wantStats(t, s, d.space(seeds...), 0)
			placed, err := s.Places(ids)
			if err != nil || placed.Dense() != dense {
				t.Fatal(err)
			}
			readPlaced(t, s, placed, ids)
			if err := placed.Release(); err != nil {
				t.Fatal(err)
			}
			d.check(t, s)
			d.open(t, ids...)
		})
	}
}

// Some wait for their objects to be copied, while all others are copied in the background, and ingests come and go.
func TestCoarsenBesideAll(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var packs [][]any
	for i := range 40 {
		packs = append(packs, []any{i, i + 1, i + 2, fmt.Sprint("own ", i)})
	}
	d, s, ids := fromDense(t, packs...)
	c := NewCompactor(s, CompactOptions{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 20 {
			if err := c.Compact(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
	for g := range 3 { // each has references to all that fromDense has put
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			for range 30 {
				waitsFor := slices.Concat(ids[r.IntN(len(ids))], ids[r.IntN(len(ids))])
				placed, err := s.Places(waitsFor)
				if errors.Is(err, ErrTooDense) {
					if err = c.Coarsen(t.Context(), waitsFor, roomForAll); err == nil {
						placed, err = s.Places(waitsFor)
					}
				}
				if err != nil || placed.Dense() {
					t.Errorf("not all were copied: %v", err)
					return
				}
				readPlaced(t, s, placed, waitsFor)
				if err := placed.Release(); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(100+g)))
			for range 60 {
				unref(t, s, put(t, s, r.IntN(60), fmt.Sprint("new ", g))...)
			}
		})
	}
	wg.Wait()
	if err := c.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.packs.all {
		if p.dense {
			t.Errorf("pack %s is still dense", p.id)
		}
	}
	d.check(t, s)
}

// Wherever a crash ends Coarsen, the next start has all objects, whatever the kernel is then.
func TestCrashInCoarsen(t *testing.T) {
	d, s, ids := fromDense(t, []any{"a", "b"}, []any{"c", "d"})
	all := slices.Concat(ids...)
	left := map[string]string{}
	s.packs.opts.Step = func(name string) {
		name = fmt.Sprintf("%02d %s", len(left), name)
		left[name] = t.TempDir()
		if err := os.CopyFS(filepath.Join(left[name], "packs"), os.DirFS(s.packs.Dir())); err != nil {
			t.Error(err)
		}
	}
	if err := NewCompactor(s, CompactOptions{}).Coarsen(t.Context(), all, roomForAll); err != nil {
		t.Fatal(err)
	}
	s.packs.opts.Step = nil
	if len(left) != 2*6 {
		t.Errorf("%d steps", len(left))
	}
	d.check(t, s)
	for name, root := range left {
		for _, dense := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " dense ", dense), func(t *testing.T) {
				d := newDisk(t, dense)
				if err := os.CopyFS(filepath.Join(d.root, "packs"), os.DirFS(filepath.Join(root, "packs"))); err != nil {
					t.Fatal(err)
				}
				s := d.open(t, all...)
				c := NewCompactor(s, CompactOptions{})
				placed, err := s.Places(all)
				if errors.Is(err, ErrTooDense) && !dense {
					if err = c.Coarsen(t.Context(), all, roomForAll); err == nil {
						placed, err = s.Places(all)
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				readPlaced(t, s, placed, all)
				if err := errors.Join(placed.Release(), c.Compact(t.Context())); err != nil {
					t.Fatal(err)
				}
				if st := s.packs.Stats(); st.Dead != 0 {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}
