package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// denseWorld is a store that goes from one kernel to another, and what clients know of it.
type denseWorld struct {
	t      *testing.T
	root   string
	cache  lower.PageCache
	verity lower.Verity
	step   func(string)
	s      *Snapshotter
	views  map[string][]string // what a view of a committed snapshot shows
	active map[string][]string // what a container shows
}

// needDense skips a test where the kernel mounts no dense packs.
func needDense(t *testing.T) lower.Features {
	t.Helper()
	f := kernelHere(t)
	if f.Dense != nil || testNoDense() != nil {
		t.Skipf("the kernel mounts no dense packs: %v", errors.Join(f.Dense, testNoDense()))
	}
	return f
}

// onDense runs a test for each way to share memory, with fs-verity where the file system has it.
func onDense(t *testing.T, test func(t *testing.T, w *denseWorld)) {
	f := needDense(t)
	for _, cache := range []lower.PageCache{lower.PageCacheShared, lower.PageCachePrivate} {
		for _, v := range []lower.Verity{lower.VerityOff, lower.VerityOn} {
			if cache == lower.PageCacheShared && f.DataOnly != nil || testPageCache() != "" && testPageCache() != cache ||
				v == lower.VerityOn && f.Verity != nil || testVerity() != "" && testVerity() != v {
				continue
			}
			t.Run(fmt.Sprintf("%s with verity %s", cache, v), func(t *testing.T) {
				test(t, newDenseWorld(t, cache, v))
			})
		}
	}
}

func newDenseWorld(t *testing.T, cache lower.PageCache, v lower.Verity) *denseWorld {
	t.Helper()
	w := &denseWorld{t: t, root: t.TempDir(), cache: cache, verity: v, views: map[string][]string{},
		active: map[string][]string{}}
	t.Cleanup(func() {
		if err := w.s.Close(); err != nil {
			t.Error(err)
		}
		unmountAll(t, w.root)
	})
	return w
}

// open opens the store under a newer kernel or an older one.
func (w *denseWorld) open(older bool) *Snapshotter {
	w.t.Helper()
	o := Options{Root: w.root, RunDir: filepath.Join(w.root, "run"), Verity: w.verity, PageCache: w.cache, Step: w.step}
	if older {
		o.noDense = errNoDense
	}
	var err error
	w.s, err = New(w.t.Context(), o)
	must(w.t, err)
	return w.s
}

// reboot is open after a restart of the machine: nothing is mounted. In between it is looked at without a daemon.
func (w *denseWorld) reboot(older bool) *Snapshotter {
	w.t.Helper()
	must(w.t, stop(w.s))
	unmountAll(w.t, w.root)
	if found := looked(w.t, w.root); len(found) > 0 {
		w.t.Errorf("without a daemon: %+v", found)
	}
	return w.open(older)
}

// denseTexts are files that many layers have some of: small ones, which take little in dense packs.
func denseTexts(from, to int) map[string]string {
	all := map[string]string{}
	for i := from; i < to; i++ {
		all[fmt.Sprint("lib/", i)] = strings.Repeat(fmt.Sprint("text ", i, "\n"), 80+17*(i%40))
	}
	return all
}

