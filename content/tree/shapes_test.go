package tree

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// shape is a chain that grows with n.
type shape struct {
	name   string
	layers func(n int) [][]*content.Entry
}

func sorted(entries []*content.Entry) []*content.Entry {
	slices.SortFunc(entries, func(a, b *content.Entry) int { return content.ComparePaths(a.Path, b.Path) })
	return entries
}

// shapes are those whose merge is easily quadratic.
func shapes() []shape {
	root := dir("", 0, 0)
	numbered := func(from, step, n int) (out []*content.Entry) {
		out = append(out, root, dir("d", 1, 0))
		for i := range n {
			out = append(out, file(fmt.Sprintf("d/%08d", from+i*step), "x", 1))
		}
		return out
	}
	return []shape{
		{"two layers interleaved in one directory", func(n int) [][]*content.Entry {
			return [][]*content.Entry{numbered(0, 2, n), numbered(1, 2, n)}
		}},
		{"every other name removed", func(n int) [][]*content.Entry {
			gone := numbered(0, 2, n/2)
			for _, e := range gone[2:] {
				*e = content.Entry{Path: e.Path, Kind: content.Whiteout}
			}
			return [][]*content.Entry{numbered(0, 1, n), gone}
		}},
		{"hard links to one file of a large directory", func(n int) [][]*content.Entry {
			links := []*content.Entry{root, dir("l", 1, 0)}
			for i := range n {
				links = append(links, &content.Entry{Path: fmt.Sprintf("l/%08d", i), Kind: content.LowerLink, Target: "d/00000001",
					Mtime: content.Time{Sec: int64(i)}})
			}
			return [][]*content.Entry{numbered(0, 1, 10*n), links}
		}},
		{"hard links to a file with many names, layer by layer", func(n int) [][]*content.Entry {
			names := numbered(0, 1, 1)
			for i := range n {
				names = append(names, &content.Entry{Path: fmt.Sprintf("d/l%08d", i), Kind: content.Hardlink, Target: "d/00000000"})
			}
			layers := [][]*content.Entry{names}
			for i := range 20 {
				layers = append(layers, []*content.Entry{root, {Path: fmt.Sprintf("x%02d", i), Kind: content.LowerLink,
					Target: fmt.Sprintf("d/l%08d", i)}})
			}
			return layers
		}},
		{"symlinks named like Python sources", func(n int) [][]*content.Entry {
			return [][]*content.Entry{pythonLinks(n)}
		}},
		{"symlinks through the same long way", longWay},
		{"layers that touch the same files", func(n int) (layers [][]*content.Entry) {
			for range 20 {
				layers = append(layers, numbered(0, 1, n/20))
			}
			return layers
		}},
	}
}

// pythonLinks is a directory of symlinks named *.py, each with bytecode of its own.
func pythonLinks(n int) []*content.Entry {
	entries := []*content.Entry{dir("", 0, 0), dir("d", 1, 0), dir("d/__pycache__", 1, 0), file("real.py", "x", 1)}
	for i := range n {
		entries = append(entries, link(fmt.Sprintf("d/m%08d.py", i), "../real.py"),
			file(fmt.Sprintf("d/__pycache__/m%08d.cpython-311.pyc", i), "x", 1))
	}
	return sorted(entries)
}

// longWay is a layer of implied directories over symlinks that all lead through the same chain of long ones.
func longWay(n int) [][]*content.Entry {
	base := []*content.Entry{dir("", 0, 0), dir("d", 1, 0), dir("t", 1, 0)}
	for i := range 30 {
		base = append(base, link(fmt.Sprintf("c%02d", i), strings.Repeat("./", n/100)+fmt.Sprintf("c%02d", i+1)))
	}
	base = append(base, link("c30", "t"))
	over := []*content.Entry{dir("", 0, content.Implied), dir("d", 0, content.Implied)}
	for i := range n {
		base = append(base, link(fmt.Sprintf("d/%08d", i), "../c00"))
		over = append(over, dir(fmt.Sprintf("d/%08d", i), 0, content.Implied))
	}
	return [][]*content.Entry{sorted(base), over}
}

// Four times the names are at most six times the work, whatever the shape. Work that is counted does not depend on the
// machine.
func TestMergeIsNotQuadratic(t *testing.T) {
	count := func(layers [][]*content.Entry) int {
		m := newMerger(t.Context())
		for _, l := range layers {
			if err := m.apply(l); err != nil {
				t.Fatal(err)
			}
		}
		m.show(m.root, map[*content.Entry]*content.Entry{})
		return m.steps
	}
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			small, large := count(s.layers(2000)), count(s.layers(8000))
			t.Logf("%d steps, %d for four times the names", small, large)
			if large > 6*small {
				t.Errorf("%d steps for 2,000 names, %d for 8,000", small, large)
			}
		})
	}
}

