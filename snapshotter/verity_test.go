package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// verityRoot returns a root whose file system and kernel have what lower.VerityOn needs.
func verityRoot(t *testing.T) string {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	f, err := lower.Examine(root)
	if err != nil {
		t.Fatal(err)
	}
	if f.Verity != nil {
		t.Skipf("needs fs-verity (ext4 with the feature verity): %v", f.Verity)
	}
	t.Cleanup(func() {
		if left := mountsBelow(t, root); len(left) > 0 {
			t.Errorf("still mounted: %v", left)
		}
	})
	return root
}

// openVerity opens a store until the test ends or stops it.
func openVerity(t *testing.T, root string, v lower.Verity) *Snapshotter {
	t.Helper()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact, Verity: v,
		PageCache: testPageCache(), noDense: testNoDense()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t *testing.T, s *Snapshotter) {
	t.Helper()
	if err := stop(s); err != nil {
		t.Error(err)
	}
}

// tryRead is read for a file that may not open.
func tryRead(t *testing.T, s *Snapshotter, parent, file string) (data string, err error) {
	t.Helper()
	const key = "try-read"
	mounts, err := s.View(t.Context(), key, parent)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.Remove(t.Context(), key)) }()
	err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
		b, err := os.ReadFile(filepath.Join(root, file))
		data = string(b)
		return err
	})
	return data, err
}

// hashed counts the packs with and without fs-verity.
func hashed(t *testing.T, s *Snapshotter) (with, without int) {
	t.Helper()
	err := filepath.WalkDir(s.path("packs"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		defer f.Close()
		switch _, err := verity.Measure(int(f.Fd())); {
		case err == nil:
			with++
		case errors.Is(err, verity.ErrNone):
			without++
		default:
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return with, without
}

// waitHashed waits until all packs have fs-verity but for those that the images of containers hold. Others go in the
// background.
func waitHashed(t *testing.T, s *Snapshotter, held int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, without := hashed(t, s)
		if without <= held {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%d packs have no fs-verity, want at most %d", without, held)
			return
		}
	}
}

// placeOf tells where a payload lies; nowhere if no pack has it.
func placeOf(ctx context.Context, s *Snapshotter, text string) (place content.Place) {
	id := content.ObjectID{Sum: sha256.Sum256([]byte(text))}
	if placed, err := s.layers.Places(ctx, []content.ObjectID{id}); err == nil {
		place, _ = placed.Place(id)
		_ = placed.Release()
	}
	return place
}

// waitVerityState waits until what the store says of fs-verity is what its packs have.
func waitVerityState(t *testing.T, s *Snapshotter) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, without := hashed(t, s)
		want := "on"
		if without > 0 {
			want = fmt.Sprintf("on; packs from before that are without: %d ", without)
		}
		got := s.VerityState()
		if got == want || without > 0 && strings.HasPrefix(got, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%d packs are without fs-verity, and it says %q", without, got)
			return
		}
	}
}

// packOf returns the pack that holds a payload.
func packOf(t *testing.T, s *Snapshotter, text string) string {
	t.Helper()
	return s.layers.Packs().Path(placeOf(t.Context(), s, text).Pack)
}

