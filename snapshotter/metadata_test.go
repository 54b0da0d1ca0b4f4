package snapshotter

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// bulkStore is a store with layers, a container's directory, and a metadata.db of many pages, that was stopped.
func bulkStore(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	s := open(t, root)
	parent := ""
	for i := range 3 {
		parent, _ = unpack(t, s, "one", parent, layerTar(t, map[string]string{fmt.Sprint("f", i): strings.Repeat(fmt.Sprint(i), 5000)}), nil)
	}
	if _, err := s.Prepare(t.Context(), "container", parent); err != nil {
		t.Fatal(err)
	}
	err := s.ms.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		for i := range 300 {
			labels := map[string]string{"containerd.io/gc.root": strings.Repeat("x", i%200)}
			if _, err := storage.CreateSnapshot(ctx, snapshots.KindView, fmt.Sprintf("view-%d", i), parent, snapshots.WithLabels(labels)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 { // free pages, and a container's snapshot that was removed
		if err := s.Remove(t.Context(), fmt.Sprintf("view-%d", 3*i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := stop(s); err != nil {
		t.Fatal(err)
	}
	return root
}

// stored lists what a store holds but for metadata.db and marks.
func stored(t *testing.T, root string) (paths []string) {
	t.Helper()
	for _, dir := range []string{"objects", "layers", "snapshots"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && !strings.HasPrefix(d.Name(), "rm-") {
				paths = append(paths, strings.TrimPrefix(path, root))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return paths
}

// A damaged metadata.db is refused with a word on what to do; nothing is removed, and with the right file in its place again
// everything goes on.
func TestDamagedMetadataIsRefused(t *testing.T) {
	needRoot(t)
	root := bulkStore(t)
	before := stored(t, root)
	db := filepath.Join(root, "metadata.db")
	whole, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("metadata.db has %d pages", len(whole)/4096)
	other := func(name string, fill func(tx *bbolt.Tx) error) []byte {
		path := filepath.Join(t.TempDir(), name)
		b, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Update(fill); err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	change := func(fn func(b []byte) []byte) []byte { return fn(append([]byte(nil), whole...)) }
	page := func(n int, fn func(p []byte)) []byte {
		return change(func(b []byte) []byte { fn(b[n*4096 : (n+1)*4096]); return b })
	}
	f, err := newestMeta(whole)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]byte{
		"empty":                  {},
		"zeros":                  make([]byte, len(whole)),
		"garbage":                change(func(b []byte) []byte { return []byte(strings.Repeat("garbage\n", len(b)/8)) }),
		"a few bytes":            []byte("bolt"),
		"cut in the first page":  whole[:1000],
		"cut after the metas":    whole[:2*4096],
		"cut in the middle":      whole[:f.end/2*4096],
		"cut by a page":          whole[:(f.end-1)*4096],
		"both metas":             change(func(b []byte) []byte { b[40] ^= 1; b[4096+40] ^= 1; return b }),
		"the root page is zeros": page(int(f.root), func(p []byte) { clear(p) }),
		"the root page is itself": page(int(f.root), func(p []byte) {
			order.PutUint16(p[8:], flagBranch)
			order.PutUint16(p[10:], 1)
			order.PutUint64(p[24:], f.root)
		}),
		"another database": other("other", func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("cats")); return err }),
		"a database of containerd": other("containerd", func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucket([]byte("v1"))
			if err == nil {
				_, err = b.CreateBucket([]byte("default"))
			}
			return err
		}),
		"a snapshot without its layer": change(func(b []byte) []byte {
			return []byte(strings.ReplaceAll(string(b), labelLayer, strings.Replace(labelLayer, "layer", "liars", 1)))
		}),
	}
	flipped := map[uint64]bool{}
	for _, n := range []uint64{2, f.free, f.root, f.end - 1} {
		flipped[n] = true
	}
	for n := range flipped {
		if !f.listsFree(t, n) {
			rows[fmt.Sprintf("page %d is flipped", n)] = page(int(n), func(p []byte) {
				for i := range p {
					p[i] ^= 0xff
				}
			})
		}
	}
	for name, data := range rows {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(db, data, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact})
			if err == nil {
				t.Error("opened", stop(s))
			} else if !strings.Contains(err.Error(), "metadata.db") || !strings.Contains(err.Error(), "nothing was removed; put the file back from a backup") {
				t.Error(err)
			}
			if diff := cmp.Diff(before, stored(t, root)); diff != "" {
				t.Errorf("the store has changed (-before +after):\n%s", diff)
			}
		})
	}
	if err := os.WriteFile(db, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, root)
	if _, err := s.Mounts(t.Context(), "container"); err != nil {
		t.Error(err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
}

// listsFree tells whether a page is free.
func (f boltFile) listsFree(t *testing.T, n uint64) bool {
	t.Helper()
	page := f.data[f.free*f.page:]
	for i := range int(order.Uint16(page[10:])) {
		if order.Uint64(page[boltHeader+8*i:]) == n {
			return true
		}
	}
	return false
}

// The newer of two metas is lost: the state before the last transaction is whole, and served.
func TestTornMeta(t *testing.T) {
	needRoot(t)
	root := bulkStore(t)
	db := filepath.Join(root, "metadata.db")
	data, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	f, err := newestMeta(data)
	if err != nil {
		t.Fatal(err)
	}
	clear(data[f.txid%2*4096:][:4096])
	if back, err := checkBolt(data); !back || err != nil {
		t.Fatal(back, err)
	}
	if err := os.WriteFile(db, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, root).Mounts(t.Context(), "container"); err != nil {
		t.Error(err)
	}
}

// Whatever bytes of a bolt file change: it is refused, or bbolt reads all of it. A fault would end the test.
func TestDamagedBoltNeverFaults(t *testing.T) {
	needRoot(t)
	root := bulkStore(t)
	whole, err := os.ReadFile(filepath.Join(root, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := checkBolt(whole); err != nil {
		t.Fatal(err)
	}
	f, err := newestMeta(whole)
	if err != nil {
		t.Fatal(err)
	}
	used := int(f.end) * 4096
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	refused, n := 0, 1000
	if os.Getenv("DEDUP_LONG") != "" {
		n = 100_000
	}
	fd, err := unix.MemfdCreate("bolt", 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	defer file.Close()
	for range n {
		b := append([]byte(nil), whole...)
		for range 1 + r.IntN(3) {
			at := r.IntN(min(used, len(b)))
			if r.IntN(2) == 0 { // headers and elements are what matters
				at = min(at/4096*4096+r.IntN(200), len(b)-1)
			}
			switch r.IntN(4) {
			case 0:
				b[at] ^= 1 << r.IntN(8)
			case 1:
				b[at] = byte(r.Uint32())
			case 2:
				clear(b[at:min(at+r.IntN(600), len(b))])
			case 3:
				b = b[:max(at, 1)]
			}
		}
		back, err := checkBolt(b)
		if err != nil {
			refused++
			continue
		}
		if back { // of a torn meta bbolt's own check wants to see the page's header
			for i := range 2 {
				order.PutUint64(b[4096*i:], uint64(i))
				order.PutUint16(b[4096*i+8:], flagMeta)
			}
		}
		if err := readBolt(file, b); err != nil {
			t.Errorf("taken for whole, and bbolt says %v", err)
		}
	}
	t.Logf("%d of %d refused", refused, n)
	if refused < n/10 {
		t.Errorf("only %d of %d were refused", refused, n)
	}
}

// readBolt reads all of a bolt file with bbolt.
func readBolt(file *os.File, data []byte) error {
	if err := file.Truncate(0); err != nil {
		return err
	}
	if _, err := file.WriteAt(data, 0); err != nil {
		return err
	}
	db, err := bbolt.Open(file.Name(), 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) (first error) {
		for err := range tx.Check() {
			if first == nil && !strings.Contains(err.Error(), "unreachable unfreed") {
				first = err
			}
		}
		return first
	})
}