// A merge that nobody waits for any more ends, wherever it is.
func TestMergeStops(t *testing.T) {
	gone := errors.New("the client has gone")
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			cancel(gone)
			if n, err := Merge(ctx, s.layers(5000)...); n != nil || !errors.Is(err, gone) {
				t.Error(n, err)
			}
		})
	}
}

// modelNode is a name in the model of TestMergeLikeModel.
type modelNode struct {
	entry    *content.Entry
	children map[string]*modelNode
}

// model merges as simply as can be, without implied directories over symlinks and LowerLinks, which change inodes.
func model(layers [][]*content.Entry) *modelNode {
	root := &modelNode{entry: &emptyRoot, children: map[string]*modelNode{}}
	for _, entries := range layers {
		for _, e := range entries {
			if e.Path == "" {
				root.entry = e
				continue
			}
			at := root
			parts := strings.Split(e.Path, "/")
			for _, p := range parts[:len(parts)-1] {
				at = at.children[p]
			}
			name := parts[len(parts)-1]
			old := at.children[name]
			switch {
			case e.Kind == content.Whiteout:
				delete(at.children, name)
			case e.Kind == content.Dir && old != nil && old.entry.Kind == content.Dir:
				if e.Flags&content.Opaque != 0 {
					old.children = map[string]*modelNode{}
				}
				if e.Flags&content.Implied == 0 {
					old.entry = e
				}
			default:
				at.children[name] = &modelNode{entry: e, children: map[string]*modelNode{}}
			}
		}
	}
	return root
}

func (n *modelNode) list(path string, out *[]string) {
	*out = append(*out, fmt.Sprintf("%s %p", path, n.entry))
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n.children[name].list(path+"/"+name, out)
	}
}

func list(n *Node, path string, out *[]string) {
	*out = append(*out, fmt.Sprintf("%s %p", path, n.Entry))
	for _, c := range n.Children {
		list(c, path+"/"+c.Name, out)
	}
}

// randomLayer makes a layer of few names, so that layers meet.
func randomLayer(rnd *rand.Rand) []*content.Entry {
	entries := []*content.Entry{dir("", 0, 0)}
	var fill func(path string, depth int)
	fill = func(path string, depth int) {
		for _, name := range []string{"a", "a.b", "a-b", "ab", "b", "c", "d", "e0", "e1", "e2"} {
			p := strings.TrimPrefix(path+"/"+name, "/")
			switch rnd.IntN(8) {
			case 0:
				entries = append(entries, file(p, "x", 1))
			case 1:
				entries = append(entries, &content.Entry{Path: p, Kind: content.Whiteout})
			case 2, 3:
				if depth < 3 {
					entries = append(entries, dir(p, 1, []content.Flags{0, 0, content.Implied, content.Opaque}[rnd.IntN(4)]))
					fill(p, depth+1)
				}
			}
		}
	}
	fill("", 0)
	return sorted(entries)
}

// What Merge makes of random layers is what replaying them one entry after the other makes.
func TestMergeLikeModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 500 {
		var layers [][]*content.Entry
		for range 1 + rnd.IntN(6) {
			layers = append(layers, randomLayer(rnd))
		}
		n, err := Merge(t.Context(), layers...)
		if err != nil {
			t.Fatal(err)
		}
		var want, got []string
		model(layers).list("", &want)
		list(n, "", &got)
		if d := cmp.Diff(want, got); d != "" {
			t.Fatal(d)
		}
	}
}

