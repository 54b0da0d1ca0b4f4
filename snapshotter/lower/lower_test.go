package lower

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// lab is a store of layers with chain images over it.
type lab struct {
	*Chains
	t      *testing.T
	dir    string
	layers *layer.Store
	drops  sync.WaitGroup
	wants  layer.Options // what open is to open the layers with, beside its own
}

func needFeatures(t *testing.T) Features {
	t.Helper()
	needsMounts(t)
	f, err := Examine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if f.Erofs != nil || f.Upper != nil {
		t.Skipf("EROFS: %v, overlayfs: %v", f.Erofs, f.Upper)
	}
	return f
}

// kinds are the ways in which chain images can be mounted here.
func kinds(t *testing.T) map[string]Kernel {
	f := needFeatures(t)
	all := map[string]Kernel{}
	for _, loop := range []bool{false, true} {
		if f.Loop && !loop || loop && !exists("/dev/loop-control") {
			continue
		}
		name := map[bool]string{false: "", true: " looped"}[loop]
		for _, shared := range []bool{false, true} {
			if shared && f.DataOnly != nil {
				continue
			}
			name := map[bool]string{false: "private", true: "shared"}[shared] + name
			all[name] = kernel(f, shared, loop)
			if f.Dense == nil {
				k := all[name]
				k.NoDense = nil
				all[name+" dense"] = k
			}
		}
	}
	return all
}

func kernel(f Features, shared, loop bool) Kernel {
	return Kernel{
		Shared: shared, Metacopy: shared && f.Metacopy, Loop: loop, Defaults: f.Defaults,
		NoVerity: errors.New("not asked for"), NoDense: errors.New("not asked for"),
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func inAllKinds(t *testing.T, fn func(t *testing.T, l *lab)) {
	for name, k := range kinds(t) {
		t.Run(name, func(t *testing.T) { fn(t, newLab(t, k)) })
	}
}

func newLab(t *testing.T, k Kernel) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir()}
	t.Cleanup(func() {
		l.close()
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(l.dir))
		if err != nil || len(mounts) > 0 {
			t.Errorf("still mounted: %d, %v", len(mounts), err)
		}
		for _, m := range mounts {
			_ = mount.UnmountAll(m.Mountpoint, unix.MNT_DETACH)
		}
	})
	l.open(k)
	return l
}

