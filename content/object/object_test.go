package object

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "objects"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		check(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// check verifies that the directory holds exactly the referenced objects, each whole.
func check(t *testing.T, s *Store) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(s.Dir(), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		id := idOf(b)
		if want := filepath.Join(s.Dir(), id.Path()); p != want {
			t.Errorf("%s has the content of %s", p, want)
		}
		if s.shard(id).refs[id] == 0 {
			t.Errorf("%s has no reference", p)
		}
		n++
		return nil
	})
	if err != nil || n != s.Len() {
		t.Errorf("%d files, %d objects, %v", n, s.Len(), err)
	}
}

func idOf(b []byte) content.ObjectID { return content.ObjectID{Sum: sha256.Sum256(b)} }

func TestPutUnref(t *testing.T) {
	s := open(t)
	data := []byte("payload")
	id := idOf(data)
	for i, want := range []int64{7, 0, 0} {
		if added, err := s.Put(id, data); err != nil || added != want {
			t.Fatalf("put %d added %d, %v", i, added, err)
		}
	}
	path := filepath.Join(s.Dir(), id.Path())
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o400 {
		t.Fatal(fi.Mode(), err)
	}
	if err := s.Unref(id, 2); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Read(id); err != nil || string(got) != "payload" {
		t.Fatal(string(got), err)
	}
	if err := s.Unref(id, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

func TestPutFile(t *testing.T) {
	s := open(t)
	for i, want := range []int64{3, 0} {
		tmp := filepath.Join(filepath.Dir(s.Dir()), fmt.Sprint(i))
		if err := os.WriteFile(tmp, []byte("abc"), 0o400); err != nil {
			t.Fatal(err)
		}
		if added, err := s.PutFile(idOf([]byte("abc")), tmp, 3); err != nil || added != want {
			t.Fatal(added, err)
		}
	}
}

// A file that a crash left behind is never taken for an object.
func TestPutReplacesLeftover(t *testing.T) {
	s := open(t)
	id := idOf([]byte("whole"))
	if err := os.WriteFile(filepath.Join(s.Dir(), id.Path()), []byte("who"), 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(id, []byte("whole")); err != nil {
		t.Fatal(err)
	}
}

func TestSweep(t *testing.T) {
	s := open(t)
	if _, err := s.Put(idOf([]byte("keep")), []byte("keep")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{idOf([]byte("drop")).Path(), "00/junk", "ff/.tmp"} {
		if err := os.WriteFile(filepath.Join(s.Dir(), name), []byte("x"), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := s.Sweep(); err != nil || n != 3 {
		t.Fatal(n, err)
	}
}

// Whatever the order of puts and unrefs of the same objects, none is lost while it has a
// reference, and none stays without.
func TestConcurrent(t *testing.T) {
	s := open(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			held := map[string]int{}
			for range 2000 {
				data := fmt.Sprint("object ", r.IntN(6))
				if held[data] > 0 && r.IntN(2) == 0 {
					if got, err := s.Read(idOf([]byte(data))); err != nil || string(got) != data {
						t.Errorf("held object: %q, %v", got, err)
					}
					if err := s.Unref(idOf([]byte(data)), 1); err != nil {
						t.Error(err)
					}
					held[data]--
					continue
				}
				if _, err := s.Put(idOf([]byte(data)), []byte(data)); err != nil {
					t.Error(err)
				}
				held[data]++
			}
			for data, n := range held {
				if n > 0 && g > 0 {
					if err := s.Unref(idOf([]byte(data)), uint32(n)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}
