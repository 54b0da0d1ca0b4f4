package layer

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A payload that is too large for memory, and known, leaves nothing in the pack that it was written to.
func TestKnownLargePayloadLeavesNoHole(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	large := strings.Repeat("large", bufferMax/4)
	ingest(t, s, makeTar(t, member{name: "large", data: large}))
	var members []member
	for i := range 300 { // more than wait for the workers
		members = append(members, member{name: fmt.Sprintf("a-%03d", i), data: big(fmt.Sprint(i))})
	}
	members = append(members, member{name: "b-large", data: large}, member{name: "c", data: big("c")})
	ingest(t, s, makeTar(t, members...))
	if st := s.Packs().Stats(); st.Dead != 0 || st.Packs != 2 {
		t.Errorf("%+v", st)
	}
	if u, err := s.Measure(t.Context()); err != nil || u.Bytes-blocksOf(t, s.path(dirLayers)) != s.Used().Bytes {
		t.Errorf("%+v on the disk, %+v counted: %v", u, s.Used(), err)
	}
}

// A tree that was damaged at the start is put back from a backup: nothing has to be pulled, and nothing was removed
// meanwhile.
func TestTreePutBack(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Python)
	tars := [][]byte{makeTar(t, member{name: "a", data: big("a")}), makeTar(t, member{name: "b", data: big("b")})}
	var layers []content.LayerID
	for _, b := range tars {
		layers = append(layers, ingest(t, s, b).Layer)
	}
	path := s.treePath(layers[0])
	whole := readFile(t, path)
	closeStore(t, s)
	writeFile(t, path, whole[:len(whole)/3])
	s = openStore(t, root, content.Python, layers...)
	expectService(t, s, layers, layers[:1], tars)
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, whole)
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("%+v", found)
	}
	expectService(t, s, layers, nil, tars)
}

// Power is cut while packs are merged: the merged pack has its name, but not all of its bytes came to the disk.
func TestPowerCutDuringMerge(t *testing.T) {
	for _, dense := range []bool{false, true} {
		t.Run(fmt.Sprintf("dense packs %v", dense), func(t *testing.T) { cutPowerDuringMerge(t, dense) })
	}
}

// cutPowerDuringMerge has packs be dense, and the merge under a kernel that does not mount these.
func cutPowerDuringMerge(t *testing.T, dense bool) {
	root := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	var saved map[string][]byte
	s := openQuiet(t, root, Options{Dense: dense})
	var layers []content.LayerID
	var tars [][]byte
	for i := range 7 {
		tar := makeTar(t, member{name: "f", data: big(fmt.Sprint(i))})
		layers, tars = append(layers, ingest(t, s, tar).Layer), append(tars, tar)
	}
	closeStore(t, s)
	s = openQuiet(t, root, Options{Step: func(name string) {
		if name != "merge.synced" || saved != nil {
			return
		}
		saved = map[string][]byte{}
		paths, _ := filepath.Glob(filepath.Join(root, dirPacks, "*"))
		for _, path := range paths {
			saved[path] = readFile(t, path)
		}
	}}, layers...)
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(saved) != 8 || s.Packs().Stats().Packs != 1 {
		t.Fatalf("%d packs before the merge was done, %+v after", len(saved), s.Packs().Stats())
	}
	merged, _ := s.objects.Place(content.ObjectID{Sum: sha(big("3"))})
	torn := s.objects.Packs().Path(merged.Pack)
	crash(t, s)
	clear(saved[torn][merged.Offset:][:merged.Size])
	for path, b := range saved {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(root, fileRunning), []byte("another boot"))
	s = openStore(t, root, content.Python, layers...)
	expectService(t, s, layers, nil, tars)
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}

// A process that is killed at any step of storing, removing and merging leaves a store that opens with all that was
// acknowledged, and nothing else.
func TestPacksKilledAtEveryStep(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	root, copies := filepath.Join(t.TempDir(), "root"), t.TempDir()
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	type killed struct {
		at   string
		live map[content.LayerID][]byte
	}
	var kills []killed
	live := map[content.LayerID][]byte{} // acknowledged
	seen := map[string]int{}
	armed := true
	step := func(name string) {
		if !armed || name == "ingest.object" { // it comes from several goroutines, and all is staged by then
			return
		}
		if seen[name]++; !slices.Contains([]int{1, 4, 11}, seen[name]) {
			return
		}
		k := killed{filepath.Join(copies, fmt.Sprintf("%s-%d", name, seen[name])), maps.Clone(live)}
		if out, err := exec.Command("cp", "-a", root, k.at).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		kills = append(kills, k)
	}
	s, err := Open(t.Context(), Options{Root: root, Step: step}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.keeper.stop() // merges are made here, one thing at a time
	ingestAndMerge(t, s, r, live)
	armed = false
	closeStore(t, s)
	for _, name := range []string{
		"pack.sealed", "pack.renamed", "pack.removed", "merge.copied", "merge.synced", "merge.done",
		"ingest.tree", "ingest.synced", "ingest.renamed", "ingest.committed", "ingest.done",
		"remove.tree", "remove.object", "remove.done",
	} {
		if seen[name] == 0 {
			t.Errorf("the work does not come by %s", name)
		}
	}
	for _, k := range kills {
		t.Run(filepath.Base(k.at), func(t *testing.T) {
			var ids []content.LayerID
			var tars [][]byte
			for id, tar := range k.live {
				ids, tars = append(ids, id), append(tars, tar)
			}
			s := openStore(t, k.at, content.Python, ids...)
			expectService(t, s, ids, nil, tars)
			if found := checkStore(t, s); len(found) > 0 {
				t.Errorf("%+v", found)
			}
		})
	}
}

// ingestAndMerge ingests layers that share payloads, removes some, and merges packs. live has the layers there are.
func ingestAndMerge(t *testing.T, s *Store, r *rand.Rand, live map[content.LayerID][]byte) {
	t.Helper()
	large := strings.Repeat("large", bufferMax/4)
	for i := range 60 {
		members := []member{{name: "own", data: big(fmt.Sprint("own", i))}}
		for range r.IntN(4) {
			n := r.IntN(20)
			members = append(members, member{name: fmt.Sprint("shared-", n), data: big(fmt.Sprint(n))})
		}
		if i == 10 || i == 20 {
			members = append(members, member{name: "x-large", data: large})
		}
		tar := makeTar(t, members...)
		in := ingest(t, s, tar)
		live[in.Layer] = tar
		if i%3 == 2 {
			for id := range live {
				delete(live, id)
				s.Release(id)
				s.Wait()
				break
			}
		}
		if i%15 == 14 {
			if err := s.Compact(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}