func (l *lab) open(k Kernel) {
	l.t.Helper()
	var err error
	root := filepath.Join(l.dir, "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		l.t.Fatal(err)
	}
	moved := func(ids []content.PackID, damaged bool) {
		if l.Chains != nil {
			stale := l.Images.Moved(ids, damaged)
			l.drops.Go(func() {
				if err := l.DropStale(context.Background(), stale); err != nil {
					l.t.Error(err)
				}
			})
		}
	}
	o := l.wants
	o.Root, o.Verity, o.Dense, o.PacksMoved, o.KeepUnnamed = root, k.NoVerity == nil, k.NoDense == nil, moved, true
	l.layers, err = layer.Open(l.t.Context(), o, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	l.Chains, err = Open(l.t.Context(), Options{
		Images: filepath.Join(root, "chains"), Staging: filepath.Join(root, "ingest"), Mounts: filepath.Join(l.dir, "chains"),
		PackMounts: filepath.Join(l.dir, "p"), Layers: l.layers, Kernel: k,
		Background: func(fn func(context.Context)) bool { l.drops.Go(func() { fn(context.Background()) }); return true },
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// close gives up all chains.
func (l *lab) close() {
	l.t.Helper()
	l.drops.Wait()
	names, err := l.List()
	if err != nil {
		l.t.Fatal(err)
	}
	for _, n := range names {
		for _, id := range l.Users.of(n) {
			l.Users.Unuse(id)
		}
		if err := l.Release(l.t.Context(), n); err != nil {
			l.t.Error(err)
		}
	}
	l.drops.Wait()
	if err := l.layers.Close(); err != nil {
		l.t.Error(err)
	}
}

// ingest makes a layer of files.
func (l *lab) ingest(files map[string]string) content.LayerID {
	l.t.Helper()
	dir := l.t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			l.t.Fatal(err)
		}
	}
	in, err := l.layers.IngestDir(l.t.Context(), layer.Dir{Upper: dir})
	if err != nil {
		l.t.Fatal(err)
	}
	return in.Layer
}

func (l *lab) ensure(chain ...content.LayerID) Below {
	l.t.Helper()
	b, err := l.Ensure(l.t.Context(), chain, Plain)
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// stack is a container over what lies below.
func (l *lab) stack(b Below) Stack {
	l.t.Helper()
	s := Stack{Lower: []string{b.Chain}, Packs: b.Packs, Upper: l.t.TempDir(), Work: l.t.TempDir()}
	return s
}

func (l *lab) mounts(s Stack) []mount.Mount {
	l.t.Helper()
	options, err := l.opts.Kernel.Overlay(s)
	if err != nil {
		l.t.Fatal(err)
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

func text(name string) string { return name + strings.Repeat(" of some length", 100) }

// with mounts for the time of fn.
func with(t *testing.T, mounts []mount.Mount, readOnly bool, fn func(root string)) {
	t.Helper()
	do := mount.WithTempMount
	if readOnly {
		do = mount.WithReadonlyTempMount
	}
	if err := do(t.Context(), mounts, func(root string) error { fn(root); return nil }); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

func namesIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

// A container's overlay, a read-only mount of it, and whoever opens the directories that its options name, see the
// same.
func TestAllReadersSeeTheSame(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		base := l.ingest(map[string]string{
			"etc/passwd": text("old"), "keep": text("keep"), "gone": text("gone"), "dir/a": text("a"), "tiny": "tiny",
		})
		top := l.ingest(map[string]string{"other": text("other")})
		mounts := l.mounts(l.stack(l.ensure(base, top)))
		if len(mounts) != 1 {
			t.Fatal(mounts)
		}
		with(t, mounts, false, func(root string) {
			for name, want := range map[string]string{
				"etc/passwd": text("old"), "keep": text("keep"), "tiny": "tiny", "other": text("other"),
			} {
				if got := readFile(t, root, name); got != want {
					t.Errorf("%s: %.20q", name, got)
				}
			}
			for _, err := range []error{
				os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("new"), 0o644),
				os.Remove(filepath.Join(root, "gone")),
				os.RemoveAll(filepath.Join(root, "dir")), os.Mkdir(filepath.Join(root, "dir"), 0o755),
				os.Chmod(filepath.Join(root, "keep"), 0o600), os.WriteFile(filepath.Join(root, "dir/b"), nil, 0o644),
			} {
				if err != nil {
					t.Error(err)
				}
			}
		})
		look := func(root string) {
			t.Helper()
			if got := readFile(t, root, "etc/passwd"); got != "new" {
				t.Errorf("/etc/passwd: %.20q", got)
			}
			if got := readFile(t, root, "keep"); got != text("keep") {
				t.Errorf("keep: %.20q", got)
			}
			if got := namesIn(t, root); !slices.Equal(got, []string{"dir", "etc", "keep", "other", "tiny"}) {
				t.Errorf("root: %v", got)
			}
			if got := namesIn(t, filepath.Join(root, "dir")); !slices.Equal(got, []string{"b"}) {
				t.Errorf("dir: %v", got)
			}
		}
		with(t, mounts, false, look)
		with(t, mounts, true, look)
		// As CRI does for VOLUMEs.
		ro := slices.Clone(mounts)
		ro[0].Options = append(slices.Clone(ro[0].Options), "ro")
		with(t, ro, false, look)
		if k := l.opts.Kernel; !k.Shared || !k.Metacopy {
			with(t, asBuildKit(mounts, false), false, look)
			with(t, asBuildKit(mounts, true), false, look)
		}
		// As containerd's fsview and applier do: the last option that begins so.
		var listed []string
		for _, o := range mounts[0].Options {
			if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
				listed = strings.Split(dirs, ":")
			}
		}
		for _, dir := range listed {
			if _, err := os.ReadDir(dir); err != nil {
				t.Errorf("a directory that options name: %v", err)
			}
		}
		if got := readFile(t, listed[0], "etc/passwd"); got != text("old") {
			t.Errorf("the first directory that options name: %.20q", got)
		}
	})
}

// A view is one mount, too.
func TestViewOfPacks(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		b := l.ensure(l.ingest(map[string]string{"a": text("a"), "b/c": text("c")}))
		if len(b.Packs) == 0 {
			t.Skip("a bind mount is a view of a private image")
		}
		mounts := l.mounts(Stack{Lower: []string{b.Chain}, Packs: b.Packs})
		forms := [][]mount.Mount{mounts, asBuildKit(mounts, true)}
		if l.opts.Kernel.Metacopy {
			forms = forms[:1]
		}
		for i, readOnly := range []bool{false, true, true}[:len(forms)+1] {
			with(t, forms[i/2], readOnly, func(root string) {
				if got := readFile(t, root, "a") + readFile(t, root, "b/c"); got != text("a")+text("c") {
					t.Errorf("%d bytes", len(got))
				}
				if got := namesIn(t, root); !slices.Equal(got, []string{"a", "b"}) {
					t.Errorf("root: %v", got)
				}
				if err := os.WriteFile(filepath.Join(root, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
					t.Errorf("write: %v", err)
				}
			})
		}
	})
}

// Packs are mounted once, while a mounted image needs them, and stay on the disk as long as an image names them.
func TestPacksFollowImages(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		one, two := l.ingest(map[string]string{"a": text("a")}), l.ingest(map[string]string{"b": text("b")})
		ctx := t.Context()
		l.Users.Use(l.Name([]content.LayerID{one}, Plain), "1")
		l.Users.Use(l.Name([]content.LayerID{one, two}, Plain), "2")
		first, second := l.ensure(one), l.ensure(one, two)
		packs := 0
		if l.opts.Kernel.Shared {
			packs = 2
		}
		if len(second.Packs) != packs || l.PackMounts() != packs {
			t.Fatalf("%d and %d packs, want %d", len(second.Packs), l.PackMounts(), packs)
		}
		for _, path := range first.Packs {
			if !slices.Contains(second.Packs, path) {
				t.Errorf("%s is mounted twice", path)
			}
		}
		l.layers.Release(two)
		l.layers.Wait()
		if got := readFile(t, second.Chain, "b"); got != text("b") {
			t.Errorf("an image lost its pack: %.20q", got)
		}
		n, orphaned, _ := l.Users.Unuse("2")
		if !orphaned {
			t.Fatal("another uses it")
		}
		if err := l.Drop(ctx, n); err != nil {
			t.Fatal(err)
		}
		if got := l.PackMounts(); got != packs/2 {
			t.Errorf("%d packs are mounted", got)
		}
		files, _ := filepath.Glob(filepath.Join(l.dir, "root/packs/*"))
		if len(files) != 1 {
			t.Errorf("packs %v", files)
		}
		if got := readFile(t, first.Chain, "a"); got != text("a") {
			t.Errorf("%.20q", got)
		}
	})
}

