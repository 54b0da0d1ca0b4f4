package lower

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// resident returns how many pages of a file are in the page cache.
func resident(t *testing.T, path string) (in, of int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	page := os.Getpagesize()
	vec := make([]byte, (len(mem)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)),
		uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, v := range vec {
		in += int(v & 1)
	}
	return in, len(vec)
}

func dropPages(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Error(err)
		}
		_ = f.Close()
		if in, of := resident(t, path); in > of/10 {
			t.Skipf("%s: %d of %d pages stay in memory: the cache cannot be dropped here", path, in, of)
		}
	}
}

// What a container reads of a file is in memory for all images that have it (shared), or for the containers of its
// image (private), and not a second time as pages of the pack's file.
func TestEqualFilesInMemory(t *testing.T) {
	inAllKinds(t, func(t *testing.T, l *lab) {
		big := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
		one := l.ingest(map[string]string{"big": big})
		two := l.ingest(map[string]string{"d/same": big, "other": text("other")})
		start := func(chain content.LayerID) string {
			mounts, at := l.mounts(l.stack(l.ensure(chain))), t.TempDir()
			if err := mounts[0].Mount(at); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
			return at
		}
		reader, sibling := filepath.Join(start(one), "big"), filepath.Join(start(one), "big")
		other := filepath.Join(start(two), "d/same")
		pack := l.Chains.mounts.packs.path(l.Images.known(l.Name([]content.LayerID{one}, Plain)).devices[0].Pack)
		l.layers.Packs().DropCache(time.Now(), time.Now())
		dropPages(t, reader, sibling, other, pack)
		if got := readFile(t, reader); got != big {
			t.Fatalf("%d bytes", len(got))
		}
		ago := time.Now().Add(-time.Hour)
		l.layers.Packs().DropCache(ago, ago)
		if in, of := resident(t, pack); !l.opts.Kernel.Loop && in < of/2 {
			t.Errorf("%d of %d pages of a pack that is new are in memory", in, of)
		}
		l.layers.Packs().DropCache(ago, time.Now()) // the daemon does now and then
		if l.opts.Kernel.Shared {                   // a container of it was given its mounts
			if got := readFile(t, pack); len(got) == 0 {
				t.Error("an empty pack")
			}
			l.layers.Packs().DropCache(time.Now(), ago)
		}
		for path, want := range map[string]bool{reader: true, sibling: true, other: l.opts.Kernel.Shared, pack: false} {
			if in, of := resident(t, path); want && in != of || !want && in > of/10 {
				t.Errorf("%s: %d of %d pages are in memory", path, in, of)
			}
		}
	})
}
