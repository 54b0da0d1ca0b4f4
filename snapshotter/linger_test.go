package snapshotter

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// An image stays mounted after its last container, which is nothing that is left behind, until it is removed, its room
// is needed, or the daemon stops.
func TestImageStaysMounted(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact,
		Verity: testVerity(), PageCache: testPageCache(), noDense: testNoDense(), Linger: time.Hour})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	image, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("a", 9000)}), nil)
	other, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"b": strings.Repeat("b", 9000)}), nil)
	use := func(key, parent string) {
		t.Helper()
		_, err := s.Prepare(t.Context(), key, parent)
		must(t, err)
		must(t, s.Remove(t.Context(), key))
	}
	mounted := func(want int, when string) {
		t.Helper()
		names, err := s.chains.List()
		must(t, err)
		got := 0
		for _, n := range names {
			if s.chains.IsMounted(n) {
				got++
			}
		}
		if got != want {
			t.Errorf("%s: %d images are mounted, want %d", when, got, want)
		}
	}
	use("first", image)
	use("second", image)
	use("third", other)
	must(t, s.Cleanup(t.Context()))
	mounted(2, "after the last containers")
	if idle, err := s.IdleMounts(); err != nil || len(idle) > 0 {
		t.Errorf("left behind: %v, %v", idle, err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("check: %+v, %v", found, err)
	}
	must(t, s.Remove(t.Context(), other))
	must(t, s.Cleanup(t.Context()))
	mounted(1, "after an image was removed")
	_, err = s.GC(t.Context(), GCOptions{Chains: true})
	must(t, err)
	mounted(0, "when room is needed")
	use("fourth", image)
	mounted(1, "after another container")
	must(t, s.Close())
	if left := mountsBelow(t, root); len(left) > 0 {
		t.Errorf("still mounted after the daemon stopped: %v", left)
	}
}

// What stays mounted goes in the end, and stays with who comes meanwhile.
func TestImageIsUnmountedInTheEnd(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact,
		Verity: testVerity(), PageCache: testPageCache(), noDense: testNoDense(), Linger: 50 * time.Millisecond})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	image, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("a", 9000)}), nil)
	for _, key := range []string{"first", "second"} {
		_, err := s.Prepare(t.Context(), key, image)
		must(t, err)
	}
	must(t, s.Remove(t.Context(), "first"))
	time.Sleep(200 * time.Millisecond)
	if len(mountsBelow(t, root)) == 0 {
		t.Error("the image of a container was unmounted")
	}
	must(t, s.Remove(t.Context(), "second"))
	for deadline := time.Now().Add(time.Minute); len(mountsBelow(t, root)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still mounted: %v", mountsBelow(t, root))
		}
	}
}