// swap puts another file in the place of an object.
func swap(t *testing.T, path, text string, hash bool) {
	t.Helper()
	other := path + ".other"
	if err := os.WriteFile(other, []byte(text), 0o400); err != nil {
		t.Fatal(err)
	}
	if hash {
		if err := verity.EnablePath(other); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
}

// A chain image is mounted over no other pack than the one that it was built for, and what is damaged heals.
func TestVerityRefusesOtherPacks(t *testing.T) {
	s := openVerity(t, verityRoot(t), lower.VerityOn)
	right, wrong := strings.Repeat("right", 5000), strings.Repeat("wrong", 5000)
	files := map[string]string{"file": right, "other": strings.Repeat("other", 1000), "tiny": "tiny"}
	blob := layerTar(t, files)
	name, _ := unpack(t, s, "one", "", blob, nil)
	for file, want := range map[string]string{"file": right, "tiny": "tiny"} {
		if got := read(t, s, name, file); got != want {
			t.Fatalf("%s: %d bytes", file, len(got))
		}
	}
	if with, without := hashed(t, s); with != 1 || without != 0 {
		t.Errorf("%d packs with fs-verity, %d without", with, without)
	}
	if err := os.WriteFile(packOf(t, s, right), []byte(wrong), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("written in place: %v", err)
	}
	for i, hash := range []bool{false, true} {
		pack := packOf(t, s, right)
		whole, err := os.ReadFile(pack)
		if err != nil {
			t.Fatal(err)
		}
		// The trailer says nothing of payloads: without fs-verity this would be mounted.
		swap(t, pack, strings.Replace(string(whole), right, wrong, 1), hash)
		if got, err := tryRead(t, s, name, "file"); !errors.Is(err, layer.ErrDamaged) || got != "" {
			t.Errorf("swapped, fs-verity %v: %d bytes, %v", hash, len(got), err)
		}
		if _, err := tryRead(t, s, name, "other"); !errors.Is(err, layer.ErrDamaged) {
			t.Errorf("a damaged layer is served: %v", err)
		}
		unpack(t, s, fmt.Sprint("again", i), "", blob, nil)
		if got := read(t, s, name, "file"); got != right {
			t.Errorf("healed: %d bytes", len(got))
		}
		if _, without := hashed(t, s); without != 0 {
			t.Errorf("healed: %d packs without fs-verity", without)
		}
	}
	checkClean(t, s)
}

// diskEnv names the block device below TMPDIR, in a machine whose disk may be written to below its file system.
const diskEnv = "DEDUP_TEST_DISK"

// A bit that flips on the disk is an I/O error for whoever reads it, and fsck finds it.
func TestVerityRefusesFlippedBits(t *testing.T) {
	disk := os.Getenv(diskEnv)
	if disk == "" {
		t.Skip("writes to the disk below the file system: runs in integration/vm alone")
	}
	s := openVerity(t, verityRoot(t), lower.VerityOn)
	text := strings.Repeat("text", 5000)
	blob := layerTar(t, map[string]string{"file": text})
	name, _ := unpack(t, s, "one", "", blob, nil)
	if got := read(t, s, name, "file"); got != text {
		t.Fatalf("%d bytes", len(got))
	}
	flip(t, disk, packOf(t, s, text), content.BlockSize+2048)
	if got, err := tryRead(t, s, name, "file"); !errors.Is(err, unix.EIO) || strings.Contains(got, "tezt") {
		t.Errorf("payload: %d bytes, %v", len(got), err)
	}
	image := s.chains.Images.Path(onlyChain(t, s))
	for path, at := range map[string]int64{packOf(t, s, text): content.BlockSize + 2048, image: 2048} {
		flip(t, disk, path, at)
		found, err := s.Check(t.Context(), CheckOptions{Repair: true})
		if err != nil || !slices.ContainsFunc(found, func(f Finding) bool { return f.Path == path && f.Damaged() }) {
			t.Errorf("%s: found %v, %v", path, found, err)
		}
		unpack(t, s, "heals", "", blob, nil)
		if got := read(t, s, name, "file"); got != text {
			t.Errorf("%s: healed: %d bytes", path, len(got))
		}
		checkClean(t, s)
	}
	flip(t, disk, image, 2048)
	if got := read(t, s, name, "file"); got != text {
		t.Errorf("an image that cannot be mounted: %d bytes", len(got))
	}
}

func onlyChain(t *testing.T, s *Snapshotter) lower.Name {
	t.Helper()
	names, err := s.chains.List()
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	return names[0]
}

// flip changes four bytes of a file on the disk, and makes the kernel forget what it has read.
func flip(t *testing.T, disk, path string, at int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// struct fiemap with room for one extent (linux/fiemap.h).
	var arg struct {
		start, length           uint64
		flags, mapped, count, _ uint32
		logical, physical, size uint64
		_                       [2]uint64
		extentFlags             uint32
		_                       [3]uint32
	}
	const fsIocFiemap = 0xc020660b
	arg.start, arg.length, arg.flags, arg.count = uint64(at), 1, 1, 1 // FIEMAP_FLAG_SYNC
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&arg))); errno != 0 ||
		arg.mapped != 1 {
		t.Fatal("where the file lies:", errno, arg.mapped)
	}
	d, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.WriteAt([]byte("tezt"), int64(arg.physical)+at-int64(arg.logical))
	if err = errors.Join(err, d.Sync(), d.Close()); err == nil {
		err = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The setting may change while a store lives.
func TestVerityOnAndOff(t *testing.T) {
	root := verityRoot(t)
	texts := []string{strings.Repeat("first", 1000), strings.Repeat("second", 1000), strings.Repeat("third", 1000)}
	var names []string
	for i, v := range []lower.Verity{lower.VerityOff, lower.VerityOn, lower.VerityOff, lower.VerityAuto} {
		s := openVerity(t, root, v)
		on := v != lower.VerityOff
		if on != strings.HasPrefix(s.VerityState(), "on") {
			t.Errorf("%s: %v", v, s.VerityState())
		}
		if i < len(texts) {
			name, _ := unpack(t, s, "default", "", layerTar(t, map[string]string{"file": texts[i]}), nil)
			names = append(names, name)
		}
		for j, name := range names {
			if got := read(t, s, name, "file"); got != texts[j] {
				t.Errorf("%s: layer %d: %d bytes", v, j, len(got))
			}
		}
		if c, err := s.Chains(t.Context(), false); err != nil || c.Images != len(names) {
			t.Errorf("%s: %d chain images for %d layers, %v", v, c.Images, len(names), err)
		}
		if err := s.layers.Compact(t.Context()); err != nil { // images over the old packs go, if they are not mounted
			t.Error(err)
		}
		if on {
			// The container's image is mounted for as long as it lives, and holds the pack that it was built over.
			waitHashed(t, s, 1)
			waitVerityState(t, s)
		}
		writeInContainer(t, s, v, i == 0, names[0], "file")
		checkClean(t, s)
		if i == len(texts) {
			if err := s.Remove(t.Context(), "container"); err != nil {
				t.Error(err)
			}
			waitHashed(t, s, 0)
			waitVerityState(t, s)
		}
		closeStore(t, s)
	}
}

// writeInContainer changes the metadata of a file of the image in a container that lives on through all settings.
// Where metacopy is on, its upper directory then holds a file without bytes.
func writeInContainer(t *testing.T, s *Snapshotter, v lower.Verity, fresh bool, parent, file string) {
	t.Helper()
	var mounts []mount.Mount
	var err error
	if fresh {
		mounts, err = s.Prepare(t.Context(), "container", parent)
	} else {
		mounts, err = s.Mounts(t.Context(), "container")
	}
	if err != nil {
		t.Fatalf("%s: %v", v, err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
		path := filepath.Join(root, file)
		if b, err := os.ReadFile(path); err != nil || string(b) != strings.Repeat("first", 1000) {
			t.Errorf("%s: in the container: %d bytes, %v", v, len(b), err)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Errorf("%s: in the container: %v", v, err)
	}
}

// Damage from a time without fs-verity is not sealed: a payload is compared with its name before it is copied into a
// pack that has it.
func TestVerityDoesNotSealDamage(t *testing.T) {
	root := verityRoot(t)
	s := openVerity(t, root, lower.VerityOff)
	right := strings.Repeat("right", 5000)
	blob := layerTar(t, map[string]string{"file": right})
	name, _ := unpack(t, s, "one", "", blob, nil)
	pack := packOf(t, s, right)
	whole, err := os.ReadFile(pack)
	if err != nil {
		t.Fatal(err)
	}
	swap(t, pack, strings.Replace(string(whole), right, strings.Repeat("wrong", 5000), 1), false)
	closeStore(t, s)

	s = openVerity(t, root, lower.VerityOn)
	if err := s.layers.Compact(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := s.Check(t.Context(), CheckOptions{}); err != nil {
		t.Error(err)
	}
	if got, err := tryRead(t, s, name, "file"); !errors.Is(err, layer.ErrDamaged) || got != "" {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	unpack(t, s, "two", "", blob, nil)
	if got := read(t, s, name, "file"); got != right {
		t.Errorf("healed: %d bytes", len(got))
	}
	checkClean(t, s)
}

// A backup brings the bytes back, and no fs-verity.
func TestVerityAfterRestore(t *testing.T) {
	root := verityRoot(t)
	s := openVerity(t, root, lower.VerityOn)
	text := strings.Repeat("text", 5000)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"file": text}), nil)
	if got := read(t, s, name, "file"); got != text {
		t.Fatalf("%d bytes", len(got))
	}
	closeStore(t, s)
	for _, dir := range []string{"packs", dirChains} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				var b []byte
				if b, err = os.ReadFile(path); err == nil {
					swap(t, path, string(b), false)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	s = openVerity(t, root, lower.VerityOn)
	if with, without := hashed(t, s); with != 0 || without != 1 {
		t.Errorf("copied: %d packs with fs-verity, %d without", with, without)
	}
	if err := s.layers.Compact(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := tryRead(t, s, name, "file"); got != text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if with, without := hashed(t, s); with != 1 || without != 0 {
		t.Errorf("%d packs with fs-verity, %d without", with, without)
	}
	checkClean(t, s)
}

// A container's files are committed as they are, also where its upper directory holds files without bytes, and large
// ones.
func TestVerityCommit(t *testing.T) {
	s := openVerity(t, verityRoot(t), lower.VerityOn)
	text, large := strings.Repeat("text", 5000), strings.Repeat("large", 4<<20)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"file": text}), nil)
	mounts, err := s.Prepare(t.Context(), "container", name)
	if err != nil {
		t.Fatal(err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return errors.Join(os.Chmod(filepath.Join(root, "file"), 0o600),
			os.WriteFile(filepath.Join(root, "new"), []byte(large), 0o600))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "committed", "container"); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, "committed", "file") + read(t, s, "committed", "new"); got != text+large {
		t.Errorf("%d bytes", len(got))
	}
	checkClean(t, s)
}

// What does not work is said, and lower.VerityOn does not open without it.
func TestVerityMissing(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	if f, err := lower.Examine(root); err != nil || f.Verity == nil {
		t.Skipf("this machine has fs-verity: %v", err)
	}
	if s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"),
		Verity: lower.VerityOn}); err == nil {
		t.Error(stop(s), "opened")
	} else if !strings.Contains(err.Error(), "verity") {
		t.Error(err)
	}
}

// checkClean lets fsck say that all is well.
func checkClean(t *testing.T, s *Snapshotter) {
	t.Helper()
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil || len(found) > 0 {
		t.Errorf("fsck: %v, %v", found, err)
	}
}
