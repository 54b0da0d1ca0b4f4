package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// damages are what can happen to a file.
var damages = map[string]func(t *testing.T, path, other string){
	"flipped": func(t *testing.T, path, _ string) {
		b := readFile(t, path)
		b[len(b)/2] ^= 0x10
		writeFile(t, path, b)
	},
	"truncated": func(t *testing.T, path, _ string) { writeFile(t, path, readFile(t, path)[:len(readFile(t, path))/2]) },
	"empty":     func(t *testing.T, path, _ string) { writeFile(t, path, nil) },
	"grown":     func(t *testing.T, path, _ string) { writeFile(t, path, append(readFile(t, path), 'x')) },
	"deleted": func(t *testing.T, path, _ string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	},
	"swapped": func(t *testing.T, path, other string) { writeFile(t, path, readFile(t, other)) },
	"directory": func(t *testing.T, path, _ string) {
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o755)); err != nil {
			t.Fatal(err)
		}
	},
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// writeFile changes a file in place, though objects are read-only for all but root.
func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func checkStore(t *testing.T, s *Store) []Finding {
	t.Helper()
	var last, total int64
	found, err := s.Check(t.Context(), func(done, of int64) {
		if done < last || done > of {
			t.Errorf("progress goes from %d to %d of %d", last, done, of)
		}
		last, total = done, of
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = total
	return found
}

// payloadDamages are what can happen to a payload in a pack. b is the payload's bytes on the disk, up to the end of its
// last block.
var payloadDamages = map[string]func(b, other []byte){
	"flipped": func(b, _ []byte) { b[len(b)/2] ^= 0x10 },
	"hole":    func(b, _ []byte) { clear(b) },
	"swapped": func(b, other []byte) { copy(b, other) },
}

// harmPayload changes an object's bytes where they lie.
func harmPayload(t *testing.T, s *Store, data, how, other string) (path string) {
	t.Helper()
	place, ok := s.objects.Place(content.ObjectID{Sum: sha(data)})
	if !ok {
		t.Fatal("no place")
	}
	path = s.objects.Packs().Path(place.Pack)
	b := readFile(t, path)
	at := place.Offset
	payloadDamages[how](b[at:at+place.Size], []byte(other))
	writeFile(t, path, b)
	return path
}

// Two layers share an object, and a third has nothing to do with it. Whatever happens to a payload or to a tree, Check
// finds it and names the right layers; these are out of service, also after a restart, until a blob is ingested again.
func TestDamage(t *testing.T) {
	shared := member{name: "shared", data: big("shared")}
	tars := [][]byte{
		makeTar(t, shared, member{name: "one", data: big("one")}),
		makeTar(t, shared, member{name: "two", data: big("two")}),
		makeTar(t, member{name: "three", data: big("three")}),
	}
	run := func(name, how string, harmed int, kind FindingKind, harm func(t *testing.T, s *Store,
		ids []content.LayerID) string) {
		t.Run(name+" "+how, func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root, content.Python)
			var ids []content.LayerID
			for _, b := range tars {
				ids = append(ids, ingest(t, s, b).Layer)
			}
			path, harmed := harm(t, s, ids), ids[:harmed]
			found := checkStore(t, s)
			if len(found) != 1 || found[0].Kind != kind || found[0].Path != path {
				t.Fatalf("found %+v", found)
			}
			want := slices.Clone(harmed)
			slices.SortFunc(want, func(a, b content.LayerID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) })
			if !slices.Equal(found[0].Layers, want) {
				t.Errorf("%v are harmed, want %v", found[0].Layers, want)
			}
			expectService(t, s, ids, harmed, tars)
			if how == "restart and repair" {
				s = reopen(t, s, root, ids...)
				expectService(t, s, ids, harmed, tars)
			}
			switch how {
			case "pull":
				s.Release(ingest(t, s, tars[0]).Layer)
			case "other layer":
				s.Release(ingest(t, s, makeTar(t, shared)).Layer)
				s.Wait()
			default:
				if err := s.Repair(t.Context(), ids[0], blobOf(tars[2])); !errors.Is(err, errOtherLayer) {
					t.Errorf("a blob of another layer: %v", err)
				}
				if err := s.Repair(t.Context(), ids[0], blobOf(compress(t, tars[0], 9))); err != nil {
					t.Fatal(err)
				}
			}
			expectHealed(t, s, root, ids, tars)
		})
	}
	for _, how := range []string{"repair", "pull", "other layer", "restart and repair"} {
		for name := range payloadDamages {
			run("payload "+name, how, 2, DamagedObject, func(t *testing.T, s *Store, _ []content.LayerID) string {
				return harmPayload(t, s, shared.data, name, big("three"))
			})
		}
		for name, damage := range damages {
			if how == "other layer" {
				continue
			}
			run("tree "+name, how, 1, DamagedTree, func(t *testing.T, s *Store, ids []content.LayerID) string {
				damage(t, s.treePath(ids[0]), s.treePath(ids[1]))
				return s.treePath(ids[0])
			})
		}
	}
}

