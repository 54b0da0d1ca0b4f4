package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// stepBase is an image of one layer.
func stepBase(t *testing.T, s *Snapshotter, ctx context.Context) string {
	t.Helper()
	name, _ := unpack(t, s, "steps", "", layerTar(t, map[string]string{"etc/base": "base", "etc/gone": "gone"}), nil)
	return name
}

// write changes what the mounts of an active snapshot show, as a container would.
func write(t *testing.T, mounts []mount.Mount, change func(root string) error) {
	t.Helper()
	dir := t.TempDir()
	must(t, mount.All(mounts, dir))
	must(t, errors.Join(change(dir), mount.UnmountAll(dir, 0)))
}

func file(name, text string) func(string) error {
	return func(root string) error { return os.WriteFile(filepath.Join(root, name), []byte(text), 0o644) }
}

// addStep commits a snapshot in which change has done its work.
func addStep(t *testing.T, s *Snapshotter, ctx context.Context, parent, name string, change func(string) error) string {
	t.Helper()
	mounts, err := s.Prepare(ctx, "active "+name, parent)
	must(t, err)
	write(t, mounts, change)
	must(t, s.Commit(ctx, name, "active "+name))
	return name
}

// ids returns the ids of committed snapshots that are there by directory.
func directories(t *testing.T, s *Snapshotter) (ids []string) {
	t.Helper()
	files, err := os.ReadDir(s.path(dirSnapshots))
	must(t, err)
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), goingPrefix) {
			ids = append(ids, f.Name())
		}
	}
	return ids
}

// stepBelow is the directory of the step that an active snapshot lies over.
func stepBelow(t *testing.T, s *Snapshotter, ctx context.Context, key string) (dir string) {
	t.Helper()
	must(t, s.db.view(ctx, func(ctx context.Context) error {
		_, info, _, err := getInfo(ctx, key)
		dir = s.upper(overOf(info)[0])
		return err
	}))
	return dir
}

// Steps lie over each other's directories, and show the same before they are ingested and after.
func TestStepsLieOverDirectories(t *testing.T) {
	needRoot(t)
	s, ctx := open(t, t.TempDir()), ns(t, "steps")
	if s.kernel.Metacopy {
		t.Skip("with metacopy, steps are ingested at once")
	}
	parent := stepBase(t, s, ctx)
	base := s.Stats().Builds
	for i, change := range []func(string) error{
		file("etc/base", "changed"),
		func(root string) error { return os.Remove(filepath.Join(root, "etc/gone")) },
		func(root string) error { return os.MkdirAll(filepath.Join(root, "opt/a/b"), 0o750) },
		file("opt/a/file", "file"),
		func(root string) error { return os.RemoveAll(filepath.Join(root, "opt/a")) },
		func(root string) error { return os.Mkdir(filepath.Join(root, "opt/a"), 0o700) }, // opaque
		func(root string) error {
			return os.Link(filepath.Join(root, "etc/base"), filepath.Join(root, "opt/a/hard"))
		},
		func(root string) error { return unix.Setxattr(root, "user.top", []byte("x"), 0) },
		func(root string) error { return os.Chmod(root, 0o711) },
	} {
		parent = addStep(t, s, ctx, parent, fmt.Sprint("step ", i), change)
	}
	if built := s.Stats().Builds - base; built > 1 {
		t.Errorf("%d chain images for what lies over directories", built)
	}
	want := map[string]string{"etc/base": "changed", "opt/a/hard": "changed"}
	if got := files(t, s, ctx, parent); !maps.Equal(got, want) {
		t.Errorf("over directories: %v", got)
	}
	mounts, err := s.Prepare(ctx, "root", parent)
	must(t, err)
	value := make([]byte, 1)
	if _, err := unix.Getxattr(upperIn(t, s, mounts), "user.top", value); err != nil || value[0] != 'x' {
		t.Errorf("attribute of the root: %q, %v", value, err)
	}
	if fi, err := os.Stat(upperIn(t, s, mounts)); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("mode of the root: %v, %v", fi.Mode(), err)
	}
	must(t, s.Remove(ctx, "root"))
	_, err = s.Check(ctx, CheckOptions{}) // ingests them all
	must(t, err)
	eventually(t, "the directories of ingested steps go", func() bool { return len(directories(t, s)) == 0 })
	if got := files(t, s, ctx, parent); !maps.Equal(got, want) {
		t.Errorf("ingested: %v", got)
	}
}

// A step is ingested when nothing has lain on it in a while, with those below it.
func TestIdleStepsAreIngested(t *testing.T) {
	needRoot(t)
	s, ctx := open(t, t.TempDir()), ns(t, "steps")
	s.stepIdle = 20 * time.Millisecond
	parent := stepBase(t, s, ctx)
	for i := range 3 {
		parent = addStep(t, s, ctx, parent, fmt.Sprint("step ", i), file(fmt.Sprint("new-", i), "x"))
	}
	eventually(t, "idle steps are ingested", func() bool { return len(directories(t, s)) == 0 })
	_, err := s.Prepare(ctx, "container", addStep(t, s, ctx, parent, "used", file("used", "x")))
	must(t, err)
	time.Sleep(10 * s.stepIdle)
	if n := len(directories(t, s)); n != 2 && !s.kernel.Metacopy {
		t.Errorf("%d directories: a step is ingested while a container lies on it", n)
	}
	must(t, s.Remove(ctx, "container"))
	eventually(t, "a step is ingested once the container is gone", func() bool { return len(directories(t, s)) == 0 })
}

