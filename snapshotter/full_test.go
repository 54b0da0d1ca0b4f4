package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A disk is filled to the last byte, or nearly so, again and again, while layers and directories come and go and the
// store is stopped and opened again. Whatever fails says what to free; whatever worked is there; removing always works;
// and nothing else is left.
func TestFullDiskAtRandom(t *testing.T) {
	needRoot(t)
	_, at := smallDisk(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	f := &fullDisk{t: t, at: at, root: filepath.Join(at, "root"), r: rand.New(rand.NewPCG(seed, 1)),
		have: map[string]string{}}
	t.Cleanup(func() {
		if err := stop(f.s); err != nil {
			t.Error(err)
		}
	})
	f.open(false)
	rounds := 20
	if os.Getenv("DEDUP_LONG") != "" {
		rounds = 300
	}
	for range rounds {
		f.fill()
		for range 3 {
			f.work()
		}
		if f.r.IntN(3) == 0 {
			f.remove(true)
		}
		if f.r.IntN(3) == 0 {
			f.open(true)
		}
		f.empty()
		if f.s == nil {
			f.open(false)
		}
		f.work()
		f.check()
		if t.Failed() {
			return
		}
		for len(f.have) > 8 {
			f.remove(false)
		}
	}
	t.Logf("%d operations worked and %d failed; the store was opened %d times with a full disk, and %d times it was not",
		f.worked, f.failed, f.opened, f.refused)
	if f.failed == 0 || f.worked == 0 {
		t.Error("the disk was always full, or never")
	}
}

// smallDisk mounts a file system of 32 MiB with 3000 inodes, that lies in a file, until the test ends.
func smallDisk(t *testing.T, options ...string) (file, at string) {
	t.Helper()
	dir := t.TempDir()
	file, at = filepath.Join(dir, "disk"), filepath.Join(dir, "at")
	for _, args := range [][]string{
		{"truncate", "-s", "32M", file}, slices.Concat([]string{"mkfs.ext4", "-q", "-N", "3000"}, options, []string{file}),
		{"mkdir", at}, {"mount", "-o", "loop", file, at},
	} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return file, at
}

// fullDisk is a store on a disk that is full now and then. have maps the names of committed snapshots to the content of
// the one file of each.
type fullDisk struct {
	t                               *testing.T
	at, root                        string
	r                               *rand.Rand
	s                               *Snapshotter
	have                            map[string]string
	n                               int
	worked, failed, opened, refused int
}

// expect counts an operation, and looks at why it failed.
func (f *fullDisk) expect(what string, err error) bool {
	if err == nil {
		f.worked++
		return true
	}
	f.failed++
	if !strings.Contains(err.Error(), "free space or inodes on the file system of ") {
		f.t.Errorf("%s: %v", what, err)
	}
	return false
}

// fill leaves little or nothing: of blocks, or of inodes.
func (f *fullDisk) fill() {
	if f.r.IntN(3) == 0 {
		leave := uint64(f.r.IntN(30))
		must(f.t, os.MkdirAll(filepath.Join(f.at, "fillers"), 0o700))
		var st unix.Statfs_t
		for i := 0; unix.Statfs(f.at, &st) == nil && st.Ffree > leave; i++ {
			if err := os.WriteFile(filepath.Join(f.at, "fillers", fmt.Sprint(i)), nil, 0o600); err != nil {
				f.t.Fatal(err)
			}
		}
		return
	}
	var st unix.Statfs_t
	must(f.t, unix.Statfs(f.at, &st))
	fill := int64(st.Bfree)*st.Bsize - int64(f.r.IntN(100))*4096*int64(f.r.IntN(3))
	out, err := os.Create(filepath.Join(f.at, "filler"))
	must(f.t, err)
	defer out.Close()
	buf := bytes.Repeat([]byte("x"), 4096)
	for ; fill > 0 && err == nil; fill -= int64(len(buf)) {
		_, err = out.Write(buf)
	}
	if err != nil && !errors.Is(err, unix.ENOSPC) {
		f.t.Fatal(err)
	}
	_ = out.Sync()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (f *fullDisk) empty() {
	must(f.t, errors.Join(os.RemoveAll(filepath.Join(f.at, "filler")), os.RemoveAll(filepath.Join(f.at, "fillers"))))
}

// open closes the store and opens it again.
func (f *fullDisk) open(full bool) {
	if f.s != nil {
		if err := stop(f.s); err != nil && !strings.Contains(err.Error(), "no space left") {
			f.t.Errorf("stop: %v", err)
		}
		f.s = nil
	}
	s, err := New(f.t.Context(), Options{Root: f.root, RunDir: filepath.Join(f.at, "../run")})
	switch {
	case err == nil:
		f.s = s
		if full {
			f.opened++
		}
	case full:
		f.refused++
		f.expect("open with a full disk", err)
	default:
		f.t.Fatalf("open: %v", err)
	}
}

// name is that of a snapshot there is, or "".
func (f *fullDisk) name() string {
	for name := range f.have {
		return name
	}
	return ""
}

func (f *fullDisk) noise() string {
	b := make([]byte, 1+f.r.IntN(300_000))
	for i := range b {
		b[i] = byte(f.r.Uint32())
	}
	return string(b)
}

// work brings a layer in from a blob or from a directory, or looks at one.
func (f *fullDisk) work() {
	if f.s == nil {
		return
	}
	f.n++
	ctx := ns(f.t, "full")
	switch f.r.IntN(3) {
	case 0:
		f.pull(ctx)
	case 1:
		f.build(ctx)
	case 2:
		if name := f.name(); name != "" {
			f.look(ctx, name)
		}
	}
}

func (f *fullDisk) pull(ctx context.Context) {
	data := f.noise()
	blob := layerTar(f.t, map[string]string{"file": data})
	target := digest.FromBytes(blob).String()
	key := fmt.Sprintf("full/%d/extract-%d %s", f.n, f.n, target)
	mounts, err := f.s.Prepare(ctx, key, "", snapshots.WithLabels(map[string]string{labelRef: target}))
	if !f.expect("prepare", err) {
		return
	}
	in, err := f.s.layers.IngestBlob(ctx, blobOfBytes(blob))
	if err == nil {
		upper, _ := f.s.upperOf(mounts)
		err = f.s.Applied(ctx, upper, in)
	}
	if err == nil {
		err = f.s.Commit(ctx, "full/"+target, key)
	}
	if f.expect("pull", err) {
		f.have["full/"+target] = data
		return
	}
	must(f.t, f.s.Remove(ctx, key))
}

func (f *fullDisk) build(ctx context.Context) {
	data, key, name := f.noise(), fmt.Sprint("build-", f.n), fmt.Sprint("built-", f.n)
	mounts, err := f.s.Prepare(ctx, key, "")
	if !f.expect("prepare", err) {
		return
	}
	upper, _ := f.s.upperOf(mounts)
	if os.WriteFile(filepath.Join(upper, "file"), []byte(data), 0o600) != nil ||
		!f.expect("commit", f.s.Commit(ctx, name, key)) {
		must(f.t, f.s.Remove(ctx, key))
		return
	}
	f.have[name] = data
}

func (f *fullDisk) look(ctx context.Context, name string) bool {
	f.n++
	key := fmt.Sprint("view-", f.n)
	mounts, err := f.s.View(ctx, key, name)
	if !f.expect("view", err) {
		return false
	}
	err = mount.WithTempMount(ctx, mounts, func(dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, "file"))
		if err == nil && string(b) != f.have[name] {
			f.t.Errorf("%s has other bytes", name)
		}
		return err
	})
	must(f.t, errors.Join(err, f.s.Remove(ctx, key)))
	return true
}

func (f *fullDisk) remove(full bool) {
	name := f.name()
	if name == "" || f.s == nil {
		return
	}
	if err := f.s.Remove(ns(f.t, "full"), name); err != nil {
		f.t.Errorf("remove, full=%v: %v", full, err)
	}
	delete(f.have, name)
}

// check compares the store with what is known to be there, with room again.
func (f *fullDisk) check() {
	ctx := ns(f.t, "full")
	for name := range f.have {
		if !f.look(ctx, name) {
			f.t.Errorf("%s is not served", name)
		}
	}
	must(f.t, f.s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, known := f.have[info.Name]; !known {
			f.t.Errorf("snapshot %q is left", info.Name)
		}
		return nil
	}))
	f.s.layers.Wait()
	if _, err := f.s.GC(ctx, GCOptions{}); err != nil {
		f.t.Error(err)
	}
	found, err := f.s.Check(ctx, CheckOptions{})
	if err != nil || len(found) > 0 {
		f.t.Errorf("%+v, %v", found, err)
	}
}