// fill pulls images that share payloads, one of them rebuilt, and builds one on them.
func (w *denseWorld) fill() (base string) {
	w.t.Helper()
	s, ctx := w.s, ns(w.t, "dense")
	pull := func(parent string, files ...map[string]string) string {
		all := map[string]string{}
		for _, f := range files {
			maps.Copy(all, f)
		}
		name, _ := unpack(w.t, s, "dense", parent, layerTar(w.t, all), nil)
		w.views[name] = nil
		return name
	}
	large := map[string]string{"large": noiseOf(7, 700_001), "etc/base": strings.Repeat("base", 400)}
	base = pull("", large, denseTexts(0, 60))
	app := pull(base, denseTexts(40, 90), map[string]string{"version": payload("1"), "app": noiseOf(8, 5000)})
	pull(base, denseTexts(41, 91), map[string]string{"version": payload("2"), "app": noiseOf(9, 5000)})
	pull("", denseTexts(20, 70), map[string]string{"tiny": "tiny"})
	name := app
	for i := range 2 { // with that there are no more packs than are left alone
		name = addStep(w.t, s, ctx, name, fmt.Sprint("step", i), func(root string) (err error) {
			for _, text := range stepChanges[i] {
				err = errors.Join(err, change(root, text))
			}
			return err
		})
	}
	_, err := s.resolve(ctx, name) // so that its steps are layers
	must(w.t, err)
	w.views[name] = nil
	for name := range w.views {
		w.views[name] = w.view(name)
		w.start("container of "+name, name)
	}
	return base
}

func (w *denseWorld) view(name string) (lines []string) {
	w.t.Helper()
	ctx := ns(w.t, "dense")
	mounts, err := w.s.View(ctx, "view of "+name, name)
	must(w.t, err)
	must(w.t, mount.WithReadonlyTempMount(ctx, mounts, func(root string) (err error) {
		lines, err = treeOf(root)
		return err
	}))
	must(w.t, w.s.Remove(ctx, "view of "+name))
	return lines
}

// start has a container change some files.
func (w *denseWorld) start(key, name string) {
	w.t.Helper()
	mounts, err := w.s.Prepare(ns(w.t, "dense"), key, name)
	must(w.t, err)
	write(w.t, mounts, func(root string) (err error) {
		at := func(name string) string { return filepath.Join(root, name) }
		return errors.Join(os.WriteFile(at("new"), []byte(key), 0o600), os.Chmod(at("lib/45"), 0o711),
			os.Remove(at("lib/46")), os.Rename(at("lib/47"), at("lib/moved")), os.Link(at("lib/48"), at("lib/hard")))
	})
	w.active[key] = w.shown(mounts)
}

func (w *denseWorld) shown(mounts []mount.Mount) (lines []string) {
	w.t.Helper()
	must(w.t, mount.WithTempMount(w.t.Context(), mounts, func(root string) (err error) {
		lines, err = treeOf(root)
		return err
	}))
	return lines
}

// check compares all with what clients know, and lets the store check itself.
func (w *denseWorld) check() {
	w.t.Helper()
	ctx := ns(w.t, "dense")
	for key, want := range w.active {
		mounts, err := w.s.Mounts(ctx, key)
		must(w.t, err)
		if diff := cmp.Diff(want, w.shown(mounts)); diff != "" {
			w.t.Errorf("%s (-was +is):\n%s", key, diff)
		}
	}
	for name, want := range w.views {
		if diff := cmp.Diff(want, w.view(name)); diff != "" {
			w.t.Errorf("%s (-was +is):\n%s", name, diff)
		}
	}
	checkClean(w.t, w.s)
	for {
		before := w.s.layers.Stats().Packs
		wrong := w.addsUp(ctx)
		if before != w.s.layers.Stats().Packs {
			continue // packs are copied in the background
		}
		if wrong != "" {
			w.t.Error(wrong)
		}
		return
	}
}