// An inode that layers link to again and again is one under all its names, those of replaced directories aside.
func TestMergeLinksOfLinks(t *testing.T) {
	root := dir("", 0, 0)
	lower := func(path, target string, sec int64, names ...string) *content.Entry {
		e := &content.Entry{Path: path, Kind: content.LowerLink, Target: target, Mode: 0o600, Mtime: content.Time{Sec: sec}}
		for _, name := range names {
			e.Xattrs = append(e.Xattrs, content.Xattr{Name: name, Value: []byte(path)})
		}
		return e
	}
	n, err := Merge(t.Context(),
		[]*content.Entry{root, file("a", "one", 1), {Path: "b", Kind: content.Hardlink, Target: "a"}, file("z", "z", 1)},
		[]*content.Entry{root, lower("c", "b", 2, "user.x", "user.y"), {Path: "d", Kind: content.Hardlink, Target: "c"},
			lower("e", "a", 3)},
		[]*content.Entry{root, {Path: "a", Kind: content.Whiteout}, {Path: "b", Kind: content.Whiteout},
			lower("f", "d", 4, "user.a", "user.y"), lower("y", "z", 9)},
	)
	if err != nil {
		t.Fatal(err)
	}
	c := n.child("c").Entry
	for _, name := range []string{"d", "e", "f"} {
		if n.child(name).Entry != c {
			t.Errorf("%s is another inode than c", name)
		}
	}
	want := []content.Xattr{{Name: "user.a", Value: []byte("f")}, {Name: "user.x", Value: []byte("c")},
		{Name: "user.y", Value: []byte("f")}}
	if d := cmp.Diff(want, c.Xattrs); d != "" || c.Mtime.Sec != 4 || string(c.Data) != "one" {
		t.Error(d, c)
	}
	if n.child("y").Entry != n.child("z").Entry || n.child("z").Entry.Mtime.Sec != 9 {
		t.Error(show(n))
	}
}

// Paths resolve as the kernel resolves them: 40 symlinks, never out of the root, and alike however often they are
// asked for.
func TestResolve(t *testing.T) {
	entries := []*content.Entry{dir("", 0, 0), dir("d", 1, 0), dir("d/e", 1, 0), file("d/e/f", "f", 1),
		link("abs", "/d/e"), link("up", "d/../../../d"), link("loop", "loop2"),
		link("loop2", "./loop"), link("dead", "d/none"), link("d/back", "../up/e"), link("twice", "abs/../back/f")}
	for i := range 45 {
		entries = append(entries, link(fmt.Sprintf("s%02d", i), fmt.Sprintf("s%02d", i+1)))
	}
	entries = append(entries, link("s45", "d"))
	m := newMerger(t.Context())
	if err := m.apply(sorted(entries)); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		path string
		want string // "" for nothing
	}{
		{"d/e", "d/e"}, {"abs", "d/e"}, {"abs/f", "d/e/f"}, {"up/e", "d/e"}, {"d/back/f", "d/e/f"}, {"twice", "d/e/f"},
		{"loop", ""}, {"loop2", ""}, {"dead", ""},
		{"s45", "d"}, {"s06", "d"}, {"s05", ""}, {"s00", ""}, {"s06/e", "d/e"}, {"s07/back", ""}, {"s09/back", "d/e"},
		{"../../abs/./f", "d/e/f"}, {"d/none", ""},
	} {
		for _, again := range []bool{false, true} {
			var want *Node
			if row.want != "" {
				want = m.find(row.want)
			}
			if got := m.resolve(row.path); got != want {
				t.Errorf("%s leads to %v, want %s (asked before: %v)", row.path, got, row.want, again)
			}
		}
		m.followed = map[*Node]followed{}
	}
}

// What upper layers replace is not kept: forty layers over the same files take no more memory than four, though every
// layer has one file of its own that stays.
func TestMergeForgetsWhatIsReplaced(t *testing.T) {
	const files = 2000
	layer := func(i int) (content.LayerID, []byte) {
		entries := []*content.Entry{dir("", 0, 0), dir("d", int64(i), 0)}
		for k := range files {
			entries = append(entries, file(fmt.Sprintf("d/%08d", k), strings.Repeat("x", 600), int64(i)))
		}
		entries = append(entries, file(fmt.Sprintf("d/own%d", i), "x", 1))
		enc := Encode(content.Python, sorted(entries))
		tree, err := enc.Marshal(Facts{})
		if err != nil {
			t.Fatal(err)
		}
		return enc.ID, tree
	}
	var live []uint64
	n, err := MergeEach(t.Context(), func(yield func([]*content.Entry, error) bool) {
		for i := range 40 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			live = append(live, m.HeapAlloc)
			id, tree := layer(i)
			_, entries, err := Decode(tree, id)
			if !yield(entries, err) {
				return
			}
		}
	})
	if err != nil || len(n.child("d").Children) != files+40 {
		t.Fatal(err)
	}
	const each = 64 << 10 // what a file that stays may keep alive of its layer
	if grown := int64(live[39]) - int64(live[4]); grown > 35*each {
		t.Errorf("35 more layers keep %d bytes", grown)
	}
	t.Logf("live bytes before layers: %d", live)
	runtime.KeepAlive(n)
}
