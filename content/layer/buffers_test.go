package layer

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
)

// whole checks that everything is free again, in one block.
func (b *buffers) whole(t *testing.T) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for level, free := range b.free {
		if want := level / (buddyLevels - 1); len(free) != want {
			t.Errorf("%d free blocks of level %d, want %d", len(free), level, want)
		}
	}
	if b.used != 0 || b.handed != 0 || len(b.waiting) != 0 {
		t.Errorf("%d blocks in use, %d wait", b.used, len(b.waiting))
	}
}

// TestBuffersAreApart: buffers that are in use at the same time share no byte, whatever their sizes.
func TestBuffersAreApart(t *testing.T) {
	var b buffers
	seed := rand.Uint64()
	t.Log("seed", seed)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			for range 300 {
				size := 1 + r.IntN(1<<(1+r.IntN(20)))
				if r.IntN(50) == 0 {
					size = bufferMax - r.IntN(2)
				}
				f, err := b.get(t.Context(), size)
				if err != nil || len(f.data) != size {
					t.Error(len(f.data), size, err)
					return
				}
				mark := bytes.Repeat([]byte{byte(g + 1)}, min(size, 5000))
				end := f.data[size-len(mark):]
				copy(f.data, mark)
				copy(end, mark)
				if !bytes.Equal(f.data[:len(mark)], mark) || !bytes.Equal(end, mark) {
					t.Error("somebody else wrote to it")
				}
				f.release()
			}
		})
	}
	wg.Wait()
	b.whole(t)
	b.trim()
	if b.slab != nil {
		t.Error("the mapping is still there")
	}
	f, err := b.get(t.Context(), bufferMin+1)
	if err != nil {
		t.Fatal(err)
	}
	b.trim()
	f.data[bufferMin] = 1 // it is in use, so it stays
	f.release()
	b.whole(t)
	b.trim()
}

// TestBuffersWait: who finds no room waits its turn, also when somebody who asks for less comes later, and ends with
// its context.
func TestBuffersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b buffers
		defer b.trim()
		get := func(ctx context.Context, n int) <-chan error {
			done := make(chan error, 1)
			go func() {
				f, err := b.get(ctx, n)
				if err == nil {
					f.release()
				}
				done <- err
			}()
			synctest.Wait()
			return done
		}
		var held []buffer
		for range 2 {
			f, err := b.get(t.Context(), bufferMax)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, f)
		}
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		first, second, third := get(ctx, bufferMax), get(t.Context(), bufferMax), get(t.Context(), 1)
		if len(b.waiting) != 3 {
			t.Fatalf("%d wait", len(b.waiting))
		}
		cancel(gone)
		if err := <-first; !errors.Is(err, gone) {
			t.Errorf("got %v", err)
		}
		held[0].release()
		if err := errors.Join(<-second, <-third); err != nil {
			t.Error(err)
		}
		held[1].release()
		b.whole(t)
	})
}
