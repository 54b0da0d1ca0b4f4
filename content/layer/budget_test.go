package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// openSmall opens a store in which a share is 256 KiB, and the large one 6 MiB.
func openSmall(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{Root: t.TempDir(), MaxMemory: 8 << 20}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func idle(t *testing.T, s *Store) {
	t.Helper()
	if len(s.budget.small) != 0 || len(s.budget.large) != 0 || s.budget.active != 0 {
		t.Errorf("%d small and %d large shares are taken, %d active", len(s.budget.small), len(s.budget.large),
			s.budget.active)
	}
}

// TestMaxMemory: a layer that takes too much is refused with words that help, leaves nothing, and harms no other.
func TestMaxMemory(t *testing.T) {
	s := openSmall(t)
	for name, row := range map[string]struct {
		blob Blob
		fits bool
	}{
		"few files":            {smallBlob(200, 100), true},
		"many files":           {smallBlob(5000, 1), true},
		"too many files":       {smallBlob(20_000, 1), false},
		"too much inline data": {smallBlob(4500, content.InlineMax), false},
		"deep directories":     {tarBlob(deepTar(t)), false},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := s.IngestBlob(t.Context(), row.blob)
			idle(t, s)
			if !row.fits {
				for _, says := range []string{"6MiB", "max_memory", "MemoryMax", row.blob.Digest.String()} {
					if !errors.Is(err, archive.ErrMemory) || !strings.Contains(err.Error(), says) {
						t.Errorf("want an ErrMemory that says %q, got %v", says, err)
					}
				}
				if kindOf(err) != FailedResource || s.Objects() != 0 {
					t.Errorf("failure %q, %d objects", kindOf(err), s.Objects())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			release, err := s.ReserveChain(t.Context(), []content.LayerID{in.Layer})
			if err != nil {
				t.Fatalf("what came in cannot be built: %v", err)
			}
			release()
			_, err = s.ReserveChain(t.Context(), slicesOf(in.Layer, 100))
			if name == "many files" && (!errors.Is(err, archive.ErrMemory) || !strings.Contains(err.Error(),
				"chain of 100 layers")) {
				t.Errorf("a chain of 100: %v", err)
			}
			idle(t, s)
			s.Release(in.Layer)
			s.Wait()
		})
	}
}

func slicesOf(id content.LayerID, n int) (ids []content.LayerID) {
	for range n {
		ids = append(ids, id)
	}
	return ids
}

func tarBlob(data []byte) Blob {
	return Blob{Digest: digest.FromBytes(data), Open: func(context.Context) (io.ReadCloser,
		error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}}
}

// deepTar has few members whose directories nobody mentions, two thousand for each.
func deepTar(t testing.TB) []byte {
	var m []member
	for i := range 20 {
		m = append(m, member{name: fmt.Sprint(i, "/", strings.Repeat("d/", 2000), "f")})
	}
	return makeTar(t, m...)
}

// TestIngestCountsForBuild: whatever a layer looks like, its ingest counts at least as much as a build of it will.
func TestIngestCountsForBuild(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	for name, data := range map[string][]byte{
		"deep": deepTar(t),
		"plain": makeTar(t, member{name: "a", data: "x"}, member{name: "b/c", data: strings.Repeat("y", 700)},
			member{name: "b/.wh.gone"}),
	} {
		var kept int64
		blob := tarBlob(data)
		in, err := s.IngestBlob(t.Context(), blob)
		if err != nil {
			t.Fatal(err)
		}
		entries, err := archive.ReadTar(t.Context(), bytes.NewReader(data), newDrafter(nil),
			func(n int64) error { kept += n; return nil })
		if err != nil {
			t.Fatal(err)
		}
		length, err := tree.Length(s.treePath(in.Layer), in.Layer)
		if err != nil {
			t.Fatal(err)
		}
		// A reader tells in steps, and has kept up to one back.
		if cost := chainCost(int64(len(entries)), length); kept+archive.MemoryStep < cost {
			t.Errorf("%s: kept %d bytes, a build takes %d", name, kept, cost)
		}
		s.Release(in.Layer)
	}
}

// TestLargeOnesTakeTurns: of many layers that take more than a small share one goes on at a time, and all end.
func TestLargeOnesTakeTurns(t *testing.T) {
	s := openSmall(t)
	errs := make(chan error, 20)
	for i := range cap(errs) {
		go func() {
			in, err := s.IngestBlob(t.Context(), smallBlob(3000+i, 1))
			if err == nil {
				s.Release(in.Layer)
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	idle(t, s)
}

// TestArrivingWaitsForNothing: a download that needs a large share, or finds half of the small ones taken, is read
// when it is whole.
func TestArrivingWaitsForNothing(t *testing.T) {
	s := openSmall(t)
	arriving := smallBlob(5000, 1)
	arriving.Arriving = true
	if _, err := s.IngestBlob(t.Context(), arriving); !errors.Is(err, ErrUnverified) ||
		!errors.Is(err, archive.ErrMemory) {
		t.Errorf("a large one: %v", err)
	}
	for range smallShares / 2 {
		sh, err := s.budget.share(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		defer sh.end()
	}
	arriving = smallBlob(10, 1)
	arriving.Arriving = true
	if _, err := s.IngestBlob(t.Context(), arriving); !errors.Is(err, ErrUnverified) {
		t.Errorf("beside others: %v", err)
	}
	arriving.Arriving = false
	in, err := s.IngestBlob(t.Context(), arriving)
	if err != nil {
		t.Fatal(err)
	}
	s.Release(in.Layer)
}

// TestBudgetWaits: who waits for memory ends with its context, and gives back what it had.
func TestBudgetWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var freed atomic.Int32
		b := newBudget(8<<20, func() { freed.Add(1) })
		first, _ := b.share(t.Context(), false)
		if err := first.keep(1 << 20); err != nil {
			t.Fatal(err)
		}
		gone := errors.New("the client has gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		second, _ := b.share(ctx, false)
		done := make(chan error)
		go func() { done <- second.keep(1 << 20) }()
		synctest.Wait()
		cancel(gone)
		if err := <-done; !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
		second.end()
		first.end()
		third, _ := b.share(t.Context(), false)
		if err := third.keep(1 << 20); err != nil || freed.Load() != 0 {
			t.Errorf("after the others: %v, freed %d times", err, freed.Load())
		}
		third.end()
		// The heap goes back when nothing has run for a while, once.
		synctest.Wait()
		for range 2 {
			time.Sleep(2 * freeAfter)
		}
		if freed.Load() != 1 {
			t.Errorf("freed %d times", freed.Load())
		}
		b.close()
	})
}
func TestBudgetIsGivenBack(t *testing.T) {
	freed := make(chan struct{}, 2)
	b := newBudget(1<<20, func() { freed <- struct{}{} })
	defer b.close()
	first, err := b.share(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	second, err := b.share(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*share{first, second} {
		if err := s.keep(1000); err != nil {
			t.Fatal(err)
		}
	}
	s := &Store{budget: b}
	if used, most := Memory(s); used != 2000 || most != 1<<20 {
		t.Errorf("%d of %d bytes are kept", used, most)
	}
	first.end()
	if used, _ := Memory(s); used != 1000 {
		t.Errorf("%d bytes are kept after the first", used)
	}
	second.end()
	if used, _ := Memory(s); used != 0 {
		t.Errorf("%d bytes are kept after both", used)
	}
	select {
	case <-freed:
		t.Error("the heap goes back at once")
	default:
	}
	select {
	case <-freed:
	case <-time.After(time.Minute):
		t.Error("the heap does not go back")
	}
}
