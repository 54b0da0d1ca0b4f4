package lower

import (
	"context"
	"fmt"
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
	k, ok := kinds(t)["private looped"]
	if !ok {
		t.Skip("images are not mounted from loop devices here")
	}
	l := newLab(t, k)
	l.linger()
	idle := l.useOnce("idle")
	used := l.ingest(map[string]string{"file": "used"})
	l.Users.Use(l.Name([]content.LayerID{used}, Plain), "used")
	l.ensure(used)
	next := l.ingest(map[string]string{"file": "next"})
	l.Users.Use(l.Name([]content.LayerID{next}, Plain), "next")
	l.Chains.mounts.step = func(name string) {
		for i := 0; name == "chain.unmounted" && i < 1<<10; i++ { // now there are devices
			_ = unix.Mknod(fmt.Sprint("/dev/loop", i), unix.S_IFBLK|0o600, int(unix.Mkdev(7, uint32(i))))
		}
	}
	err := withDev(t, true, func() error {
		_, err := l.Ensure(t.Context(), []content.LayerID{next}, Plain)
		return err
	})
	l.Chains.mounts.step = func(string) {}
	if err != nil {
		t.Errorf("with an idle image: %v", err)
	}
	if l.IsMounted(idle) || l.Users.IsKept(idle) {
		t.Error("the idle image keeps its loop devices")
	}
	if !l.IsMounted(l.Name([]content.LayerID{used}, Plain)) {
		t.Error("an image that is used was unmounted")
	}
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
	for i, n := range names[2:] {
		if !l.IsMounted(n) || !l.Users.IsKept(n) {
			t.Errorf("image %d of %d is not mounted any more", i+2, len(names))
		}
	}
}
