package snapshotter

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// A container over steps goes on under a kernel that needs metacopy=on, and what it leaves is whole.
func TestStepsUnderAnotherKernel(t *testing.T) {
	root := t.TempDir()
	s, ctx := openSteps(t, root), ns(t, "steps")
	text := strings.Repeat("text", 5000)
	base, _ := unpack(t, s, "steps", "", layerTar(t, map[string]string{"etc/base": "base", "dir/file": text}), nil)
	one := addStep(t, s, ctx, base, "one", file("one", text))
	two := addStep(t, s, ctx, one, "two", func(root string) error {
		return errors.Join(os.Mkdir(filepath.Join(root, "new"), 0o755), file("new/two", text)(root),
			os.Remove(filepath.Join(root, "etc/base")))
	})
	_, err := s.Prepare(ctx, "container", two)
	must(t, err)
	view, err := s.View(ctx, "view", two)
	must(t, err)
	must(t, s.Close())
	must(t, os.WriteFile(filepath.Join(root, fileMetacopy), nil, 0o600)) // what such a kernel leaves
	s = open(t, root)
	if !s.kernel.Metacopy {
		t.Fatal("it is the same kernel")
	}
	mounts, err := s.Mounts(ctx, "container")
	must(t, err)
	write(t, mounts, func(root string) error {
		for _, name := range []string{"one", "new/two", "dir/file"} {
			if err := os.Chmod(filepath.Join(root, name), 0o600); err != nil {
				return err
			}
		}
		return errors.Join(os.Rename(filepath.Join(root, "dir/file"), filepath.Join(root, "moved")),
			os.Link(filepath.Join(root, "one"), filepath.Join(root, "hard")))
	})
	if _, err := unix.Getxattr(filepath.Join(upperIn(t, s, mounts), "one"), "trusted.overlay.metacopy", nil); err != nil {
		t.Errorf("the upper directory holds the bytes: %v", err)
	}
	must(t, mount.WithTempMount(ctx, view, func(root string) error {
		got, err := os.ReadFile(filepath.Join(root, "new/two"))
		if string(got) != text {
			t.Errorf("a view shows %d bytes", len(got))
		}
		return err
	}))
	must(t, errors.Join(s.Remove(ctx, "view"), s.Commit(ctx, "three", "container")))
	want := map[string]string{"one": text, "new/two": text, "moved": text, "hard": text}
	if got := files(t, s, ctx, "three"); !maps.Equal(got, want) {
		for name := range got {
			got[name] = got[name][:min(5, len(got[name]))]
		}
		t.Errorf("shows %v", got)
	}
	eventually(t, "no directory is left", func() bool { return len(directories(t, s)) == 0 })
	holdsNoSteps(t, s)
}

// Who needs the layers of steps that wait gets them, and who lies over their directories is not disturbed.
func TestStepsWhoseLayersAreNeeded(t *testing.T) {
	s, ctx := openSteps(t, t.TempDir()), ns(t, "steps")
	if s.kernel.NoIDMap != nil {
		t.Skip(s.kernel.NoIDMap)
	}
	name := addStep(t, s, ctx, "", "one", func(root string) error {
		return errors.Join(file("owned", "owned")(root), os.Chown(filepath.Join(root, "owned"), 7, 8))
	})
	name = addStep(t, s, ctx, name, "two", file("two", "two"))
	before, err := s.Prepare(ctx, "before", name)
	must(t, err)
	mapped, err := s.Prepare(ctx, "mapped", "two", mapping("0:100000:65536", "0:200000:65536"))
	must(t, err)
	looksMapped(t, mapped)
	view, err := s.View(ctx, "mapped view", "two", mapping("0:100000:65536", "0:200000:65536"))
	must(t, err)
	looksMapped(t, view)
	write(t, before, file("three", "three"))
	must(t, s.Commit(ctx, "three", "before"))

	// Another differ unpacks a layer on a step.
	layer, err := s.Prepare(ctx, "extract-1 layer", "three")
	must(t, err)
	write(t, layer, func(root string) error {
		return errors.Join(os.Remove(filepath.Join(root, "three")), file("four", "four")(root))
	})
	must(t, s.Commit(ctx, "four", "extract-1 layer"))
	five := addStep(t, s, ctx, "four", "five", file("five", "five"))
	want := map[string]string{"owned": "owned", "two": "two", "four": "four", "five": "five"}
	for range 2 {
		if got := files(t, s, ctx, five); !maps.Equal(got, want) {
			t.Errorf("%v", got)
		}
		_, err = s.Check(ctx, CheckOptions{})
		must(t, err)
	}
	must(t, errors.Join(s.Remove(ctx, "mapped"), s.Remove(ctx, "mapped view")))
	eventually(t, "no directory is left", func() bool { return len(directories(t, s)) == 0 })
	holdsNoSteps(t, s)
}