// expectHealed checks that nothing is damaged any more, now and after a restart.
func expectHealed(t *testing.T, s *Store, root string, ids []content.LayerID, tars [][]byte) {
	t.Helper()
	expectService(t, s, ids, nil, tars)
	if err := s.Compact(t.Context()); err != nil {
		t.Error(err)
	}
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("after the repair: %+v", found)
	}
	if _, err := os.Stat(filepath.Join(root, fileDamaged)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the list of what is damaged: %v", err)
	}
	s = reopen(t, s, root, ids...)
	expectService(t, s, ids, nil, tars)
}

// Whatever happens to the file of a pack, Check finds it, what it takes with it is out of service and comes back by
// a pull, now or after a restart, and the payloads that are whole are still served.
func TestDamagedPack(t *testing.T) {
	tars := [][]byte{
		makeTar(t, member{name: "first", data: big("first")}, member{name: "last", data: big("last")}),
		makeTar(t, member{name: "other", data: big("other")}),
	}
	type damage struct {
		harm  func(t *testing.T, path, other string)
		harms bool // the layer, and not only what the pack says of itself
		lost  bool // at a restart, which cannot tell what the pack holds
	}
	all := map[string]damage{
		"superblock": {func(t *testing.T, path, _ string) { flip(t, path, 1024+40) }, false, true},
		"table":      {func(t *testing.T, path, _ string) { flip(t, path, -300) }, false, true},
		"trailer":    {func(t *testing.T, path, _ string) { flip(t, path, -20) }, false, true},
		"grown":      {damages["grown"], false, true},
		"cut": {func(t *testing.T, path, _ string) {
			writeFile(t, path, readFile(t, path)[:2*content.BlockSize])
		}, true, true},
		"empty":     {damages["empty"], true, true},
		"deleted":   {damages["deleted"], true, true},
		"swapped":   {damages["swapped"], true, true},
		"directory": {damages["directory"], true, true},
	}
	for name, d := range all {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, restart %v", name, restart), func(t *testing.T) {
				root := t.TempDir()
				s := openStore(t, root, content.Python)
				ids := []content.LayerID{ingest(t, s, tars[0]).Layer, ingest(t, s, tars[1]).Layer}
				pathOf := func(data string) string {
					place, _ := s.objects.Place(content.ObjectID{Sum: sha(data)})
					return s.objects.Packs().Path(place.Pack)
				}
				d.harm(t, pathOf(big("first")), pathOf(big("other")))
				if restart {
					s = reopen(t, s, root, ids...)
				} else if found := checkStore(t, s); !slices.ContainsFunc(found, func(f Finding) bool {
					return f.Kind == DamagedPack
				}) {
					t.Errorf("found %+v", found)
				}
				if d.harms || restart && d.lost {
					expectService(t, s, ids, ids[:1], tars)
					s.Release(ingest(t, s, tars[0]).Layer)
				}
				if _, err := s.RemoveOrphans(t.Context()); err != nil { // what could not be read at the start
					t.Error(err)
				}
				expectHealed(t, s, root, ids, tars)
			})
		}
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	b := readFile(t, path)
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 1
	writeFile(t, path, b)
}

func sha(data string) content.Sum { return content.Sum(diffIDOf([]byte(data)).Sum) }

// reopen is a clean stop and a start.
func reopen(t *testing.T, s *Store, root string, live ...content.LayerID) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.rootFd = -1
	return openStore(t, root, content.Python, live...)
}

// expectService checks that exactly the harmed layers are out of service.
func expectService(t *testing.T, s *Store, ids, harmed []content.LayerID, tars [][]byte) {
	t.Helper()
	for i, id := range ids {
		bad := slices.Contains(harmed, id)
		if err := s.InService(id); errors.Is(err, ErrDamaged) != bad {
			t.Errorf("layer %d: %v", i, err)
		}
		got, ok := s.Lookup(diffIDOf(tars[i]))
		if ok == bad {
			t.Errorf("layer %d is found: %v", i, ok)
		}
		if ok {
			s.Release(got)
		}
	}
}

// An object that somebody removed is missed at the next start after a crash, without reading any other.
func TestMissingObjectIsFoundAfterCrash(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Python)
	a, b := ingest(t, s, makeTar(t, member{name: "a", data: big("a")})),
		ingest(t, s, makeTar(t, member{name: "b", data: big("b")}))
	gone, _ := s.objects.Place(content.ObjectID{Sum: sha(big("a"))})
	crash(t, s)
	if err := os.Remove(s.objects.Packs().Path(gone.Pack)); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, root, content.Python, a.Layer, b.Layer)
	if err := s.InService(a.Layer); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if err := s.InService(b.Layer); err != nil {
		t.Error(err)
	}
	s.Release(ingest(t, s, makeTar(t, member{name: "a", data: big("a")})).Layer)
	if err := s.InService(a.Layer); err != nil {
		t.Error(err)
	}
}

