package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// The two ways to give an image to the kernel: as a file, from Linux 6.12 on, and through loop devices.
var waysToMount = map[string]func(t *testing.T, file string) (source string){
	"file": func(_ *testing.T, file string) string { return file },
	"loop": loopDevice,
}

// loopDevice makes a read-only loop device of a file, which the kernel removes after its last user.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	needRoot(t)
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no loop devices: ", err)
	}
	defer control.Close()
	backing, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal("get a loop device: ", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		device, err := os.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			t.Skip("no loop device: ", err)
		}
		t.Cleanup(func() { _ = device.Close() })
		config := unix.LoopConfig{Fd: uint32(backing.Fd())}
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
		switch err := unix.IoctlLoopConfigure(int(device.Fd()), &config); {
		case err == nil:
			return path
		case !errors.Is(err, unix.EBUSY): // else somebody else was faster
			t.Fatalf("make %s of %s: %v", path, file, err)
		}
	}
}

// tryMount mounts for the time of the test.
func tryMount(t *testing.T, source, kind, options string) (string, error) {
	t.Helper()
	needRoot(t)
	at := t.TempDir()
	if err := unix.Mount(source, at, kind, unix.MS_RDONLY, options); err != nil {
		return "", fmt.Errorf("mount %s of %s with %q: %w", kind, source, options, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return at, nil
}

// mountErofs mounts an image with its devices, and skips where the kernel cannot.
func mountErofs(t *testing.T, way, file string, devices ...packed) string {
	t.Helper()
	var options []string
	for _, p := range devices {
		options = append(options, "device="+waysToMount[way](t, p.path))
	}
	at, err := tryMount(t, waysToMount[way](t, file), "erofs", strings.Join(options, ","))
	if way == "file" && (errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV)) {
		t.Skipf("this kernel mounts no images from files on this file system: %v", err)
	}
	if errors.Is(err, unix.EINVAL) {
		needBlocks(t, way, file)
	}
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// needBlocks skips where an image has blocks of 512 bytes and the kernel mounts none with these: before Linux 6.4, but
// for 6.1 from 6.1.115 on.
func needBlocks(t *testing.T, way, image string) {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	bits := make([]byte, 1)
	if _, err := f.ReadAt(bits, superOffset+12); err != nil {
		t.Fatal(err)
	}
	if blocks(bits[0]) != dense {
		return
	}
	_, err = tryMount(t, waysToMount[way](t, writePack(t, dense, 1, 700).path), "erofs", "")
	if errors.Is(err, unix.EINVAL) {
		t.Skip("this kernel does not mount blocks of 512 bytes: ", err)
	}
}

// mountOverlay mounts an overlay of read-only layers, and skips where the kernel knows no data-only ones.
func mountOverlay(t *testing.T, lower string) string {
	t.Helper()
	var errs []error
	for _, more := range []string{"", ",metacopy=on"} { // which Linux before 6.16 wants for data-only layers
		at, err := tryMount(t, "overlay", "overlay", "lowerdir="+lower+more)
		if err == nil {
			return at
		}
		errs = append(errs, err)
	}
	if strings.Contains(lower, "::") && errors.Is(errs[1], unix.EINVAL) {
		t.Skip("no data-only lower layers: ", errs[1])
	}
	t.Fatal(errors.Join(errs...))
	return ""
}

// compareFiles compares all bytes of a directory, and that each file in it has a small inode number of its own.
// Whiteouts do not count: shared images have some, and overlays show none.
func compareFiles(t *testing.T, root string, want map[string][]byte) {
	t.Helper()
	files, err := os.ReadDir(root)
	files = slices.DeleteFunc(files, func(d os.DirEntry) bool { return d.Type()&os.ModeCharDevice != 0 })
	if err != nil || len(files) != len(want) {
		t.Errorf("%d files, want %d: %v", len(files), len(want), err)
	}
	numbers := map[uint64]string{}
	for name, data := range want {
		path := filepath.Join(root, name)
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, want %d: %v", name, len(got), len(data), err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if other, double := numbers[st.Ino]; double || st.Ino == 0 || st.Ino > 1<<32 {
			t.Errorf("%s has the inode number %d, and so has %q", name, st.Ino, other)
		}
		numbers[st.Ino] = name
	}
}

func TestKernelReadsPack(t *testing.T) { forEachUnit(t, testKernelReadsPack) }

func testKernelReadsPack(t *testing.T, unit blocks) {
	for way := range waysToMount {
		t.Run(way, func(t *testing.T) {
			p := writePack(t, unit, 0x64f0a1b2c3, packSizes...)
			root := mountErofs(t, way, p.path)
			want := map[string][]byte{}
			for n, data := range p.data {
				want[slotName(uint32(n))] = data
			}
			compareFiles(t, filepath.Join(root, p.ID.String()), want)
			err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
				var st unix.Stat_t
				if err := errors.Join(err, unix.Stat(path, &st)); err != nil {
					return err
				}
				ok := st.Mode == unix.S_IFDIR|0o555 || st.Mode == unix.S_IFREG|0o444
				if !ok || st.Uid != 0 || st.Gid != 0 || st.Mtim.Nano() != 0 {
					t.Errorf("%s is %+v", path, st)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			empty := writePack(t, unit, 1)
			files, err := os.ReadDir(mountErofs(t, way, empty.path))
			if err != nil || len(files) != 1 || len(empty.open(t).Slots) != 0 {
				t.Error("a pack of nothing: ", files, err)
			}
		})
	}
}

// An image over packs shows every byte by itself in both flavours, and through an overlay over the packs in the
// shared one. One over dense packs has coarse ones beside.
func TestKernelReadsChainOverPacks(t *testing.T) { forEachUnit(t, testKernelReadsChainOverPacks) }

func testKernelReadsChainOverPacks(t *testing.T, unit blocks) {
	big := make([]int, 700) // a directory of several blocks
	for i := range big {
		big[i] = 641 + i
	}
	for flavour, redirect := range map[string]bool{"private": false, "shared": true} {
		for way := range waysToMount {
			t.Run(flavour+" "+way, func(t *testing.T) {
				packs := []packed{writePack(t, unit, 1<<40, packSizes...), writePack(t, coarse, 1<<40+1, big...),
					writePack(t, unit, 1<<40+2, 5000), writePack(t, unit, 1<<40+3, big...)}
				root, o, want := chainOver(redirect, packs...)
				at := mountErofs(t, way, writeChain(t, root, o), packs...)
				compareFiles(t, at, want)
				lower := at + ":" + t.TempDir() // the kernel wants two
				if redirect {
					lower = at
					for _, p := range packs {
						lower += "::" + mountErofs(t, way, p.path)
					}
				}
				overlay := mountOverlay(t, lower)
				compareFiles(t, overlay, want)
				for _, p := range packs {
					if _, err := os.Lstat(filepath.Join(overlay, p.ID.String())); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("the overlay shows pack %s: %v", p.ID, err)
					}
				}
			})
		}
	}
}

// The device table of some packs is longer than block 0.
func TestKernelReadsChainOverManyPacks(t *testing.T) {
	forEachUnit(t, testKernelReadsChainOverManyPacks)
}

func testKernelReadsChainOverManyPacks(t *testing.T, unit blocks) {
	t.Chdir(t.TempDir())
	var packs []packed
	for i := range 60 {
		p := writePack(t, unit, content.PackID(1000+i), 700, 5000+i)
		link := fmt.Sprint(i) // as all names have to fit one page
		if err := os.Symlink(p.path, link); err != nil {
			t.Fatal(err)
		}
		p.path = link
		packs = append(packs, p)
	}
	root, o, want := chainOver(false, packs...)
	compareFiles(t, mountErofs(t, "file", writeChain(t, root, o), packs...), want)
}

// Without its packs no image shows a byte, rather than wrong ones; behind them in one file it shows all (Linux 6.4).
func TestKernelWithoutPacks(t *testing.T) { forEachUnit(t, testKernelWithoutPacks) }

func testKernelWithoutPacks(t *testing.T, unit blocks) {
	for way := range waysToMount {
		t.Run(way, func(t *testing.T) {
			packs := []packed{writePack(t, unit, 31, 700, 5000, 100_000), writePack(t, coarse, 32, packSizes[6:]...)}
			root, o, want := chainOver(false, packs...)
			// More names, so that the image is longer than some payload's place in its pack.
			for i := range 5000 {
				root.Children = append(root.Children, leaf(fmt.Sprintf("z-%04d", i), &content.Entry{Kind: content.Fifo}))
			}
			chain := writeChain(t, root, o)
			at, err := tryMount(t, waysToMount[way](t, chain), "erofs", "")
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTBLK) {
				t.Skip("this kernel does not mount it: ", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			for name, data := range want {
				if got, err := os.ReadFile(filepath.Join(at, name)); !errors.Is(err, unix.EIO) {
					t.Errorf("%s: %d of %d bytes, %v", name, len(got), len(data), err)
				}
			}
			flat := chain + ".flat"
			for _, file := range []string{chain, packs[0].path, packs[1].path} {
				appendFile(t, flat, file)
			}
			at = mountErofs(t, way, flat)
			for name, data := range want {
				if got, err := os.ReadFile(filepath.Join(at, name)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s of one file: %d of %d bytes, %v", name, len(got), len(data), err)
				}
			}
		})
	}
}

func appendFile(t *testing.T, to, from string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sparsePack is a pack with payloads that are zeros, but for what they begin and end with.
func sparsePack(t *testing.T, unit blocks, id content.PackID, sizes ...int64) packed {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), id.String()+".erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewPackWriter(f, id, unit == dense)
	for i, size := range sizes {
		begin, end := pattern(fmt.Sprint("begin", i), 10_000), pattern(fmt.Sprint("end", i), 10_000)
		_, at, err := w.take(Slot{ID: idOf(begin), Size: size})
		if err == nil {
			_, err = f.WriteAt(begin, at)
		}
		if err == nil {
			_, err = f.WriteAt(end, at+size-int64(len(end)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p, err := w.Seal()
	if err != nil {
		t.Fatal(err)
	}
	return packed{Pack: p, path: f.Name(), data: make([][]byte, len(sizes))}
}

// Payloads of about 4 GiB and more need extended inodes in packs, and lie behind offsets of 32 bits. Behind one of a
// TiB the numbers of small blocks need the 32nd bit.
func TestKernelReadsLargePayloads(t *testing.T) { forEachUnit(t, testKernelReadsLargePayloads) }

func testKernelReadsLargePayloads(t *testing.T, unit blocks) {
	sizes := []int64{1<<32 - 1, 1 << 32, 1<<32 + 4097, 1<<40 + 5, 20_001}
	for way := range waysToMount {
		t.Run(way, func(t *testing.T) {
			p := sparsePack(t, unit, 0x64f0a1b2c3, sizes...)
			if fi, err := os.Stat(p.path); err != nil || fi.Size() != int64(p.Blocks)*blockSize {
				t.Fatal(fi.Size(), err)
			}
			if len(p.open(t).Slots) != len(sizes) {
				t.Fatal("not all slots are there")
			}
			root, o, _ := chainOver(true, p)
			for n, child := range root.Children {
				child.Entry.Size, child.Entry.Data, child.Entry.Object = sizes[n], nil, p.Slots[n].ID
			}
			o.Place = func(id content.ObjectID) (content.Place, bool) {
				for n, s := range p.Slots {
					if s.ID == id {
						return p.Place(uint32(n)), true
					}
				}
				return content.Place{}, false
			}
			pack := mountErofs(t, way, p.path)
			chain := mountErofs(t, way, writeChain(t, root, o), p)
			t.Run("pack", func(t *testing.T) {
				compareEnds(t, sizes, func(n int) string { return pack + PackPath(p.ID, uint32(n)) })
			})
			t.Run("chain", func(t *testing.T) {
				compareEnds(t, sizes, func(n int) string { return filepath.Join(chain, root.Children[n].Name) })
			})
			t.Run("overlay", func(t *testing.T) {
				overlay := mountOverlay(t, chain+"::"+pack)
				compareEnds(t, sizes, func(n int) string { return filepath.Join(overlay, root.Children[n].Name) })
			})
		})
	}
}

// compareEnds compares what sparsePack wrote.
func compareEnds(t *testing.T, sizes []int64, path func(n int) string) {
	t.Helper()
	for n, size := range sizes {
		f, err := os.Open(path(n))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if fi, err := f.Stat(); err != nil || fi.Size() != size {
			t.Errorf("payload %d: %v, want %d bytes: %v", n, fi.Size(), size, err)
		}
		begin, end := pattern(fmt.Sprint("begin", n), 10_000), pattern(fmt.Sprint("end", n), 10_000)
		got := make([]byte, 10_000)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, begin) {
			t.Errorf("payload %d of %d bytes begins otherwise: %v", n, size, err)
		}
		if _, err := f.ReadAt(got, size-int64(len(got))); err != nil || !bytes.Equal(got, end) {
			t.Errorf("payload %d of %d bytes ends otherwise: %v", n, size, err)
		}
	}
}

// fsckReads skips where erofs-utils reads no images with such blocks: those of Debian 12 want blocks of a page.
func fsckReads(t *testing.T, fsck string, unit blocks) {
	t.Helper()
	out, err := exec.Command(fsck, writePack(t, unit, 1).path).CombinedOutput()
	if err != nil && bytes.Contains(out, []byte("isn't supported on this platform")) {
		t.Skipf("fsck.erofs: %s", bytes.TrimSpace(out))
	}
}

// The EROFS project's own checker finds nothing wrong, and extracts the same bytes.
func TestFsckPacks(t *testing.T) { forEachUnit(t, testFsckPacks) }

func testFsckPacks(t *testing.T, unit blocks) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("fsck.erofs is not installed (package erofs-utils)")
	}
	fsckReads(t, fsck, unit)
	packs := []packed{writePack(t, unit, 0x64f0a1b2c3, packSizes...), writePack(t, coarse, 0x64f0a1b2c4, 700, 5000)}
	extract := func(t *testing.T, args ...string) string {
		t.Helper()
		to := filepath.Join(t.TempDir(), "out")
		t.Cleanup(func() { // without root nothing can be removed from a directory that is read-only
			_ = filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					_ = os.Chmod(path, 0o700)
				}
				return nil
			})
		})
		out, err := exec.Command(fsck, append([]string{"--extract=" + to, "--no-preserve"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("fsck.erofs %v: %v\n%s", args, err, out)
		}
		return to
	}
	for _, p := range packs {
		want := map[string][]byte{}
		for n, data := range p.data {
			want[slotName(uint32(n))] = data
		}
		compareFiles(t, filepath.Join(extract(t, p.path), p.ID.String()), want)
	}
	for _, redirect := range []bool{false, true} {
		root, o, want := chainOver(redirect, packs...)
		args := []string{"--device=" + packs[0].path, "--device=" + packs[1].path, writeChain(t, root, o)}
		compareFiles(t, extract(t, args...), want)
	}
}
