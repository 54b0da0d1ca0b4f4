package erofs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// writeDense writes a dense pack with payloads of these sizes.
func writeDense(t *testing.T, id content.PackID, sizes ...int) packed {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), id.String()+".erofs"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, p := NewPackWriter(f, id, true), packed{path: f.Name()}
	for i, size := range sizes {
		data := pattern(id.String()+" dense "+slotName(uint32(i)), size)
		if _, err := w.Append(idOf(data), data); err != nil {
			t.Fatal(err)
		}
		p.data = append(p.data, data)
	}
	if p.Pack, err = w.Seal(); err != nil {
		t.Fatal(err)
	}
	return p
}

// needDense skips where the kernel mounts larger blocks in this way, and refuses those of 512 bytes: before Linux 6.4.
func needDense(t *testing.T, way string) {
	t.Helper()
	mountErofs(t, way, writePack(t, 1, 700).path)
	_, err := tryMount(t, waysToMount[way](t, writeDense(t, 2, 700).path), "erofs", "")
	if errors.Is(err, unix.EINVAL) {
		t.Skip("this kernel does not mount blocks of 512 bytes: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestKernelReadsDensePack(t *testing.T) {
	for way := range waysToMount {
		t.Run(way, func(t *testing.T) {
			needDense(t, way)
			p, want := writeDense(t, 0x64f0a1b2c3, packSizes...), map[string][]byte{}
			for n, data := range p.data {
				want[slotName(uint32(n))] = data
			}
			if at := p.Slots[1].Offset; at%blockSize == 0 {
				t.Errorf("the second payload begins at byte %d: the pack is not dense", at)
			}
			compareFiles(t, filepath.Join(mountErofs(t, way, p.path), p.ID.String()), want)
		})
	}
}

// An image with blocks of 512 bytes shows every byte of dense packs, and of one that is not dense among them.
func TestKernelReadsDenseChain(t *testing.T) {
	small := make([]int, 700)
	for i := range small {
		small[i] = 641 + 7*i
	}
	for flavour, redirect := range map[string]bool{"private": false, "shared": true} {
		for way := range waysToMount {
			t.Run(flavour+" "+way, func(t *testing.T) {
				needDense(t, way)
				packs := []packed{writeDense(t, 1<<40, packSizes...), writePack(t, 1<<40+1, packSizes...),
					writeDense(t, 1<<40+2, small...)}
				root, o, want := chainOver(redirect, packs...)
				o.Dense = true
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
