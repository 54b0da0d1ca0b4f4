package snapshotter

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Where the kernel counts an EROFS that is mounted from its file as a level of stacked file systems, chain images are mounted from
// loop devices, from the first container on.
func TestLoopWhereErofsCounts(t *testing.T) {
	s := open(t, t.TempDir())
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"file": strings.Repeat("text", 5000)}), nil)
	sourceOf := func(key string) string {
		t.Helper()
		if _, err := s.Prepare(t.Context(), key, name); err != nil {
			t.Fatal(err)
		}
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.chains.mnt))
		if err != nil || len(mounts) != 1 {
			t.Fatalf("mounts %v, %v", mounts, err)
		}
		if err := s.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		return mounts[0].Source
	}
	s.chains.loop = true // what probe makes of Features.Counted
	if source := sourceOf("looped"); !strings.HasPrefix(source, "/dev/loop") {
		t.Errorf("mounted from %s", source)
	}
	s.chains.loop = s.kernel.loop
	if source := sourceOf("plain"); s.kernel.loop != strings.HasPrefix(source, "/dev/loop") {
		t.Errorf("mounted from %s, and the probe says loop %v", source, s.kernel.loop)
	}
}

// Features say whether a container can mount overlays over its own files, and so does trying it.
func TestNestedOverlays(t *testing.T) {
	open(t, t.TempDir()) // skips where nothing can be mounted
	f, err := Examine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if f.Nested != nil {
		t.Errorf("overlays inside of containers: %v", f.Nested)
	}
	if f.Counted != nil && !f.Loop {
		t.Errorf("%v, and images are mounted from files", f.Counted)
	}
}

// A lower directory that is one level too high, as an EROFS file is on some kernels, has the probe turn to loop devices.
func TestProbeCountsLevels(t *testing.T) {
	open(t, t.TempDir()) // skips where nothing can be mounted
	dir := t.TempDir()
	object, err := writeProbe(dir, []byte("payload"))
	if err == nil {
		err = writeProbeImage(filepath.Join(dir, "chain.erofs"), object, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	image, stacked := filepath.Join(dir, "image"), t.TempDir()
	if _, err := mountErofs(filepath.Join(dir, "chain.erofs"), image, true); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(image, unix.MNT_DETACH) })
	if err := unix.Mount("overlay", stacked, "overlay", 0, "lowerdir="+image+":"+t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(stacked, unix.MNT_DETACH) })
	for _, row := range []struct {
		name, lower string
		counted     bool
	}{{"low enough", image, false}, {"too high", stacked, true}} {
		t.Run(row.name, func(t *testing.T) {
			var f Features
			if err := f.examineStacking(dir, row.lower); err != nil {
				t.Fatal(err)
			}
			if f.Loop != row.counted || (f.Counted != nil) != row.counted || f.Nested != nil {
				t.Errorf("%+v", f)
			}
		})
	}
}