// crash leaves a store as a killed process would.
func crash(t *testing.T, s *Store) {
	t.Helper()
	s.flights.wait()
	s.keeper.stop()
	s.gc.Wait()
	s.written.stop()
	s.closeFiles()
	s.rootFd = -1
}

// After a reboot without a clean stop, what came in right before is read again before it is served.
func TestLastLayersAreVerifiedAfterReboot(t *testing.T) {
	for _, d := range []Durability{Strict, Deferred} {
		t.Run(string(d), func(t *testing.T) {
			root := t.TempDir()
			s, err := Open(t.Context(), Options{Root: root, Durability: d}, nil)
			if err != nil {
				t.Fatal(err)
			}
			old, last := ingest(t, s, makeTar(t, member{name: "old", data: big("old")})),
				ingest(t, s, makeTar(t, member{name: "last", data: big("last")}))
			long := time.Now().Add(-time.Hour)
			if err := os.Chtimes(s.treePath(old.Layer), long, long); err != nil {
				t.Fatal(err)
			}
			harmPayload(t, s, big("last"), "flipped", "")
			crash(t, s)
			writeFile(t, filepath.Join(root, fileRunning), []byte("another boot"))
			s = openStore(t, root, content.Python, old.Layer, last.Layer)
			if err := s.InService(last.Layer); !errors.Is(err, ErrDamaged) {
				t.Error(err)
			}
			if err := s.InService(old.Layer); err != nil {
				t.Error(err)
			}
			s.Release(ingest(t, s, makeTar(t, member{name: "last", data: big("last")})).Layer)
		})
	}
}

// A damaged layer that nobody repairs can be removed, and what only it named goes at the next start.
func TestDamagedLayerIsRemoved(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %v", restart), func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root, content.Python)
			in := ingest(t, s, makeTar(t, member{name: "a", data: big("a")}))
			damages["truncated"](t, s.treePath(in.Layer), "")
			checkStore(t, s)
			if restart {
				s = reopen(t, s, root, in.Layer)
			}
			s.Release(in.Layer)
			s.Wait()
			if n := len(s.List()); n != 0 {
				t.Errorf("%d layers", n)
			}
			if restart {
				if found, err := s.RemoveOrphans(t.Context()); err != nil || len(found) != 1 {
					t.Errorf("orphans: %+v, %v", found, err)
				}
			}
			s = reopenUnchecked(t, s, root)
			if n := s.Objects(); n != 0 {
				t.Errorf("%d objects", n)
			}
			if found, err := s.Orphans(t.Context()); err != nil || len(found) > 0 {
				t.Errorf("orphans: %+v, %v", found, err)
			}
		})
	}
}

// reopenUnchecked is reopen for a store that still has what the next start removes.
func reopenUnchecked(t *testing.T, s *Store, root string) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.rootFd = -1
	return openStore(t, root, content.Python)
}

// A tree that turns out to be damaged when a chain is merged is out of service as well.
func TestMergeFindsDamage(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	b := makeTar(t, member{name: "a", data: "a"}, member{name: "b", data: "b"})
	in := ingest(t, s, b)
	damages["flipped"](t, s.treePath(in.Layer), "")
	if _, err := s.Merge(t.Context(), []content.LayerID{in.Layer}); !errors.Is(err, tree.ErrDamaged) {
		t.Errorf("merge: %v", err)
	}
	expectService(t, s, []content.LayerID{in.Layer}, []content.LayerID{in.Layer}, [][]byte{b})
	s.Release(ingest(t, s, b).Layer)
	if _, err := s.Merge(t.Context(), []content.LayerID{in.Layer}); err != nil {
		t.Errorf("merge: %v", err)
	}
}

func TestOrphans(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	ingest(t, s, makeTar(t, member{name: "a", data: big("a")}))
	o := content.ObjectID{Sum: sha("nobody")}
	stray := []string{
		s.objects.Packs().Path(1), // a pack that cannot be read, while nothing is missing
		filepath.Join(s.objects.Packs().Dir(), "stranger"),
		s.path(dirLayers, o.Hex()),
	}
	for _, path := range stray {
		if err := os.WriteFile(path, []byte("nobody"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(stray)
	for _, find := range []func() ([]Finding, error){
		func() ([]Finding, error) { return s.Orphans(t.Context()) },
		func() ([]Finding, error) { return s.RemoveOrphans(t.Context()) },
	} {
		found, err := find()
		if err != nil {
			t.Fatal(err)
		}
		var paths []string
		for _, f := range found {
			paths = append(paths, f.Path)
			if f.Kind != Orphan || f.Bytes != content.BlockSize {
				t.Errorf("%+v", f)
			}
		}
		slices.Sort(paths)
		if !slices.Equal(paths, stray) {
			t.Errorf("found %q, want %q", paths, stray)
		}
	}
	if found := checkStore(t, s); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}
