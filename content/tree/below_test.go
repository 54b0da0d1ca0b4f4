package tree

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// treeFiles writes tree files into a directory, and names them.
type treeFiles string

func (dir treeFiles) path(id content.LayerID) string { return filepath.Join(string(dir), id.Hex()) }

func (dir treeFiles) write(t *testing.T, entries []*content.Entry) content.LayerID {
	t.Helper()
	enc := Encode(content.Python, entries)
	file, err := enc.Marshal(Facts{})
	if err == nil {
		err = os.WriteFile(dir.path(enc.ID), file, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return enc.ID
}

// check is CheckLinks for the last of layers.
func (dir treeFiles) check(t *testing.T, layers [][]*content.Entry) error {
	t.Helper()
	var ids []content.LayerID
	for _, l := range layers {
		ids = append(ids, dir.write(t, l))
	}
	slices.Reverse(ids)
	links, err := Links(dir.path(ids[0]), ids[0])
	if err != nil {
		t.Fatal(err)
	}
	return CheckLinks(t.Context(), links, ids[1:], dir.path)
}

func link(path, target string) *content.Entry {
	return &content.Entry{Path: path, Kind: content.Symlink, Target: target, Mtime: content.Time{Sec: 7}}
}

func TestCheckLinks(t *testing.T) {
	root := dir("", 0, 0)
	low := func(target string) []*content.Entry {
		return []*content.Entry{root, {Path: "l", Kind: content.LowerLink, Target: target}}
	}
	base := []*content.Entry{root, dir("d", 1, 0), file("d/a", "a", 1), link("d/s", "a"), file("f", "f", 1)}
	for _, row := range []struct {
		name   string
		layers [][]*content.Entry
		want   string // "" where the layer fits
	}{
		{"there", [][]*content.Entry{base, low("d/a")}, ""},
		{"a symlink", [][]*content.Entry{base, low("d/s")}, ""},
		{"not there", [][]*content.Entry{base, low("d/b")}, "which no layer below has"},
		{"nothing below", [][]*content.Entry{low("d/a")}, "which no layer below has"},
		{"a directory", [][]*content.Entry{base, low("d")}, "which is a directory"},
		{"below a file", [][]*content.Entry{base, low("f/x")}, "which no layer below has"},
		{"removed", [][]*content.Entry{base, {root, dir("d", 1, content.Implied), {Path: "d/a", Kind: content.Whiteout}},
			low("d/a")}, "which no layer below has"},
		{"its directory removed", [][]*content.Entry{base, {root, {Path: "d", Kind: content.Whiteout}}, low("d/a")},
			"which no layer below has"},
		{"its directory replaced", [][]*content.Entry{base, {root, dir("d", 1, content.Opaque), file("d/b", "", 1)},
			low("d/a")}, "which no layer below has"},
		{"in a replaced directory", [][]*content.Entry{base, {root, dir("d", 1, content.Opaque), file("d/b", "", 1)},
			low("d/b")}, ""},
		{"its directory is a file now", [][]*content.Entry{base, {root, file("d", "", 1)}, low("d/a")},
			"which no layer below has"},
		{"the root replaced", [][]*content.Entry{base, {dir("", 0, content.Opaque)}, low("d/a")}, "which no layer below has"},
		{"two layers down", [][]*content.Entry{base, {root, dir("d", 1, 0), file("d/b", "", 1)}, {root}, low("d/a")}, ""},
		{"a link of a layer below", [][]*content.Entry{base, low("d/a"),
			{root, {Path: "m", Kind: content.LowerLink, Target: "l"}}}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := treeFiles(t.TempDir()).check(t, row.layers)
			if (err != nil) != (row.want != "") || err != nil &&
				!(errors.Is(err, ErrUnfit) && strings.Contains(err.Error(), row.want)) {
				t.Errorf("got %v, want %q", err, row.want)
			}
			if _, merr := Merge(t.Context(), row.layers...); (merr != nil) != (err != nil) || merr != nil &&
				!strings.Contains(merr.Error(), row.want) {
				t.Errorf("Merge says %v", merr)
			}
		})
	}
}

// CheckLinks, layer by layer, refuses just what Merge would.
func TestCheckLinksLikeMerge(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	refused := 0
	for range 200 {
		dir := treeFiles(t.TempDir())
		var layers [][]*content.Entry
		for range 1 + rnd.IntN(5) {
			l := randomLayer(rnd)
			for i := range rnd.IntN(3) {
				path := []string{"a", "b", "d", "a/a", "a.b/c", "d/a/b", "e0", "k0"}[rnd.IntN(8)]
				l = append(l, &content.Entry{Path: fmt.Sprintf("k%d", i), Kind: content.LowerLink, Target: path})
			}
			layers = append(layers, sorted(l))
			err := dir.check(t, layers)
			_, merr := Merge(t.Context(), layers...)
			if errors.Is(err, ErrUnfit) != errors.Is(merr, ErrUnfit) || (err == nil) != (merr == nil) {
				t.Fatalf("CheckLinks says %v, Merge %v", err, merr)
			}
			if err != nil {
				refused++
				break
			}
		}
	}
	if refused < 20 {
		t.Errorf("only %d chains were refused", refused)
	}
}

// What a layer's links may add to one inode is counted once for each name of an attribute, and stands in the facts.
func TestBelow(t *testing.T) {
	x := func(name, value string) content.Xattr { return content.Xattr{Name: name, Value: []byte(value)} }
	entries := []*content.Entry{dir("", 0, 0), {Path: "a", Kind: content.LowerLink, Target: "t",
		Xattrs: []content.Xattr{x("user.a", "1"), x("user.b", "22")}},
		{Path: "b", Kind: content.LowerLink, Target: "t", Xattrs: []content.Xattr{x("user.a", "4444")}},
		{Path: "c", Kind: content.Regular, Xattrs: []content.Xattr{x("user.c", "1")}}}
	want := Below{Links: 2, Xattrs: 6 + 4 + 8 + 6 + 2 + 8}
	got := BelowOf(entries)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, b := range []*Below{nil, {}, &got} {
		f, err := decodeFacts(appendFacts(nil, Facts{Below: b}))
		if d := cmp.Diff(b, f.Below); d != "" || err != nil {
			t.Error(d, err)
		}
	}
}
