package lower

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
)

var errNoDense = errors.New("a kernel that mounts no blocks of 512 bytes")

// isDense tells whether a chain's image on the disk has small blocks.
func (l *lab) isDense(chain ...content.LayerID) bool {
	l.t.Helper()
	f, err := os.Open(l.Images.Path(l.Name(chain, Plain)))
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		l.t.Fatal(err)
	}
	read, err := erofs.ReadChain(f, fi.Size())
	if err != nil {
		l.t.Fatal(err)
	}
	return read.Dense
}

// reboot opens the store under another kernel. Nothing is mounted then.
func (l *lab) reboot(k Kernel) {
	l.t.Helper()
	l.drops.Wait()
	names, err := l.List()
	if err != nil {
		l.t.Fatal(err)
	}
	for _, n := range names {
		if err := l.Chains.mounts.unmount(n); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := l.layers.Close(); err != nil {
		l.t.Fatal(err)
	}
	l.Chains = nil
	l.open(k)
}

// denseFiles are files of many sizes, all with that word in their names and bytes.
func denseFiles(word string) map[string]string {
	all := map[string]string{}
	for i := range 20 {
		all[fmt.Sprint(word, "/", i)] = strings.Repeat(fmt.Sprint(word, i, " "), 100+70*i)
	}
	return all
}

// shows checks what a chain of layers of denseFiles shows, and whether its image has small blocks.
func (l *lab) shows(dense bool, chain []content.LayerID, words ...string) {
	l.t.Helper()
	with(l.t, l.mounts(l.stack(l.ensure(chain...))), false, func(root string) {
		for _, word := range words {
			for name, want := range denseFiles(word) {
				if got := readFile(l.t, root, name); got != want {
					l.t.Errorf("%s: %d bytes, want %d", name, len(got), len(want))
				}
			}
		}
	})
	if l.isDense(chain...) != dense {
		l.t.Errorf("the image of %s is dense: %v", words, !dense)
	}
	if problem, err := l.Compare(l.t.Context(), l.Name(chain, Plain), chain); problem != "" || err != nil {
		l.t.Errorf("%s, %v", problem, err)
	}
}

// A store goes from a kernel that mounts dense packs to one that does not, and back: dense images go before anybody
// mounts them, others stay, and an image has small blocks when one of its packs needs it. All show the same.
func TestDenseImagesUnderAnotherKernel(t *testing.T) {
	if err := needFeatures(t).Dense; err != nil {
		t.Skipf("the kernel mounts no dense packs: %v", err)
	}
	inAllKinds(t, func(t *testing.T, l *lab) {
		newer, older := l.opts.Kernel, l.opts.Kernel
		if newer.NoDense != nil {
			return // this kind stays with packs that are not dense
		}
		older.NoDense = errNoDense
		has := func(chain ...content.LayerID) bool { return l.Images.Has(l.Name(chain, Plain)) }
		a, b := l.ingest(denseFiles("a")), l.ingest(denseFiles("b"))
		l.shows(true, []content.LayerID{a, b}, "a", "b")
		l.shows(true, []content.LayerID{b}, "b")

		l.reboot(older)
		if has(a, b) || has(b) {
			t.Error("an image with small blocks is left")
		}
		c := l.ingest(denseFiles("c"))
		l.shows(false, []content.LayerID{a}, "a")
		l.shows(false, []content.LayerID{a, b}, "a", "b")
		l.shows(false, []content.LayerID{c}, "c")
		l.shows(false, []content.LayerID{a, c}, "a", "c")

		l.reboot(newer)
		d := l.ingest(denseFiles("d"))
		l.shows(false, []content.LayerID{a, b}, "a", "b")
		if builds := l.Stats().Builds; builds != 0 {
			t.Errorf("an image that can be mounted was built again")
		}
		l.shows(true, []content.LayerID{d}, "d")
		l.shows(true, []content.LayerID{a, d}, "a", "d")
		l.shows(true, []content.LayerID{a, c, d}, "a", "c", "d")
		l.shows(false, []content.LayerID{b, c}, "b", "c")

		l.reboot(older)
		if !has(a, b) || has(a, d) {
			t.Error("not those with small blocks are gone, and the others left")
		}
		l.shows(false, []content.LayerID{a, c, d}, "a", "c", "d")
		if err := l.layers.Compact(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.drops.Wait()
		packs, err := filepath.Glob(filepath.Join(l.dir, "root/packs/*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range packs {
			if readPack(t, path).Dense {
				t.Errorf("%s is dense", path)
			}
		}
	})
}

// Builds that find no room have what nobody uses removed. Who does that may wait for a chain that is being built, so no
// build holds one meanwhile.
func TestBuildsWithoutRoomDoNotWaitForEachOther(t *testing.T) {
	if err := needFeatures(t).Dense; err != nil {
		t.Skipf("the kernel mounts no dense packs: %v", err)
	}
	for name, k := range kinds(t) {
		if k.NoDense != nil || k.Loop {
			continue
		}
		t.Run(name, func(t *testing.T) {
			l := newLab(t, k)
			chains := [][]content.LayerID{{l.ingest(denseFiles("a"))}, {l.ingest(denseFiles("b"))}}
			var asked atomic.Int64
			l.wants = layer.Options{
				Reserve: layer.Reserve{Space: layer.Amount{Fixed: 1 << 60}},
				Pressure: func(ctx context.Context) {
					asked.Add(1)
					for _, chain := range chains {
						if err := l.Drop(ctx, l.Name(chain, Plain)); err != nil {
							t.Error(err)
						}
					}
				},
			}
			older := k
			older.NoDense = errNoDense
			l.reboot(older)
			errs := make(chan error)
			for _, chain := range chains {
				go func() {
					_, err := l.Ensure(t.Context(), chain, Plain)
					errs <- err
				}()
			}
			for range chains {
				if err := <-errs; !errors.Is(err, unix.ENOSPC) || !errors.Is(err, object.ErrTooDense) {
					t.Errorf("a build without room: %v", err)
				}
			}
			if n := asked.Load(); n != 1 {
				t.Errorf("asked %d times for what can be freed", n)
			}
		})
	}
}

func readPack(t *testing.T, path string) *erofs.Pack {
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
	pack, err := erofs.OpenPack(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return pack
}
