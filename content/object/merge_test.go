package object

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A merge whose copies did not come to the disk gives nothing up.
func TestMergeThatDoesNotSync(t *testing.T) { forBothKinds(t, testMergeThatDoesNotSync) }

func testMergeThatDoesNotSync(t *testing.T, d disk) {
	s := d.open(t)
	stopped := 0
	c := NewCompactor(s, CompactOptions{Sync: func() (func() error, func(), error) {
		return func() error { return unix.EIO }, func() { stopped++ }, nil
	}})
	for i := range tierWidth + 1 {
		put(t, s, i)
	}
	if err := c.Compact(t.Context()); !errors.Is(err, unix.EIO) || stopped != 1 {
		t.Errorf("%v, stopped %d times", err, stopped)
	}
	if st := s.packs.Stats(); st.Packs != tierWidth+1 {
		t.Errorf("%+v", st)
	}
}

// A copy of a payload that came to the disk in parts, in a pack that is not known to be whole, does not hide an older
// one.
func TestTornPackAfterPowerCut(t *testing.T) { forBothKinds(t, testTornPackAfterPowerCut) }

func testTornPackAfterPowerCut(t *testing.T, kind disk) {
	for _, row := range []struct {
		name  string
		since time.Duration // of the mark, from now
		want  int           // the pack that counts
		torn  bool
	}{
		{"whole, in doubt", -time.Hour, 1, false},
		{"torn, in doubt", -time.Hour, 0, true},
		{"torn, not in doubt", time.Hour, 1, true}, // Check finds it
	} {
		t.Run(row.name, func(t *testing.T) {
			d := newDisk(t, kind.dense)
			s := d.open(t)
			a, b := s.Begin(), s.Begin()
			data := payload("both")
			for _, w := range []*Writer{a, b} {
				if _, err := w.Put(idOf(data), data); err != nil {
					t.Fatal(err)
				}
			}
			var paths []string
			for _, w := range []*Writer{b, a} { // the younger id is sealed first, and counts
				if _, err := w.Put(idOf(payload(len(paths))), payload(len(paths))); err != nil {
					t.Fatal(err)
				}
				if _, err := w.Seal(); err != nil {
					t.Fatal(err)
				}
				place, _ := s.Place(idOf(payload(len(paths))))
				paths = append(paths, s.packs.Path(place.Pack))
			}
			slices.Reverse(paths) // older first
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s.refs, s.packs.all = nil, nil
			if row.torn {
				b, err := os.ReadFile(paths[1])
				if err != nil {
					t.Fatal(err)
				}
				i := bytes.Index(b, data)
				clear(b[i : i+len(data)])
				if err := errors.Join(os.Chmod(paths[1], 0o600), os.WriteFile(paths[1], b, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			again := d.opened(t, Options{Since: time.Now().Add(row.since)})
			defer again.Close()
			again.Load([]content.ObjectID{idOf(data), idOf(payload(0)), idOf(payload(1))})
			if _, err := again.Settle(false); err != nil {
				t.Fatal(err)
			}
			place, _ := again.Place(idOf(data))
			if got := slices.Index(paths, again.packs.Path(place.Pack)); got != row.want {
				t.Errorf("pack %d counts, want %d", got, row.want)
			}
			if len(again.Bad()) > 0 {
				t.Error("objects are bad")
			}
			if !row.torn || row.want == 1 {
				return
			}
			if mended, err := NewCompactor(again, CompactOptions{}).MendTorn(t.Context()); err != nil || !mended {
				t.Errorf("mended %v, %v", mended, err)
			}
			d.open(t, idOf(data), idOf(payload(0)), idOf(payload(1))) // without doubt
		})
	}
}

// A chain image keeps the packs that it names.
func TestHolders(t *testing.T) { forBothKinds(t, testHolders) }

func testHolders(t *testing.T, d disk) {
	s := d.open(t)
	one, two := put(t, s, "a", "b"), put(t, s, "c")
	placed, err := s.Places([]content.ObjectID{one[0], one[1], two[0]})
	if err != nil || len(placed.Packs()) != 2 || placed.Packs()[0].Pack >= placed.Packs()[1].Pack {
		t.Fatal(placed, err) // the one with most objects first
	}
	unref(t, s, append(one, two...)...)
	if st := s.packs.Stats(); st.Packs != 2 || !s.packs.Superseded(placed.IDs()[0]) {
		t.Errorf("%+v", st)
	}
	if err := s.packs.Hold(placed.IDs()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.packs.Release(placed.IDs()); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.packs.Stats(); st.Packs != 0 {
		t.Errorf("%+v", st)
	}
	if err := s.packs.Hold(placed.IDs()); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// A pack that only chain images name outlasts a restart, until they let it go.
func TestHoldersOutlastRestart(t *testing.T) { forBothKinds(t, testHoldersOutlastRestart) }

func testHoldersOutlastRestart(t *testing.T, d disk) {
	s := d.open(t)
	ids := put(t, s, "a")
	place, _ := s.Place(ids[0])
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.refs, s.packs.all = nil, nil
	held := []content.PackID{place.Pack, place.Pack + 1}
	again := d.opened(t, Options{Held: held})
	if n, err := again.Settle(false); err != nil || n > 0 {
		t.Errorf("removed %d, %v", n, err)
	}
	if err := errors.Join(again.packs.Hold(held[:1]), again.packs.Release(held)); err != nil {
		t.Fatal(err)
	}
	if st := again.packs.Stats(); st.Packs != 1 {
		t.Errorf("%+v", st)
	}
	if err := again.packs.Release(held[:1]); err != nil {
		t.Fatal(err)
	}
	if st := again.packs.Stats(); st.Packs != 0 {
		t.Errorf("%+v", st)
	}
	d.check(t, again)
}

func TestCompact(t *testing.T) { forBothKinds(t, testCompact) }

func testCompact(t *testing.T, d disk) {
	s := d.open(t)
	var moved []content.PackID
	s.packs.opts.Moved = func(ids []content.PackID, _ bool) { moved = append(moved, ids...) }
	var all []content.ObjectID
	var live int64
	for i := range 40 {
		all = append(all, put(t, s, i, fmt.Sprint(i, " dies"))...)
		live += d.space(i)
	}
	placed, err := s.Places(all[:1])
	if err != nil {
		t.Fatal(err)
	}
	var keep []content.ObjectID
	for i, id := range all {
		if i%2 == 1 {
			unref(t, s, id)
		} else {
			keep = append(keep, id)
		}
	}
	if err := NewCompactor(s, CompactOptions{}).Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := s.packs.Stats(); st.Packs != 2 || st.Live != live {
		t.Errorf("%+v, want the merged pack and one that a chain image names", st)
	}
	if !slices.Equal(moved, placed.IDs()) {
		t.Errorf("moved %v, want %v", moved, placed.IDs())
	}
	if err := placed.Release(); err != nil {
		t.Fatal(err)
	}
	if st := s.packs.Stats(); st.Packs != 1 || st.Dead != 0 {
		t.Errorf("%+v", st)
	}
	d.check(t, s)
	s2 := d.open(t, keep...)
	if st := s2.packs.Stats(); st.Packs != 1 || len(s2.Bad()) > 0 {
		t.Errorf("after a restart: %+v", st)
	}
}

func TestPlan(t *testing.T) {
	many := func(n int, live, dead int64) (packs []packState) {
		for i := range n {
			packs = append(packs, packState{id: content.PackID(i + 1), live: live, dead: dead})
		}
		return packs
	}
	for name, c := range map[string]struct {
		packs []packState
		room  int64
		want  int // how many are merged
	}{
		"nothing":                  {nil, plenty, 0},
		"a few small ones":         {many(tierWidth, 10, 0), plenty, 0},
		"one too many":             {many(tierWidth+1, 10, 0), plenty, tierWidth + 1},
		"large ones stay":          {many(100, tierTop, 0), plenty, 0},
		"mostly dead":              {many(1, 10_000, 6_000), plenty, 1},
		"a little dead":            {many(1, 10_000, 3_000), plenty, 0},
		"all dead, but held":       {many(20, 0, 100), plenty, 0},
		"small and dead":           {many(1, 10, 100), plenty, 0},
		"damaged":                  {[]packState{{id: 1, live: 5, rewrite: true}}, plenty, 1},
		"damaged, nothing to copy": {append(many(7, 10, 0), packState{id: 99, dead: 9, rewrite: true}), plenty, 7},
		"not more than fits":       {many(10, mergeMax/3, mergeMax/3), plenty, 3},
		"one that is larger alone": {many(1, 3*mergeMax, 3*mergeMax), plenty, 1},
		"no room for one":          {many(1, 10_000, 6_000), 9_999, 0},
		"no room for the first":    {append(many(1, 10_000, 6_000), packState{id: 2, live: 500, dead: 500}), 9_999, 1},
		"room for two":             {many(10, 10_000, 10_000), 25_000, 2},
		"no room for two":          {many(tierWidth+1, 10, 0), 19, 0},
		"no room at all":           {many(tierWidth+1, 10, 0), 0, 0},
	} {
		if got := plan(c.packs, c.room); len(got) != c.want {
			t.Errorf("%s: %d are merged, want %d", name, len(got), c.want)
		}
	}
}

// However layers come in, the number of packs stays near tierWidth for each size, and what is copied near the number of
// sizes.
func TestPlanBounds(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var packs []packState
	var came, copied int64
	most := 0
	for i := range 5000 {
		live := int64(1) << r.IntN(14)
		came += live
		packs = append(packs, packState{id: content.PackID(i + 1), live: live})
		for ids := plan(packs, plenty); len(ids) > 0; ids = plan(packs, plenty) {
			merged := packState{id: content.PackID(1_000_000 + i)}
			packs = slices.DeleteFunc(packs, func(p packState) bool {
				if slices.Contains(ids, p.id) {
					merged.live += p.live
					return true
				}
				return false
			})
			copied += merged.live
			packs = append(packs, merged)
		}
		most = max(most, len(packs))
	}
	large := int(came / tierTop)
	if bound := 6*tierWidth + large; most > bound || copied > 5*came {
		t.Errorf("%d packs, want at most %d; %d blocks came and %d were copied", most, bound, came, copied)
	}
}
