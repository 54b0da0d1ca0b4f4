package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// again makes a blob of its recipe.
func again(t *testing.T, s *Store, blob []byte) error {
	t.Helper()
	var out bytes.Buffer
	err := WriteBlob(t.Context(), s, blobOf(blob).Digest, &out)
	if err == nil && !bytes.Equal(out.Bytes(), blob) {
		t.Error("another blob was made")
	}
	return err
}

// Blobs of every fidelity are made again, also after a restart, as long as their layer is whole, and no longer.
func TestRecipes(t *testing.T) {
	for _, fidelity := range []content.Fidelity{content.Exact, content.Python, content.Normalized} {
		t.Run(string(fidelity), func(t *testing.T) {
			root := t.TempDir()
			s := openStore(t, root, fidelity)
			plain, other := pythonLayer(t, 1_700_000_000, 0), pythonLayer(t, 1_700_009_999, 5)
			var ids []content.LayerID
			blobs := [][]byte{compress(t, plain, 6), compress(t, other, 1), other}
			for i, data := range [][]byte{plain, other, other} {
				in := ingest(t, s, blobs[i])
				ids = append(ids, in.Layer)
				if err := MakeRecipe(t.Context(), s, diffIDOf(data), blobOf(blobs[i])); err != nil {
					t.Fatal(err)
				}
			}
			if u := s.RecipeUsage(); u.Inodes != 3 || u.Bytes != 3*content.BlockSize {
				t.Errorf("recipes occupy %+v", u)
			}
			measured, err := s.Measure(t.Context())
			if used := s.Used(); err != nil || measured.Inodes-used.Inodes > 4 {
				t.Errorf("measured %+v, counted %+v, %v", measured, used, err)
			}
			for _, b := range blobs {
				if err := again(t, s, b); err != nil {
					t.Error(err)
				}
			}
			s = reopen(t, s, root, ids...)
			for _, b := range blobs {
				if err := again(t, s, b); err != nil {
					t.Error(err)
				}
			}
			if st := s.RecipeStats(); st.Followed != 3 || st.Made != 0 {
				t.Errorf("%+v", st)
			}
			for _, id := range ids {
				s.Release(id)
			}
			s.Wait()
			if err := again(t, s, blobs[0]); !errors.Is(err, ErrNoRecipe) {
				t.Errorf("of a layer that has gone: %v", err)
			}
			expectRecipes(t, s, 0)
		})
	}
}

func expectRecipes(t *testing.T, s *Store, want int) {
	t.Helper()
	left, err := os.ReadDir(s.path(dirRecipes))
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) != want {
		t.Errorf("%d recipes are left, want %d; %v", len(left), want, err)
	}
	if u := s.RecipeUsage(); u.Inodes != int64(want) {
		t.Errorf("recipes occupy %+v", u)
	}
}

// A blob that no encoder makes has no recipe, nor has one of a layer that is damaged.
func TestNoRecipe(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	data := makeTar(t, member{name: "a", data: big("a")}, member{name: "b", data: big("b")})
	halves := append(compress(t, data[:3000], 6), compress(t, data[3000:], 6)...) // as estargz has them
	in := ingest(t, s, halves)
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(halves)); !errors.Is(err, recipe.ErrNoEncoder) {
		t.Errorf("of two gzip members: %v", err)
	}
	blob := compress(t, data, 6)
	if err := MakeRecipe(t.Context(), s, diffIDOf(blob), blobOf(blob)); err == nil {
		t.Error("of a layer that is not here")
	}
	other := compress(t, makeTar(t, member{name: "a", data: big("x")}), 6)
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(other)); err == nil {
		t.Error("of another layer's blob")
	}
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(blob)); err != nil {
		t.Fatal(err)
	}
	harmPayload(t, s, big("a"), "flipped", "")
	if err := again(t, s, blob); !errors.Is(err, recipe.ErrOtherBytes) {
		t.Errorf("of a layer that is damaged, which nobody knows yet: %v", err)
	}
	checkStore(t, s)
	if err := again(t, s, blob); !errors.Is(err, ErrNoRecipe) {
		t.Errorf("of a layer that is damaged: %v", err)
	}
	best := compress(t, data, 9)
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(best)); err == nil {
		t.Error("a recipe of a layer that is damaged")
	}
	if err := s.Repair(t.Context(), in.Layer, blobOf(blob)); err != nil {
		t.Fatal(err)
	}
	if err := again(t, s, blob); err != nil {
		t.Errorf("of a layer that was repaired: %v", err)
	}
}

// What is in the directory and is no recipe of a layer goes at Open; a recipe that is damaged goes when it is used.
func TestStrayRecipes(t *testing.T) {
	root := t.TempDir()
	s := openStore(t, root, content.Python)
	data := makeTar(t, member{name: "a", data: big("a")})
	blob := compress(t, data, 6)
	in := ingest(t, s, blob)
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(blob)); err != nil {
		t.Fatal(err)
	}
	good := s.recipePath(diffIDOf(blob).Sum, in.Layer)
	for _, name := range []string{"any", recipeName(diffIDOf(blob).Sum, content.LayerID{Sum: diffIDOf(blob).Sum})} {
		if err := os.WriteFile(s.path(dirRecipes, name), readFile(t, good), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if found := checkStore(t, s); len(found) != 2 || found[0].Kind != Orphan || found[1].Kind != Orphan {
		t.Errorf("found %+v", found)
	}
	s = reopen(t, s, root, in.Layer)
	expectRecipes(t, s, 1)
	flip(t, good, 40)
	if err := again(t, s, blob); !errors.Is(err, recipe.ErrDamaged) {
		t.Errorf("%v", err)
	}
	expectRecipes(t, s, 0)
	if err := WriteBlob(t.Context(), s, "sha512:00", io.Discard); !errors.Is(err, ErrNoRecipe) {
		t.Errorf("%v", err)
	}
}

// A layer whose members were replaced keeps what it can.
func TestRecipeOfReplacedMembers(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Python)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, text := range []string{big("first"), big("second")} {
		if err := w.WriteHeader(&tar.Header{Name: "f", Mode: 0o600, Size: int64(len(text))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	blob := compress(t, buf.Bytes(), 6)
	in := ingest(t, s, blob)
	if err := MakeRecipe(t.Context(), s, in.DiffID, blobOf(blob)); err != nil {
		t.Fatal(err)
	}
	if err := again(t, s, blob); err != nil {
		t.Error(err)
	}
}