// addsUp tells what is wrong with what layers share, and with what snapshots are said to use, but for directories of
// containers and steps.
func (w *denseWorld) addsUp(ctx context.Context) (wrong string) {
	w.t.Helper()
	s := w.s
	must(w.t, s.Cleanup(ctx))
	s.wg.Wait()
	s.layers.Wait()
	var sum int64
	must(w.t, s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		u, err := s.Usage(ctx, info.Name)
		if info.Kind == snapshots.KindCommitted {
			sum += u.Size
		}
		return err
	}))
	for _, id := range directories(w.t, s) {
		if s.steps.kept(id) {
			u, err := fs.DiskUsage(ctx, s.upper(id))
			must(w.t, err)
			sum -= u.Size
		}
	}
	disk, err := layer.DiskUsage(ctx, s.path("packs"), s.path("layers"), s.path("chains"))
	must(w.t, err)
	if off := float64(sum)/float64(disk.Bytes) - 1; off < -0.01 || off > 0.01 {
		wrong = fmt.Sprintf("snapshots use %d bytes, the disk holds %d: %.1f %% off. ", sum, disk.Bytes, 100*off)
	}
	sharing, err := s.layers.Sharing(ctx)
	must(w.t, err)
	var live int64
	sharing.Each(func(_ []int, u layer.Usage) { live += u.Bytes })
	if st := s.layers.Stats().Packs; st.Live != live {
		wrong += fmt.Sprintf("layers have %d bytes, and packs %+v", live, st)
	}
	return wrong
}

// densities counts the dense packs and chain images, and the others.
func (w *denseWorld) densities() (packs, images map[bool]int) {
	w.t.Helper()
	packs, images = map[bool]int{}, map[bool]int{}
	each := func(pattern string, fn func(f *os.File, size int64) error) {
		for _, path := range mustGlob(w.t, filepath.Join(w.root, pattern)) {
			f, err := os.Open(path)
			if errors.Is(err, os.ErrNotExist) {
				continue // removed meanwhile
			}
			must(w.t, err)
			fi, err := f.Stat()
			must(w.t, err)
			must(w.t, errors.Join(fn(f, fi.Size()), f.Close()))
		}
	}
	each("packs/*", func(f *os.File, size int64) error {
		p, err := erofs.OpenPack(f, size)
		if err == nil {
			packs[p.Dense]++
		}
		return err
	})
	each("chains/*", func(f *os.File, size int64) error {
		c, err := erofs.ReadChain(f, size)
		images[c.Dense]++
		return err
	})
	return packs, images
}

// becomesCoarse waits until no pack is dense: that happens in the background.
func (w *denseWorld) becomesCoarse() {
	w.t.Helper()
	eventually(w.t, "no pack is dense", func() bool {
		packs, _ := w.densities()
		return packs[true] == 0
	})
}

// A store of dense packs goes to a kernel that does not mount these, and back. Everybody finds what was there, under
// each.
func TestDenseStoreUnderAnotherKernel(t *testing.T) {
	onDense(t, func(t *testing.T, w *denseWorld) {
		w.open(false)
		base := w.fill()
		w.check()
		packs, images := w.densities()
		if packs[false]+images[false] > 0 || packs[true] < 5 || images[true] < 4 {
			t.Errorf("under the newer kernel: packs %v, images %v", packs, images)
		}
		pull := func(which int) {
			name, _ := unpack(t, w.s, "dense", base, layerTar(t, denseTexts(40*which, 40*which+60)), nil)
			w.views[name] = w.view(name)
			w.start("container of "+name, name)
		}
		w.reboot(true)
		if _, images := w.densities(); images[true] > 0 {
			t.Errorf("under the older kernel: images %v", images)
		}
		w.check()
		pull(2)
		w.becomesCoarse()
		w.check()
		must(t, w.s.layers.Compact(t.Context())) // and no merge is due
		if _, images := w.densities(); images[true] > 0 || images[false] < 4 {
			t.Errorf("under the older kernel: images %v", images)
		}

		w.reboot(false)
		w.check()
		if packs, images := w.densities(); packs[true]+images[true] > 0 {
			t.Errorf("back under the newer kernel: packs %v, images %v", packs, images)
		}
		pull(4)
		w.check()
		if packs, images := w.densities(); packs[true] < 1 || images[true] < 1 || packs[false] < 1 {
			t.Errorf("back under the newer kernel, with one more image: packs %v, images %v", packs, images)
		}
		w.reboot(true)
		w.check()
		w.reboot(false)
		pull(6)
		w.check()
	})
}