// The directory of a step that was ingested stays for those who lie over it, over a restart, too.
func TestStepStaysForItsUsers(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, ctx := open(t, root), ns(t, "steps")
	if s.kernel.Metacopy {
		t.Skip("with metacopy, steps are ingested at once")
	}
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	mounts, err := s.Prepare(ctx, "container", name)
	must(t, err)
	directory, err := s.Usage(ctx, name)
	must(t, err)
	view, err := s.View(ctx, "view", name)
	must(t, err)
	looks := func() {
		t.Helper()
		for _, m := range [][]mount.Mount{mounts, view} {
			dir := t.TempDir()
			must(t, mount.All(m, dir))
			for name, want := range map[string]string{"new": "new", "etc/base": "base"} {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", name, got, err)
				}
			}
			must(t, mount.UnmountAll(dir, 0))
		}
	}
	_, err = s.Check(ctx, CheckOptions{}) // ingests it
	must(t, err)
	looks()
	must(t, s.Close())
	s = open(t, root)
	looks()
	again, err := s.Mounts(ctx, "container")
	must(t, err)
	if fmt.Sprint(again) != fmt.Sprint(mounts) {
		t.Errorf("other mounts after a restart:\n%v\n%v", again, mounts)
	}
	if found, err := s.GC(ctx, GCOptions{}); err != nil || len(found) > 0 {
		t.Errorf("garbage: %v, %v", found, err)
	}
	next, err := s.Prepare(ctx, "next", name) // lies on its layer
	must(t, err)
	if dir := stepBelow(t, s, ctx, "container"); !strings.Contains(fmt.Sprint(mounts), dir) ||
		strings.Contains(fmt.Sprint(next), dir) {
		t.Errorf("a container lies over the step's layer, or a later one over its directory: %v\n%v", mounts, next)
	}
	must(t, s.Remove(ctx, "view"))
	if left, err := os.ReadDir(filepath.Join(s.opts.RunDir, dirViews)); err != nil || len(left) > 0 {
		t.Errorf("mount points of views: %v, %v", left, err)
	}
	if n := len(directories(t, s)); n != 3 {
		t.Errorf("%d directories, want those of two containers and of the step", n)
	}
	kept, err := s.Usage(ctx, name)
	must(t, err)
	must(t, s.Remove(ctx, "container"))
	eventually(t, "the step's directory goes with its last user", func() bool { return len(directories(t, s)) == 1 })
	alone, err := s.Usage(ctx, name)
	must(t, err)
	if got := kept.Size - alone.Size; got != directory.Size || kept.Inodes-alone.Inodes != directory.Inodes {
		t.Errorf("usage with its directory %v, without %v: the directory has %v", kept, alone, directory)
	}
}

// Views over steps whose snapshots are gone do not stay mounted.
func TestViewsOverStepsAreCleared(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, ctx := open(t, root), ns(t, "steps")
	if s.kernel.Metacopy {
		t.Skip("with metacopy, steps are ingested at once")
	}
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	mounts, err := s.View(ctx, "view", name)
	must(t, err)
	must(t, s.Close())
	lost := filepath.Join(filepath.Dir(mounts[0].Source), "12345")
	must(t, os.MkdirAll(lost, 0o700))
	must(t, unix.Mount("tmpfs", lost, "tmpfs", 0, ""))
	s = open(t, root)
	if _, err := os.Stat(lost); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a view that nobody has: %v", err)
	}
	if got := read(t, s, name, "new"); got != "new" {
		t.Errorf("new: %q", got)
	}
}

// Too many steps for one overlay are ingested.
func TestManySteps(t *testing.T) {
	needRoot(t)
	s, ctx := open(t, t.TempDir()), ns(t, "steps")
	parent := stepBase(t, s, ctx)
	for i := range maxSteps + 2 {
		parent = addStep(t, s, ctx, parent, fmt.Sprint("step ", i), file(fmt.Sprint("new-", i), "x"))
	}
	if n := len(directories(t, s)); n > maxSteps {
		t.Errorf("%d directories", n)
	}
	if got := len(files(t, s, ctx, parent)); got != 2+maxSteps+2 {
		t.Errorf("%d files", got)
	}
}

// A step whose directory is gone fails with a word, not with what lies below it.
func TestStepIsGone(t *testing.T) {
	needRoot(t)
	s, ctx := open(t, t.TempDir()), ns(t, "steps")
	name := addStep(t, s, ctx, stepBase(t, s, ctx), "step", file("new", "new"))
	for _, id := range directories(t, s) {
		must(t, os.RemoveAll(s.path(dirSnapshots, id)))
	}
	if mounts, err := s.Prepare(ctx, "container", name); err == nil && !s.kernel.Metacopy {
		t.Errorf("mounts: %v", mounts)
	}
}
