package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
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
		parent, _ = unpack(t, s, "one", parent,
			layerTar(t, map[string]string{fmt.Sprint("f", i): strings.Repeat(fmt.Sprint(i), 5000)}), nil)
	}
	if _, err := s.Prepare(t.Context(), "container", parent); err != nil {
		t.Fatal(err)
	}
	err := s.db.update(t.Context(), func(ctx context.Context) error {
		for i := range 300 {
			labels := map[string]string{"containerd.io/gc.root": strings.Repeat("x", i%200)}
			if _, err := createSnapshot(ctx, snapshots.KindView, fmt.Sprintf("view-%d", i), parent, labels); err != nil {
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
	for _, dir := range []string{"packs", "layers", "snapshots"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if strings.HasPrefix(filepath.Base(path), goingPrefix) {
				return fs.SkipDir
			}
			if err == nil {
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

// A damaged metadata.db is refused with a word on what to do; nothing is removed, and with the right file in its place
// again everything goes on.
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
	for name, data := range ruined(t, whole) {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(db, data, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Fidelity: content.Exact})
			if err == nil {
				t.Error("opened", stop(s))
			} else if !strings.Contains(err.Error(), "metadata.db") ||
				!strings.Contains(err.Error(), "nothing was removed; put the file back from a backup") {
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

// ruined returns metadata.db as nobody can read it, by what has happened to it.
func ruined(t *testing.T, whole []byte) map[string][]byte {
	t.Helper()
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
		"another database": other("other", func(tx *bbolt.Tx) error {
			_,
				err := tx.CreateBucket([]byte("cats"))
			return err
		}),
		"a database of containerd": other("containerd", func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucket([]byte("v1"))
			if err == nil {
				_, err = b.CreateBucket([]byte("default"))
			}
			return err
		}),
	}
	for _, n := range []uint64{2, f.free, f.root, f.end - 1} {
		if !f.listsFree(t, n) {
			rows[fmt.Sprintf("page %d is flipped", n)] = page(int(n), func(p []byte) {
				for i := range p {
					p[i] ^= 0xff
				}
			})
		}
	}
	return rows
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

// Whatever bytes of metadata.db change: it is refused; or bbolt reads all of it, and it says what it said or the damage
// is found. A fault would end the test.
func TestDamagedMetadataIsFound(t *testing.T) {
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
	said := contentOf(t, filepath.Join(root, "metadata.db"))
	refused, harmless, n := 0, 0, 1000
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
		found, err := findsDamage(t, file.Name())
		switch {
		case err != nil:
			refused++
		case found:
		case back || contentOf(t, file.Name()) == said:
			harmless++
		default:
			t.Errorf("it says something else, and is taken for whole:\n%s",
				cmp.Diff(strings.Split(said, "\n"), strings.Split(contentOf(t, file.Name()), "\n")))
		}
	}
	t.Logf("%d of %d refused, %d harmless, of the others the damage was found", refused, n, harmless)
	if refused < n/10 || refused+harmless == n {
		t.Error("hardly any, or all, are refused or harmless")
	}
}

// findsDamage opens a metadata.db whose structure is whole, and tells whether its records are found to be damaged.
func findsDamage(t *testing.T, path string) (found bool, err error) {
	t.Helper()
	db, err := openMetadata(t.Context(), path)
	if err != nil {
		return false, err
	}
	defer db.close()
	err = db.view(t.Context(), func(ctx context.Context) error {
		r := readRecords(ctx)
		found = !r.complete() || checkLinks(ctx, r) != ""
		return nil
	})
	return found, err
}

// contentOf returns all that a metadata.db says, but for the times of the last writes.
func contentOf(t *testing.T, path string) string {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var out strings.Builder
	var dump func(b *bbolt.Bucket, indent string) error
	dump = func(b *bbolt.Bucket, indent string) error {
		return b.ForEach(func(k, v []byte) error {
			switch sub := b.Bucket(k); {
			case sub != nil:
				fmt.Fprintf(&out, "%s%q:\n", indent, k)
				return dump(sub, indent+" ")
			case string(k) != "updatedat":
				fmt.Fprintf(&out, "%s%q=%q\n", indent, k, v)
			}
			return nil
		})
	}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(k []byte, b *bbolt.Bucket) error {
			fmt.Fprintf(&out, "%q:\n", k)
			return dump(b, " ")
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
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

// What has gone wrong on the disk the daemon finds while it has the right bytes in memory, and writes them again.
func TestMetadataOnDisk(t *testing.T) {
	needRoot(t)
	file, at := smallDisk(t)
	s := open(t, filepath.Join(at, "root"))
	parent, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"f": "f"}), nil)
	if _, err := s.Prepare(t.Context(), "a-container-of-note", parent); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Fatal(found, err)
	}
	unix.Sync()
	disk, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.ReplaceAll(disk, []byte("a-container-of-note"), []byte("a-container-of-none"))
	if bytes.Equal(disk, changed) {
		t.Fatal("the container is not on the disk")
	}
	if err := os.WriteFile(file, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil || len(found) != 1 || !strings.Contains(found[0].Problem, "another one on the disk") {
		t.Fatalf("found %+v, %v", found, err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{Repair: true}); err != nil || len(found) != 1 || !found[0].Fixed {
		t.Fatalf("found %+v, %v", found, err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Fatalf("after repair: %+v, %v", found, err)
	}
	if disk, err := os.ReadFile(file); err != nil || !bytes.Contains(disk, []byte("a-container-of-note")) {
		t.Errorf("it is not on the disk: %v", err)
	}
}

// A store of the layout before this one is taken over, also when that was interrupted.
func TestUpgrade(t *testing.T) {
	needRoot(t)
	root := bulkStore(t)
	db, format := filepath.Join(root, "metadata.db"), filepath.Join(root, "format")
	before := stored(t, root)
	for _, interrupted := range []bool{false, true} {
		if err := os.WriteFile(format, []byte("2\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if !interrupted {
			damageRecords(t, db, func(all, _ *bbolt.Bucket) error {
				return errors.Join(all.Tx().DeleteBucket(bucketOurs), all.ForEachBucket(func(name []byte) error {
					return all.Bucket(name).Bucket(bucketLabels).Delete([]byte(labelSeal))
				}))
			})
		}
		s := open(t, root)
		if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
			t.Errorf("%+v, %v", found, err)
		}
		if _, err := s.Mounts(t.Context(), "container"); err != nil {
			t.Error(err)
		}
		if err := stop(s); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, stored(t, root)); diff != "" {
			t.Errorf("the store has changed (-before +after):\n%s", diff)
		}
		if b, err := os.ReadFile(format); err != nil || string(b) != layoutVersion+"\n" {
			t.Errorf("format: %q, %v", b, err)
		}
	}
}

// A read error of the disk cannot reach what bolt has mapped: all of it is locked in memory, also when it has grown.
func TestMetadataIsLocked(t *testing.T) {
	needRoot(t)
	if !mayLock() {
		t.Skip("this process may not lock as much memory as it wants")
	}
	s := open(t, t.TempDir())
	locked := func() (mapped, locked int) {
		maps, err := os.ReadFile("/proc/self/smaps")
		if err != nil {
			t.Fatal(err)
		}
		_, text, _ := strings.Cut(string(maps), s.path("metadata.db"))
		for _, f := range []struct {
			name string
			to   *int
		}{{"\nRss:", &mapped}, {"\nLocked:", &locked}} {
			_, after, _ := strings.Cut(text, f.name)
			if _, err := fmt.Sscanf(after, "%d kB", f.to); err != nil {
				t.Fatal(err)
			}
		}
		return mapped, locked
	}
	before, is := locked()
	if is == 0 || is < before {
		t.Errorf("%d of %d kB are locked", is, before)
	}
	err := s.db.update(t.Context(), func(ctx context.Context) error {
		for i := range 500 {
			if _, err := createSnapshot(ctx, snapshots.KindView, fmt.Sprint("view-", i), "",
				map[string]string{"long": strings.Repeat("x", 2000)}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if after, is := locked(); after <= before || is < after {
		t.Errorf("%d of %d kB are locked; before it grew there were %d", is, after, before)
	}
}
