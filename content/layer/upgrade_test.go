package layer

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
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// toObjects turns a closed store into one of the layout before packs: a file for each payload.
func toObjects(t testing.TB, root string) (objects int) {
	t.Helper()
	packs, err := filepath.Glob(filepath.Join(root, dirPacks, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 256 {
		if err := os.MkdirAll(filepath.Join(root, dirObjects, fmt.Sprintf("%02x", i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range packs {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p, err := erofs.OpenPack(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range p.Slots {
			if slot.Size == 0 {
				continue
			}
			at := slot.Offset
			if err := os.WriteFile(filepath.Join(root, dirObjects, slot.ID.Path()), data[at:at+slot.Size], 0o400); err != nil {
				t.Fatal(err)
			}
			objects++
		}
	}
	if err := os.RemoveAll(filepath.Join(root, dirPacks)); err != nil {
		t.Fatal(err)
	}
	return objects
}

// largePayload is more than is read whole.
var largePayload = strings.Repeat("large", moveInMemory/4)

// oldStore makes a store of the old layout with three layers, the last two of which share a payload, as a clean stop
// leaves it.
func oldStore(t testing.TB, root string) (layers []content.LayerID, tars [][]byte) {
	t.Helper()
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, root, content.Python)
	tars = [][]byte{
		makeTar(t, member{name: "a", data: big("a")}, member{name: "large", data: largePayload},
			member{name: "t", data: "tiny"}),
		makeTar(t, member{name: "b", data: big("b")}, member{name: "b2", data: big("b2")},
			member{name: "s", data: big("shared")}),
		makeTar(t, member{name: "c", data: big("c")}, member{name: "s", data: big("shared")}),
	}
	for _, b := range tars {
		layers = append(layers, ingest(t, s, b).Layer)
	}
	closeStore(t, s)
	if n := toObjects(t, root); n != 6 {
		t.Fatalf("the old store has %d objects", n)
	}
	return layers, tars
}

// expectUsed compares what is counted with what is there.
func expectUsed(t *testing.T, s *Store) {
	t.Helper()
	u, err := s.Measure(t.Context())
	trees := blocksOf(t, s.path(dirLayers))
	if err != nil {
		t.Fatal(err)
	}
	u.Inodes, u.Bytes = u.Inodes-1, u.Bytes-trees // the directory of trees is not counted
	if u != s.Used() {
		t.Errorf("%+v on the disk, %+v counted", u, s.Used())
	}
}

// blocksOf is what a directory itself occupies: none on tmpfs.
func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func objectFiles(t testing.TB, root string) (ids []content.ObjectID) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(root, dirObjects, "??", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		sum, err := content.ParseSum(filepath.Base(filepath.Dir(p)) + filepath.Base(p))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, content.ObjectID{Sum: sum})
	}
	return ids
}

// A store of the old layout opens as one of packs: nothing is lost, nothing stays behind, whatever else lies in
// objects/.
func TestUpgrade(t *testing.T) {
	for _, row := range []struct {
		name  string
		batch int64
		live  []int // layers that snapshots name; all when nil
		alter func(t *testing.T, root string)
		packs int // at least; payloads are read several at a time
	}{
		{name: "one batch", packs: 1},
		{name: "batches of two payloads", batch: 2 * int64(len(big("a"))), packs: 4},
		{name: "one at a time", batch: 1, packs: 6},
		{name: "a layer that nothing names", live: []int{1}, packs: 1},
		{name: "leftovers of a crash", packs: 1, alter: func(t *testing.T, root string) {
			unnamed := "00/" + strings.Repeat("2", 62)
			for _, name := range []string{"00/new-" + strings.Repeat("1", 62), unnamed, "01/strange", "file"} {
				if err := os.WriteFile(filepath.Join(root, dirObjects, name), []byte(name), 0o400); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(filepath.Join(root, dirObjects, "02", strings.Repeat("3", 62)), 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "no clean stop", packs: 1, alter: func(t *testing.T, root string) {
			if err := os.Remove(filepath.Join(root, fileClean)); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(root, fileRunning), []byte("another boot"))
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := t.TempDir()
			layers, tars := oldStore(t, root)
			if row.alter != nil {
				row.alter(t, root)
			}
			live := layers
			if row.live != nil {
				live = nil
				for _, i := range row.live {
					live = append(live, layers[i])
				}
			}
			s := openMoving(t, root, row.batch, Options{}, live...)
			if _, err := os.Stat(filepath.Join(root, dirObjects)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("objects/ is still there: %v", err)
			}
			if st := s.Packs().Stats(); st.Packs < row.packs || row.packs == 1 && st.Packs > 1 || st.Dead != 0 {
				t.Errorf("%+v, want %d packs", st, row.packs)
			}
			expectUsed(t, s)
			if row.live == nil {
				expectService(t, s, layers, nil, tars)
			}
			if found := checkStore(t, s); len(found) > 0 {
				t.Errorf("%+v", found)
			}
			closeStore(t, s)
			again := openStore(t, root, content.Python, live...)
			if found := checkStore(t, again); len(found) > 0 {
				t.Errorf("after a restart: %+v", found)
			}
		})
	}
}

// openMoving is openStore with batches of another size.
func openMoving(t testing.TB, root string, batch int64, opts Options, live ...content.LayerID) *Store {
	t.Helper()
	opts.Root, opts.moveBatch = root, batch
	s, err := Open(t.Context(), opts, live)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

// What a batch holds is a layer's files as they lie in its tree, not in the order of their names in objects/.
func TestUpgradeKeepsOrder(t *testing.T) {
	root := t.TempDir()
	var members []member
	for i := range 200 {
		members = append(members, member{name: fmt.Sprintf("f-%03d", i), data: big(fmt.Sprint(i))})
	}
	s := openStore(t, root, content.Python)
	in := ingest(t, s, makeTar(t, members...))
	closeStore(t, s)
	toObjects(t, root)
	s = openStore(t, root, content.Python, in.Layer)
	far := 0
	for i, m := range members {
		place, ok := s.objects.Place(content.ObjectID{Sum: sha(m.data)})
		if !ok {
			t.Fatal(m.name)
		}
		if off := int(place.N) - i; off > 2*moveWorkers || off < -2*moveWorkers {
			far++
		}
	}
	if far > len(members)/4 { // some reader may have had to wait
		t.Errorf("%d of %d payloads lie far from their neighbours", far, len(members))
	}
}

// A payload that is damaged before the upgrade takes its layers out of service, and no others; it is written anew by a
// pull.
func TestUpgradeOfDamaged(t *testing.T) {
	for how, harm := range damages {
		for _, payload := range []string{big("shared"), largePayload} {
			if payload == largePayload && how != "flipped" && how != "truncated" {
				continue // as the small one
			}
			t.Run(fmt.Sprintf("%s/%d", how, len(payload)), func(t *testing.T) {
				root := t.TempDir()
				layers, tars := oldStore(t, root)
				id := content.ObjectID{Sum: sha(payload)}
				other := content.ObjectID{Sum: sha(big("a"))}
				harm(t, filepath.Join(root, dirObjects, id.Path()), filepath.Join(root, dirObjects, other.Path()))
				s := openStore(t, root, content.Python, layers...)
				harmed := []content.LayerID{layers[1], layers[2]}
				if len(payload) > len(big("shared")) {
					harmed = []content.LayerID{layers[0]}
				}
				expectService(t, s, layers, harmed, tars)
				s = reopen(t, s, root, layers...)
				expectService(t, s, layers, harmed, tars)
				for _, b := range tars {
					s.Release(ingest(t, s, b).Layer)
				}
				expectService(t, s, layers, nil, tars)
				s = reopen(t, s, root, layers...)
				if files := objectFiles(t, root); len(files) > 0 {
					t.Errorf("left: %v", files)
				}
				expectService(t, s, layers, nil, tars)
			})
		}
	}
}

// A tree that cannot be read names nobody knows what: its objects wait for it.
func TestUpgradeWithDamagedTree(t *testing.T) {
	root := t.TempDir()
	layers, tars := oldStore(t, root)
	path := filepath.Join(root, dirLayers, layers[0].Hex())
	whole := readFile(t, path)
	writeFile(t, path, whole[:10])
	s := openStore(t, root, content.Python, layers...)
	expectService(t, s, layers, layers[:1], tars)
	if files := objectFiles(t, root); len(files) != 2 {
		t.Errorf("%d objects wait, want the two of the damaged tree", len(files))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.rootFd = -1
	writeFile(t, path, whole)
	s = openStore(t, root, content.Python, layers...)
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("%+v", found)
	}
	expectService(t, s, layers, nil, tars)
	if files := objectFiles(t, root); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

// Wherever the upgrade is killed, the next start goes on with it.
func TestUpgradeKilledAtEveryStep(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	layers, tars := oldStore(t, root)
	copies := t.TempDir()
	seen := map[string]int{}
	armed := true
	step := func(name string) {
		if !armed {
			return
		}
		seen[name]++
		at := filepath.Join(copies, fmt.Sprintf("%s-%d", name, seen[name]))
		if out, err := exec.Command("cp", "-a", root, at).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	s := openMoving(t, root, 2*int64(len(big("a"))), Options{Step: step}, layers...)
	armed = false
	closeStore(t, s)
	for _, name := range []string{"pack.sealed", "pack.renamed", "upgrade.synced", "upgrade.unlinked", "upgrade.done"} {
		if seen[name] == 0 {
			t.Errorf("the upgrade does not come by %s", name)
		}
	}
	for name, n := range seen {
		at := []int{1, (n + 1) / 2, n}
		for i, k := range slices.Compact(at) {
			t.Run(fmt.Sprintf("%s/%d of %d", name, k, n), func(t *testing.T) {
				at := filepath.Join(copies, fmt.Sprintf("%s-%d", name, k))
				if i%2 == 0 {
					tear(t, at)
				}
				s := openStore(t, at, content.Python, layers...)
				expectService(t, s, layers, nil, tars)
				if found := checkStore(t, s); len(found) > 0 {
					t.Errorf("%+v", found)
				}
				if files := objectFiles(t, at); len(files) > 0 {
					t.Errorf("left: %v", files)
				}
				expectUsed(t, s)
			})
		}
	}
}

// tear does to payloads in packs what a power cut may before the sync: one that still is in objects/ may be anything in
// its pack.
func tear(t *testing.T, root string) {
	t.Helper()
	left := objectFiles(t, root)
	packs, _ := filepath.Glob(filepath.Join(root, dirPacks, "*"))
	for _, path := range packs {
		data := readFile(t, path)
		p, err := erofs.OpenPack(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range p.Slots {
			if slices.Contains(left, slot.ID) {
				clear(data[slot.Offset:][:slot.Size])
			}
		}
		writeFile(t, path, data)
	}
	writeFile(t, filepath.Join(root, fileRunning), []byte("another boot"))
}

// What overlays from before the upgrade may look up stays in objects/ until these are gone, and no longer than their
// snapshots.
func TestUpgradeUnderMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts an overlay")
	}
	root := filepath.Join(t.TempDir(), "a root")
	layers, tars := oldStore(t, root)
	merged, below := t.TempDir(), t.TempDir()
	// As containers have it, but for the chain image.
	options := "lowerdir=" + below + ":" + filepath.Join(root, dirObjects)
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, options); err != nil {
		t.Skipf("mount an overlay: %v", err)
	}
	unmount := func() { _ = unix.Unmount(merged, 0) }
	t.Cleanup(unmount)
	mounted := []content.LayerID{layers[1], layers[2]}
	open := func() *Store {
		ask := func(context.Context) ([]content.LayerID, bool, error) { return mounted, true, nil }
		return openMoving(t, root, 0, Options{Mounted: ask}, layers...)
	}
	expectLeft := func(s *Store, want ...string) {
		t.Helper()
		var ids []content.ObjectID
		for _, data := range want {
			ids = append(ids, content.ObjectID{Sum: sha(data)})
		}
		left := objectFiles(t, root)
		for _, id := range ids {
			if !slices.Contains(left, id) {
				t.Errorf("object %s is gone", id)
			}
		}
		if len(left) != len(ids) {
			t.Errorf("%d objects are left, want %d", len(left), len(ids))
		}
		expectService(t, s, layers, nil, tars)
		expectUsed(t, s)
	}
	s := open()
	expectLeft(s, big("b"), big("b2"), big("shared"), big("c"))
	if b, err := os.ReadFile(filepath.Join(merged, content.ObjectID{Sum: sha(big("b"))}.Path())); err != nil ||
		string(b) != big("b") {
		t.Errorf("read through the old mount: %v", err)
	}
	closeStore(t, s)
	s = open() // a restart changes nothing
	expectLeft(s, big("b"), big("b2"), big("shared"), big("c"))
	mounted = mounted[1:] // the container that had the other has gone
	s.moveRest(t.Context())
	expectLeft(s, big("shared"), big("c"))
	unmount()
	// Whatever else starts containers on this machine may just have copied the mount into a namespace of its own.
	for end := time.Now().Add(time.Minute); len(objectFiles(t, root)) > 0 && time.Now().Before(end); {
		s.moveRest(t.Context())
		time.Sleep(10 * time.Millisecond)
	}
	expectLeft(s)
	if _, err := os.Stat(filepath.Join(root, dirObjects)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("objects/ is still there: %v", err)
	}
}

// A mount in another mount namespace counts, and after a reboot none does.
func TestUpgradeSeesOtherNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts an overlay")
	}
	root := t.TempDir()
	layers, _ := oldStore(t, root)
	merged, below := t.TempDir(), t.TempDir()
	script := fmt.Sprintf("mount -t overlay overlay -o ro,lowerdir=%s:%s %s && echo mounted && exec sleep 60",
		below, filepath.Join(root, dirObjects), merged)
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("unshare: %v", err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if n, err := out.Read(make([]byte, 100)); err != nil || n == 0 {
		t.Skipf("mount in a namespace: %v", err)
	}
	s := openStore(t, root, content.Python, layers...)
	if left := objectFiles(t, root); len(left) != 6 {
		t.Errorf("%d objects are left under a mount, want all", len(left))
	}
	closeStore(t, s)
	mark := filepath.Join(root, dirObjects, fileBoot)
	writeFile(t, mark, bytes.Repeat([]byte("0"), len(readFile(t, mark))))
	openStore(t, root, content.Python, layers...)
	if left := objectFiles(t, root); len(left) != 0 {
		t.Errorf("%d objects are left after a reboot", len(left))
	}
}

func TestMountsOver(t *testing.T) {
	const line = `36 35 98:0 / /run/x rw,relatime shared:1 master:2 - %s overlay ro,%s` + "\n"
	for _, row := range []struct {
		name, kind, options string
		want                bool
	}{
		{"last option", "overlay", "lowerdir=/run/c/1::/var/lib/d/objects", true},
		{"before others", "overlay", "xino=on,lowerdir=/run/c/1::/var/lib/d/objects,upperdir=/u,workdir=/w", true},
		{"datadir+", "overlay", "lowerdir+=/run/c/1,datadir+=/var/lib/d/objects", true},
		{"another root", "overlay", "lowerdir=/run/c/1::/var/lib/d/objects2", false},
		{"another root and this one", "overlay", "lowerdir=/run/c/1:/var/lib/d/objects2:/var/lib/d/objects", true},
		{"no overlay", "ext4", "lowerdir=/run/c/1::/var/lib/d/objects", false},
		{"empty", "overlay", "", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			info := "junk\n" + fmt.Sprintf(line, row.kind, row.options)
			if got := mountsOver(info, "/var/lib/d/objects"); got != row.want {
				t.Error(got)
			}
		})
	}
	if got := mountsOver(fmt.Sprintf(line, "overlay", `lowerdir=/c::/a\040b\134c/objects`), `/a b\c/objects`); !got {
		t.Error("escaped path is not seen")
	}
}

// An upgrade needs room for one batch. What does not fit is out of service until there is room, and comes back without
// a restart.
func TestUpgradeOnFullDisk(t *testing.T) {
	at := smallDisk(t, 6000)
	root := filepath.Join(at, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	noise := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		return string(b)
	}
	s := openStore(t, root, content.Python)
	var layers []content.LayerID
	var tars [][]byte
	for range 4 {
		tar := makeTar(t, member{name: "f", data: noise(2 << 20)}, member{name: "g", data: noise(50_000)})
		layers, tars = append(layers, ingest(t, s, tar).Layer), append(tars, tar)
	}
	closeStore(t, s)
	toObjects(t, root)
	filler := filepath.Join(at, "filler")
	fill := func(leave int64) {
		t.Helper()
		var st unix.Statfs_t
		if err := unix.Statfs(at, &st); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filler, make([]byte, int64(st.Bavail)*st.Bsize-leave), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fill(3 << 20) // one payload at a time goes
	s = openStore(t, root, content.Python, layers...)
	expectService(t, s, layers, nil, tars)
	closeStore(t, s)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	toObjects(t, root)
	fill(64 << 10)
	s = openStore(t, root, content.Python, layers...)
	if st := s.Packs().Stats(); st.Live > 4*64<<10 {
		t.Errorf("%+v fits into 64 KiB", st)
	}
	expectService(t, s, layers, layers, tars)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	s.moveRest(t.Context())
	expectService(t, s, layers, nil, tars)
	if left := objectFiles(t, root); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
