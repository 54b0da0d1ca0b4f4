package lower

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// linger has chains of a lab stay mounted after their last user.
func (l *lab) linger() {
	ctx, cancel := context.WithCancel(context.Background())
	l.t.Cleanup(cancel)
	l.opts.Linger = time.Hour
	l.opts.Background = func(fn func(context.Context)) bool {
		l.drops.Go(func() { fn(ctx) })
		return true
	}
}

// useOnce mounts a chain of one layer for a user that goes at once.
func (l *lab) useOnce(id string) Name {
	l.t.Helper()
	layer := l.ingest(map[string]string{"file": id})
	n := l.Name([]content.LayerID{layer}, Plain)
	l.Users.Use(n, id)
	l.ensure(layer)
	l.Users.Unuse(id)
	l.Leave(n, func(err error) { l.t.Error(err) })
	return n
}

// Where the machine has no loop device left, images give theirs up that only stay mounted for who may come.
func TestLoopDevicesOfIdleImages(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		if !l.opts.Kernel.Loop {
			t.Skip("files are mounted")
		}
		const own = "/dev/own" // the background sees the machine's /dev, which stays as it is
		l.Chains.mounts.step = func(name string) {
			if name != "chain.unmounted" || !exists(own) {
				return
			}
			for i := range 1 << 10 { // now there are devices
				_ = unix.Mknod(fmt.Sprint("/dev/loop", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i))))
			}
		}
		l.linger()
		idle := l.useOnce("idle")
		used := []content.LayerID{l.ingest(map[string]string{"file": "used"})}
		l.Users.Use(l.Name(used, Plain), "used")
		l.ensure(used...)
		next := []content.LayerID{l.ingest(map[string]string{"file": "next"})}
		l.Users.Use(l.Name(next, Plain), "next")
		err := withDev(t, true, func() error {
			if err := os.WriteFile(own, nil, 0o600); err != nil {
				return err
			}
			_, err := l.Ensure(t.Context(), next, Plain)
			return err
		})
		if err != nil {
			t.Errorf("with an idle image: %v", err)
		}
		if l.IsMounted(idle) || l.Users.IsLeft(idle) {
			t.Error("the idle image keeps its loop devices")
		}
		if !l.IsMounted(l.Name(used, Plain)) {
			t.Error("an image that is used was unmounted")
		}
	})
}

// Only so many images stay mounted for who may come: those that were used last.
func TestFewImagesLinger(t *testing.T) {
	l := newLab(t, kernel(needFeatures(t), false, needFeatures(t).Loop))
	l.linger()
	var names []Name
	for i := range lingerMost + 2 {
		names = append(names, l.useOnce(fmt.Sprint(i)))
	}
	for deadline := time.Now().Add(time.Minute); l.IsMounted(names[0]) || l.IsMounted(names[1]); {
		if time.Now().After(deadline) {
			t.Fatal("all stay mounted")
		}
		time.Sleep(time.Millisecond)
	}
	if err := l.Drop(t.Context(), names[2]); err != nil || l.Users.IsKept(names[2]) {
		t.Errorf("an image that was removed counts: %v", err)
	}
	for i, n := range names[3:] {
		if !l.IsMounted(n) || !l.Users.IsKept(n) {
			t.Errorf("image %d of %d is not mounted any more", i+3, len(names))
		}
	}
}

// Whoever uses an image finds it mounted, whatever ends its time at the same moment.
func TestLeaveWhileOthersCome(t *testing.T) {
	l := newLab(t, kernel(needFeatures(t), false, needFeatures(t).Loop))
	l.linger()
	l.opts.Linger = time.Millisecond
	ctx := context.Background()
	failed := func(err error) { t.Error(err) }
	var layers []content.LayerID
	for i := range 3 {
		layers = append(layers, l.ingest(map[string]string{"file": fmt.Sprint("of ", i)}))
	}
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(worker)))
			for turn := range 100 {
				i := r.IntN(len(layers))
				n, id := l.Name(layers[i:i+1], Plain), fmt.Sprint(worker, "-", turn)
				l.Users.Use(n, id)
				below, err := l.Ensure(ctx, layers[i:i+1], Plain)
				if err != nil {
					t.Error(err)
				}
				time.Sleep(time.Duration(r.IntN(1500)) * time.Microsecond)
				if text, err := os.ReadFile(filepath.Join(below.Chain, "file")); string(text) != fmt.Sprint("of ", i) {
					t.Errorf("%q, %v", text, err)
				}
				if n, orphaned, _ := l.Users.Unuse(id); orphaned {
					l.Leave(n, failed)
				}
				other := l.Name(layers[r.IntN(len(layers)):][:1], Plain)
				switch r.IntN(8) {
				case 0:
					err = l.Drop(ctx, other)
				case 1:
					err = l.Release(ctx, other)
				case 2:
					l.Users.takeIdle(1)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// An image whose packs were merged below a container does not wait for another container: with one every few seconds,
// the old packs would stay for ever.
func TestMergedBelowLeft(t *testing.T) {
	l := newLab(t, kernel(needFeatures(t), false, needFeatures(t).Loop))
	l.linger()
	var chain []content.LayerID
	for i := range 9 {
		chain = append(chain, l.ingest(map[string]string{fmt.Sprint("f", i): text(fmt.Sprint(i))}))
	}
	n := l.Name(chain, Plain)
	l.Users.Use(n, "1")
	l.ensure(chain...)
	if err := l.layers.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.drops.Wait() // who merges has looked, and found it in use
	l.Users.Unuse("1")
	l.Leave(n, func(err error) { t.Error(err) })
	packs := func() int { // they are freed in the background
		list, _ := filepath.Glob(filepath.Join(l.dir, "root/packs/*"))
		return len(list)
	}
	for deadline := time.Now().Add(10 * time.Second); l.Images.Has(n) || l.IsMounted(n) || packs() >= 9; {
		if time.Now().After(deadline) {
			t.Fatalf("the image over old packs stays, or its packs do: %d packs", packs())
		}
		time.Sleep(time.Millisecond)
	}
}
