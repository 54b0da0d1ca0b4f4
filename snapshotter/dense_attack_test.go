package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
)

// Containers run on, and many start at the same time, while layers come in and all packs below them are rewritten. Each
// payload is copied once, but for what merges of the many copies take.
func TestContainersWhileDensePacksAreCopied(t *testing.T) {
	onDense(t, func(t *testing.T, w *denseWorld) {
		w.open(false)
		base := w.fill()
		type container struct{ key, at string }
		var runs []container
		for key := range w.active {
			mounts, err := w.s.Mounts(t.Context(), key)
			must(t, err)
			runs = append(runs, container{key, t.TempDir()})
			at := runs[len(runs)-1].at
			must(t, mount.All(mounts, at))
			t.Cleanup(func() { must(t, mount.UnmountAll(at, unix.MNT_DETACH)) })
		}
		must(t, w.s.Close()) // and no reboot: they go on
		s := w.open(true)
		ctx := ns(t, "dense")
		var work, looks sync.WaitGroup
		done := make(chan struct{})
		for _, c := range runs {
			looks.Go(func() {
				for ended := false; !ended; {
					select {
					case <-done:
						ended = true
					default:
					}
					got, err := treeOf(c.at)
					if diff := cmp.Diff(w.active[c.key], got); err != nil || diff != "" {
						t.Errorf("%s, which runs: %v %s", c.key, err, diff)
					}
				}
			})
		}
		for name, want := range w.views {
			for i := range 3 {
				key := fmt.Sprint(name, " of its own ", i)
				work.Go(func() {
					mounts, err := s.Prepare(ctx, key, name)
					var got []string
					if err == nil {
						err = mount.WithTempMount(ctx, mounts, func(root string) (err error) {
							got, err = treeOf(root)
							return err
						})
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("%s: %s", key, diff)
					}
					if err := errors.Join(err, s.Remove(ctx, key)); err != nil {
						t.Errorf("%s: %v", key, err)
					}
				})
			}
		}
		work.Go(func() {
			if err := s.layers.Compact(t.Context()); err != nil {
				t.Error(err)
			}
		})
		name, _ := unpack(t, s, "dense", base, layerTar(t, denseTexts(100, 140)), nil)
		w.views[name] = w.view(name)
		work.Wait()
		w.becomesCoarse()
		close(done)
		looks.Wait()
		w.check()
		for _, c := range runs {
			must(t, mount.UnmountAll(c.at, unix.MNT_DETACH))
		}
		w.check()
	})
}