// What is mounted stays so over a restart, and is known.
func TestReopenedWithMounts(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		k := l.opts.Kernel
		one := l.ingest(map[string]string{"a": text("a")})
		before := l.ensure(one)
		if err := l.layers.Close(); err != nil {
			t.Fatal(err)
		}
		l.open(k)
		builds := l.Stats().Builds
		after := l.ensure(one)
		if before.Chain != after.Chain || !slices.Equal(before.Packs, after.Packs) || l.Stats().Builds != builds {
			t.Errorf("%+v became %+v, %d built", before, after, l.Stats().Builds)
		}
		if got := l.PackMounts(); got != len(before.Packs) {
			t.Errorf("%d packs are mounted", got)
		}
		// As after a reboot, when the image is there and nothing is mounted.
		if err := l.Chains.mounts.unmount(l.Name([]content.LayerID{one}, Plain)); err != nil {
			t.Fatal(err)
		}
		with(t, l.mounts(l.stack(l.ensure(one))), false, func(root string) {
			if got := readFile(t, root, "a"); got != text("a") {
				t.Errorf("%.20q", got)
			}
		})
	})
}

// Merged packs go once nothing is mounted over them; a container that starts meanwhile sees the old ones.
func TestMergedBelowMounts(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		var chain []content.LayerID
		for i := range 9 {
			chain = append(chain, l.ingest(map[string]string{fmt.Sprint("f", i): text(fmt.Sprint(i))}))
		}
		n := l.Name(chain, Plain)
		l.Users.Use(n, "1")
		before := l.ensure(chain...)
		container := l.mounts(l.stack(before))
		if err := l.layers.Compact(t.Context()); err != nil {
			t.Fatal(err)
		}
		look := func(root string) {
			for i := range 9 {
				if got := readFile(t, root, fmt.Sprint("f", i)); got != text(fmt.Sprint(i)) {
					t.Errorf("f%d: %.20q", i, got)
				}
			}
		}
		with(t, container, false, look)
		if now := l.ensure(chain...); !slices.Equal(now.Packs, before.Packs) {
			t.Errorf("packs changed below a container that is about to start: %v", now.Packs)
		}
		if problem, err := l.Compare(t.Context(), n, chain); problem != "" || err != nil {
			t.Errorf("%s, %v", problem, err)
		}
		l.Users.Unuse("1")
		if err := l.Release(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		packs, _ := filepath.Glob(filepath.Join(l.dir, "root/packs/*"))
		if len(packs) >= 9 || l.Images.Has(n) {
			t.Errorf("%d packs, the old image is there: %v", len(packs), l.Images.Has(n))
		}
		after := l.ensure(chain...)
		with(t, l.mounts(l.stack(after)), false, look)
		if l.opts.Kernel.Shared && len(after.Packs) >= 9 {
			t.Errorf("%d packs", len(after.Packs))
		}
	})
}

