package layer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// smallDisk is an ext4 of 24 MiB with few inodes, in a file.
func smallDisk(t *testing.T, inodes int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a file system")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	dir := t.TempDir()
	file, at := filepath.Join(dir, "disk"), filepath.Join(dir, "at")
	for _, args := range [][]string{
		{"truncate", "-s", "24M", file},
		{"mkfs.ext4", "-q", "-N", fmt.Sprint(inodes), file},
		{"mkdir", at},
		{"mount", "-o", "loop", file, at},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return at
}

// A layer that does not fit is refused with a word on what is missing, leaves nothing behind, harms no
// other, and comes in when there is room again, without a restart.
func TestDiskThatIsFull(t *testing.T) {
	noise := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		return string(b)
	}
	many := func(n, size int) (all []member) {
		for i := range n {
			all = append(all, member{name: fmt.Sprintf("f-%d", i), data: noise(size)})
		}
		return all
	}
	for _, row := range []struct {
		name   string
		inodes int
		layer  []member
		filler int // bytes of a file beside the store that takes the room
		files  int // or how many of them, or as many as there is room for
	}{
		{name: "blocks", inodes: 6000, layer: many(300, 40_000), filler: 12 << 20},
		{name: "blocks for one file", inodes: 6000, layer: many(1, 17<<20), filler: 8 << 20},
		{name: "inodes", inodes: 1024, layer: many(50, 2000), files: 1 << 20},
	} {
		t.Run(row.name, func(t *testing.T) {
			at := smallDisk(t, row.inodes)
			s := openStore(t, filepath.Join(at, "root"), content.Python)
			good, err := s.IngestBlob(t.Context(), blobOf(makeTar(t, many(3, 3000)...)))
			if err != nil {
				t.Fatal(err)
			}
			before := s.Used()
			for i := range max(1, row.files) {
				err := os.WriteFile(filepath.Join(at, fmt.Sprint("filler-", i)), make([]byte, row.filler), 0o600)
				if errors.Is(err, unix.ENOSPC) && row.filler == 0 {
					break // no inode is left
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			tar := makeTar(t, row.layer...)
			_, err = s.IngestBlob(t.Context(), blobOf(tar))
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "free space or inodes on the file system of "+at) {
				t.Fatalf("a layer that does not fit: %v", err)
			}
			if after := s.Used(); after != before {
				t.Errorf("%+v is used after the failure, %+v before", after, before)
			}
			if left, _ := filepath.Glob(filepath.Join(at, "root", dirIngest, "*")); len(left) > 0 {
				t.Errorf("left in staging: %v", left)
			}
			if _, err := s.Merge(t.Context(), []content.LayerID{good.Layer}); err != nil {
				t.Errorf("the layer that was there: %v", err)
			}
			fillers, _ := filepath.Glob(filepath.Join(at, "filler-*"))
			for _, f := range fillers {
				if err := os.Remove(f); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.IngestBlob(t.Context(), blobOf(tar)); err != nil {
				t.Errorf("with room again: %v", err)
			}
		})
	}
}

// Ingests stop at the reserve, of bytes and of inodes, after asking for what can be freed. What the store knows comes
// in all the same, and when there is room again, the rest.
func TestReserve(t *testing.T) {
	for name, row := range map[string]struct {
		inodes  int
		reserve Reserve
		layer   []member
		want    string
	}{
		"space":  {4096, Reserve{Space: Amount{Percent: 70}}, filler(12, 1<<20), "reserve_space keeps"},
		"inodes": {2048, Reserve{Inodes: Amount{Fixed: 900}}, filler(100, 700), "reserve_inodes keeps"},
	} {
		t.Run(name, func(t *testing.T) {
			root := smallDisk(t, row.inodes)
			var asked int
			s, err := Open(t.Context(), Options{Root: root, Reserve: row.reserve, Pressure: func(context.Context) {
				asked++
			}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { closeStore(t, s) })
			small := makeTar(t, row.layer[:2]...)
			in := ingest(t, s, small)
			filled := filepath.Join(root, "fill")
			if err := os.Mkdir(filled, 0o700); err != nil {
				t.Fatal(err)
			}
			fill := func() {
				for i := 0; s.hasRoom(0) == nil; i++ {
					if err := os.WriteFile(filepath.Join(filled, fmt.Sprint(i)), make([]byte, 8192), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			if row.reserve.Inodes.Fixed > 0 {
				fill() // a layer needs next to no inodes
			}
			before := statfs(t, root)
			_, err = s.IngestBlob(t.Context(), blobOf(makeTar(t, row.layer...)))
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), row.want) ||
				!strings.Contains(err.Error(), "remove images") {
				t.Fatalf("beyond the reserve: %v", err)
			}
			if asked != 1 {
				t.Errorf("asked %d times for what can be freed", asked)
			}
			after := statfs(t, root)
			for tries := 0; tries < 6000 && after.Bavail < before.Bavail-20; tries++ {
				time.Sleep(10 * time.Millisecond) // who asked the disk to begin writing may still have the pack open
				after = statfs(t, root)
			}
			if after.Bavail < before.Bavail-20 || after.Ffree < before.Ffree-20 {
				t.Errorf("it left %d blocks and %d inodes, of %d and %d", after.Bavail, after.Ffree, before.Bavail, before.Ffree)
			}
			other := makeTar(t, append([]member{{name: "more", data: "inline"}}, row.layer[:2]...)...)
			fill()
			ingest(t, s, other)
			if err := os.RemoveAll(filled); err != nil {
				t.Fatal(err)
			}
			ingest(t, s, makeTar(t, row.layer[:len(row.layer)/4]...))
			if err := s.InService(in.Layer); err != nil {
				t.Error(err)
			}
		})
	}
}

// filler is many files that share nothing.
func filler(n, size int) (all []member) {
	for i := range n {
		b := make([]byte, size)
		for j := range b {
			b[j] = byte(rand.Uint32())
		}
		all = append(all, member{name: fmt.Sprintf("f-%d", i), data: string(b)})
	}
	return all
}

func statfs(t *testing.T, path string) (st unix.Statfs_t) {
	t.Helper()
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return st
}