// A daemon that stops while one container waits for a copy and another for its turn finishes the pack that it is at,
// begins no other, and tells both clients. The next start goes on.
func TestStopWhileDensePacksAreCopied(t *testing.T) {
	needDense(t)
	w := newDenseWorld(t, testPageCache(), testVerity())
	w.open(false)
	w.fill()
	var copies atomic.Int64
	copied, goOn := make(chan struct{}), make(chan struct{})
	w.step = func(name string) {
		if name == "merge.copied" && copies.Add(1) == 1 {
			close(copied)
			<-goOn
		}
	}
	s := w.reboot(true)
	ctx := ns(t, "dense")
	answers := make(chan error, len(w.views)+len(w.active))
	for name := range w.views {
		go func() {
			_, err := s.Prepare(ctx, "waits for "+name, name)
			answers <- err
		}()
	}
	for key := range w.active {
		go func() {
			_, err := s.Mounts(ctx, key)
			answers <- err
		}()
	}
	<-copied
	eventually(t, "all wait", func() bool { return s.Builds().Running == len(w.views) })
	stopped := make(chan error, 1)
	go func() { stopped <- s.Close() }()
	eventually(t, "who waits for a turn has gone", func() bool { return s.Builds().Running <= 1 })
	close(goOn)
	must(t, <-stopped)
	for range cap(answers) {
		if err := <-answers; !errdefs.IsUnavailable(err) && !errors.Is(err, context.Canceled) {
			t.Errorf("who waits is told: %v", err)
		}
	}
	if n := copies.Load(); n != 1 {
		t.Errorf("%d packs were copied", n)
	}
	if left := mustGlob(t, filepath.Join(w.root, "ingest/*")); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	w.step = nil
	s = w.open(true)
	for name := range w.views {
		if err := s.Remove(ctx, "waits for "+name); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	w.check()
	w.becomesCoarse()
	w.check()
}

// On a full disk a container over dense packs does not start: the client learns why and what to do, and nothing is
// left. It starts once there is room, be it that of images that no container uses.
func TestDenseStoreOnFullDisk(t *testing.T) {
	needDense(t)
	for name, row := range map[string]struct {
		lacks int64 // of what the copy takes
		fits  bool
	}{"images that nobody uses make room": {100 << 10, true}, "they do not": {2 << 20, false}} {
		t.Run(name, func(t *testing.T) {
			_, at := smallDisk(t, "-b", "4096")
			w := newDenseWorld(t, testPageCache(), testVerity())
			w.root = filepath.Join(at, "root")
			ctx := ns(t, "dense")
			s := w.open(false)
			files, other := map[string]string{}, map[string]string{}
			for i := range 2500 {
				files[fmt.Sprint("f", i)] = noiseOf(uint64(i), 700) // a block of 4 KiB each instead of 1 KiB
				other[fmt.Sprint(strings.Repeat("long", 20), i)] = fmt.Sprint(i)
			}
			name, _ := unpack(t, s, "dense", "", layerTar(t, files), nil)
			w.views[name] = w.view(name)
			mounts, err := s.Prepare(ctx, "container", name)
			must(t, err)
			write(t, mounts, file("new", "new"))
			w.active["container"] = w.shown(mounts)
			must(t, stop(s))
			s = w.open(true)
			unused, _ := unpack(t, s, "dense", "", layerTar(t, other), nil)
			w.views[unused] = w.view(unused)
			fillDisk(t, filepath.Join(at, "filler"), int64(len(files))*4096-row.lacks)
			if row.fits {
				w.check()
			} else {
				w.tellsOfFullDisk(name)
				checkClean(t, s)
			}
			must(t, os.Remove(filepath.Join(at, "filler")))
			w.check()
			w.becomesCoarse()
			w.check()
		})
	}
}

// tellsOfFullDisk has clients try what cannot be done.
func (w *denseWorld) tellsOfFullDisk(name string) {
	w.t.Helper()
	s, ctx := w.s, ns(w.t, "dense")
	for try := range 3 {
		_, prepared := s.Prepare(ctx, "new", name)
		_, viewed := s.View(ctx, "new view", name)
		_, mounted := s.Mounts(ctx, "container")
		for _, err := range []error{prepared, viewed, mounted} {
			if !errors.Is(err, unix.ENOSPC) || !errors.Is(err, object.ErrTooDense) ||
				!strings.Contains(err.Error(), "the kernel does not mount packs with blocks of 512 bytes") ||
				!strings.Contains(err.Error(), "free space or inodes on the file system of "+w.root) {
				w.t.Errorf("try %d: %v", try, err)
			}
		}
		if try == 0 {
			w.t.Log(prepared)
		}
		for _, key := range []string{"new", "new view"} {
			if _, err := s.Stat(ctx, key); !errdefs.IsNotFound(err) {
				w.t.Errorf("%s is left: %v", key, err)
			}
		}
		if left := mustGlob(w.t, filepath.Join(w.root, "ingest/*")); len(left) > 0 {
			w.t.Errorf("left: %q", left)
		}
	}
	if images := mustGlob(w.t, filepath.Join(w.root, "chains/*")); len(images) > 0 {
		w.t.Errorf("images that no container uses stay: %q", images)
	}
}

// fillDisk takes all but so many bytes of a disk.
func fillDisk(t *testing.T, path string, leave int64) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	unix.Sync() // what is not yet on the disk has no blocks yet
	var st unix.Statfs_t
	must(t, unix.Statfs(path, &st))
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave))
}