// A pack that is not what an image was built for is never mounted: what is whole in it is served from another one,
// and what is not takes its layers out of service.
func TestOtherPacksAreRefused(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(whole []byte) []byte
		served bool
	}{
		{"cut behind its payloads", func(b []byte) []byte { return b[:len(b)-content.BlockSize] }, true},
		{"another trailer", func(b []byte) []byte { b[len(b)-1]++; return b }, true},
		{"cut to its first block", func(b []byte) []byte { return b[:content.BlockSize] }, false},
		{"zeros", func(b []byte) []byte { clear(b); return b }, false},
		{"empty", func([]byte) []byte { return nil }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			inAllKinds(t, func(t *testing.T, l *lab) {
				one := l.ingest(map[string]string{"a": text("a"), "b": text("b")})
				n := l.Name([]content.LayerID{one}, Plain)
				if err := l.Build(t.Context(), []content.LayerID{one}, Plain); err != nil {
					t.Fatal(err)
				}
				path := l.Chains.mounts.packs.path(l.Images.known(n).devices[0].Pack)
				b, err := os.ReadFile(path)
				if err == nil {
					err = errors.Join(os.Remove(path), os.WriteFile(path, row.change(b), 0o600))
				}
				if err != nil {
					t.Fatal(err)
				}
				below, err := l.Ensure(t.Context(), []content.LayerID{one}, Plain)
				if row.served {
					if err != nil || readFile(t, below.Chain, "a") != text("a") {
						t.Errorf("%+v, %v", below, err)
					}
					return
				}
				if !errors.Is(err, layer.ErrDamaged) || l.PackMounts() != 0 || l.IsMounted(n) {
					t.Errorf("mounted: %+v, %v", below, err)
				}
				l.ingest(map[string]string{"b": text("b"), "other/a": text("a")}) // the same payloads
				if got := readFile(t, l.ensure(one).Chain, "b"); got != text("b") {
					t.Errorf("healed: %.20q", got)
				}
			})
		})
	}
}

// A damaged chain image is found, wherever it is damaged.
func TestCompareFindsDamage(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		chain := []content.LayerID{l.ingest(map[string]string{"a": text("a"), "b": text("b"), "tiny": "tiny"})}
		if err := l.Build(t.Context(), chain, Plain); err != nil {
			t.Fatal(err)
		}
		n := l.Name(chain, Plain)
		whole, err := os.ReadFile(l.Images.Path(n))
		if err != nil {
			t.Fatal(err)
		}
		rng := sha256.Sum256(whole)
		for at := 1024 + int(rng[0])%64; at < len(whole); at += 256 {
			b := bytes.Clone(whole)
			b[at] ^= 1
			if err := os.WriteFile(l.Images.Path(n), b, 0o600); err != nil {
				t.Fatal(err)
			}
			if problem, err := l.Compare(t.Context(), n, chain); problem == "" || err != nil {
				t.Errorf("byte %d of %d: %q, %v", at, len(whole), problem, err)
			}
		}
		if err := os.WriteFile(l.Images.Path(n), whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if problem, err := l.Compare(t.Context(), n, chain); problem != "" || err != nil {
			t.Errorf("whole: %q, %v", problem, err)
		}
		if err := os.Remove(l.Chains.mounts.packs.path(l.Images.known(n).devices[0].Pack)); err != nil {
			t.Fatal(err)
		}
		if problem, err := l.Compare(t.Context(), n, chain); problem == "" || err != nil {
			t.Errorf("without its pack: %q, %v", problem, err)
		}
	})
}

// An image with a file named like one of its packs shares no memory, and shows all of its files.
func TestFileNamedLikeAPack(t *testing.T) {
	f := needFeatures(t)
	if f.DataOnly != nil {
		t.Skip(f.DataOnly)
	}
	l := newLab(t, kernel(f, true, f.Loop))
	one := l.ingest(map[string]string{"a": text("a")})
	b := l.ensure(one)
	name := filepath.Base(b.Packs[0])
	two := l.ingest(map[string]string{name + "/000000": text("mine")})
	for readOnly := range 2 {
		with(t, l.mounts(l.stack(l.ensure(one, two))), readOnly == 1, func(root string) {
			if got := readFile(t, root, name, "000000"); got != text("mine") {
				t.Errorf("%.20q", got)
			}
		})
	}
}

// With more packs than options have room for, an image shares no memory, and is served.
func TestMorePacksThanOptionsHold(t *testing.T) {
	f := needFeatures(t)
	if f.DataOnly != nil {
		t.Skip(f.DataOnly)
	}
	l := newLab(t, kernel(f, true, f.Loop))
	var chain []content.LayerID
	for i := range 70 {
		chain = append(chain, l.ingest(map[string]string{fmt.Sprint("f", i): text(fmt.Sprint(i))}))
	}
	b := l.ensure(chain...)
	if len(b.Packs) > 0 {
		t.Errorf("%d packs in options", len(b.Packs))
	}
	if got := readFile(t, b.Chain, "f69"); got != text("69") {
		t.Errorf("%.20q", got)
	}
}
