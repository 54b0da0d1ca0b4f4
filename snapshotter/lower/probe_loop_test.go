package lower

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

func needsMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
}

// With Loop chain images are mounted from loop devices, from the first container on.
func TestLoopWhereErofsCounts(t *testing.T) {
	needsMounts(t)
	for _, asked := range []bool{true, false} {
		dir := t.TempDir()
		o := Options{
			Images: filepath.Join(dir, "images"), Staging: dir, Mounts: filepath.Join(dir, "mounts"), Loop: asked,
			Merge: func(context.Context, []content.LayerID) (*tree.Node, error) {
				return &tree.Node{Entry: &content.Entry{Kind: content.Dir, Mode: 0o755}}, nil
			},
		}
		if err := os.Mkdir(o.Images, 0o700); err != nil {
			t.Fatal(err)
		}
		c, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		chain := []content.LayerID{{Sum: content.Sum{1}}}
		if err := c.Ensure(t.Context(), chain); err != nil {
			t.Fatal(err)
		}
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(o.Mounts))
		if err != nil || len(mounts) != 1 {
			t.Fatalf("mounts %v, %v", mounts, err)
		}
		f, err := Examine(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if source := mounts[0].Source; strings.HasPrefix(source, "/dev/loop") != (asked || f.Loop) {
			t.Errorf("asked for a loop device: %v, mounted from %s", asked, source)
		}
		if err := c.Drop(t.Context(), c.Name(chain)); err != nil {
			t.Fatal(err)
		}
	}
}

// Features say whether a container can mount overlays over its own files, and so does trying it.
func TestNestedOverlays(t *testing.T) {
	needsMounts(t)
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
	needsMounts(t)
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
