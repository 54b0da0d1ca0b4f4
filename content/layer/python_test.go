package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// thing is a file of a model of a root file system: a directory, a symlink or a regular file.
type thing struct {
	kind         byte // tar.TypeDir, TypeSymlink or TypeReg
	data, target string
	mtime        int64
}

// world is a model of a root file system, by path.
type world map[string]thing

func (w world) under(dir string) (paths []string) {
	for p := range w {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	return paths
}

func (w world) remove(p string) {
	for _, p := range w.under(p) {
		delete(w, p)
	}
}

// open follows symlinks, as open(2) and stat(2) do.
func (w world) open(p string) (thing, bool) {
	todo, at := strings.Split(p, "/"), ""
	for links := 0; len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			at = path.Dir(at)
			continue
		}
		next := strings.TrimPrefix(path.Join(at, name), "./")
		f, ok := w[next]
		if !ok {
			return thing{}, false
		}
		if f.kind != tar.TypeSymlink {
			at = next
			continue
		}
		if links++; links > 40 {
			return thing{}, false
		}
		todo = append(strings.Split(f.target, "/"), todo...)
	}
	f, ok := w[at]
	return f, ok && f.kind == tar.TypeReg
}

const tag = ".cpython-311.pyc"

func cached(source string) string {
	dir, name := content.SplitPath(source)
	return dir + "/__pycache__/" + strings.TrimSuffix(name, ".py") + tag
}

// imports returns the source of the code that CPython runs, given where its compiled file is.
func (w world) imports(source, compiled string) (ran, want string) {
	s, ok := w.open(source)
	if !ok {
		return "", ""
	}
	if c, ok := w.open(compiled); ok {
		h, ok := content.ParsePyc([]byte(c.data))
		if ok && h.Mtime == uint32(s.mtime) && h.Size == uint32(len(s.data)) {
			return codeOf(c.data), s.data
		}
	}
	return s.data, s.data
}

// compiled is a .pyc of a source, large or tiny.
func compiled(source string, mtime int64, large bool) string {
	pad := ""
	if large {
		pad = strings.Repeat("\x00", content.InlineMax)
	}
	return pycOf(uint32(mtime), uint32(len(source)), source+pad)
}

func codeOf(pyc string) string { return strings.TrimRight(pyc[content.PycHeaderLen:], "\x00") }

// tar is a layer of the changes from one world to another, with the members in a random order, directories first.
func (w world) tar(t *testing.T, r *rand.Rand, before world) []byte {
	t.Helper()
	var buf bytes.Buffer
	out := tar.NewWriter(&buf)
	write := func(h *tar.Header, data string) {
		if err := out.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	for p := range before {
		dir, name := content.SplitPath(p)
		if _, ok := w[p]; !ok && (dir == "" || w[dir].kind == tar.TypeDir) {
			write(&tar.Header{Name: path.Join(dir, ".wh."+name), Typeflag: tar.TypeReg, Mode: 0o644}, "")
		}
	}
	paths := slices.Sorted(maps.Keys(w))
	r.Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
	slices.SortStableFunc(paths, func(a, b string) int {
		depth := func(p string) int {
			if w[p].kind == tar.TypeDir {
				return strings.Count(p, "/")
			}
			return 100
		}
		return depth(a) - depth(b)
	})
	for _, p := range paths {
		if f := w[p]; f != before[p] {
			h := tar.Header{Name: p, Typeflag: f.kind, Linkname: f.target, Mode: 0o755, ModTime: time.Unix(f.mtime, 0)}
			h.Size = int64(len(f.data))
			write(&h, f.data)
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

var kinds = map[content.Kind]byte{
	content.Dir: tar.TypeDir, content.Symlink: tar.TypeSymlink, content.Regular: tar.TypeReg,
}

// view is what a container sees of a chain.
func view(t *testing.T, s *Store, chain []content.LayerID) world {
	t.Helper()
	root, err := s.Merge(t.Context(), chain)
	if err != nil {
		t.Fatal(err)
	}
	w := world{}
	var rec func(n *tree.Node, at string)
	rec = func(n *tree.Node, at string) {
		for _, c := range n.Children {
			p := path.Join(at, c.Name)
			e := c.Entry
			data := e.Data
			if !e.Object.IsZero() {
				if data, err = s.objects.Read(e.Object); err != nil {
					t.Fatal(err)
				}
			}
			w[p] = thing{kind: kinds[e.Kind], data: string(data), target: e.Target, mtime: e.Mtime.Sec}
			rec(c, p)
		}
	}
	rec(root, "")
	return w
}

var texts = []string{
	"x = 'version-1'", "x = 'version-2'", "x = 'version-3'",
	strings.Repeat("import version1\n", 60), strings.Repeat("import version2\n", 60),
}

// The directories and modules of random worlds.
var (
	pythonDirs    = []string{"v1", "v2", "v2/sub"}
	pythonModules = []string{"m", "n"}
)

// change changes a world at random as the steps of builds do. stamps are the mtimes that files get.
func (w world) change(r *rand.Rand, stamps []int64) {
	pick := func(all []string) string { return all[r.IntN(len(all))] }
	at := func() int64 { return stamps[r.IntN(len(stamps))] }
	for range 1 + r.IntN(5) {
		dir := pick(pythonDirs)
		source := dir + "/" + pick(pythonModules) + ".py"
		for d := cached(source); strings.Contains(d, "/"); {
			d, _ = content.SplitPath(d)
			if f := w[d]; f.kind != tar.TypeDir {
				w[d] = thing{kind: tar.TypeDir, mtime: at()}
			}
		}
		compile := func() {
			if s, ok := w.open(source); ok {
				code := compiled(s.data, s.mtime, r.IntN(2) == 0)
				w[cached(source)] = thing{kind: tar.TypeReg, data: code, mtime: at()}
			}
		}
		switch r.IntN(10) {
		case 0, 1, 2:
			w[source] = thing{kind: tar.TypeReg, data: pick(texts), mtime: at()}
			compile()
		case 3:
			w[source] = thing{kind: tar.TypeReg, data: pick(texts), mtime: at()}
		case 4, 5:
			compile()
		case 6:
			w.remove(dir + "/__pycache__")
		case 7:
			delete(w, pick([]string{source, cached(source)}))
		case 8:
			target := pick([]string{"m.py", "../v1/m.py", "../v2/n.py"})
			w[source] = thing{kind: tar.TypeSymlink, target: target, mtime: at()}
			if r.IntN(2) == 0 {
				compile()
			}
		case 9:
			if f, ok := w[source]; ok && f.kind == tar.TypeReg { // as chmod does
				w[source] = thing{kind: f.kind, data: f.data, mtime: f.mtime}
			}
		}
	}
}

// replacements are the ways in which one source comes to be where another one was, with its times.
var replacements = map[string]func(w world, from, to, module string){
	"cp -a": func(w world, from, to, module string) { w[to+module] = w[from+module] },
	"mv": func(w world, from, to, module string) {
		w[to+module] = w[from+module]
		delete(w, from+module)
	},
	"rsync -a": func(w world, from, to, _ string) {
		copyAll(w, from, to, func(a, b thing) bool { // its quick check
			return a.kind != b.kind || a.mtime != b.mtime || len(a.data) != len(b.data)
		})
	},
	"cp -a of the directory": func(w world, from, to, _ string) {
		copyAll(w, from, to, func(_, _ thing) bool { return true })
	},
	"symlink": func(w world, from, to, module string) {
		w[to+module] = thing{kind: tar.TypeSymlink, target: up(to) + from + module}
	},
	"symlink of __pycache__": func(w world, from, to, _ string) {
		w.remove(to + "__pycache__")
		w[to+"__pycache__"] = thing{kind: tar.TypeSymlink, target: up(to) + from + "__pycache__"}
	},
	"symlink of a compiled file": func(w world, from, to, module string) {
		if f, ok := w[to+"__pycache__"]; ok && f.kind == tar.TypeDir {
			w[cached(to+module)] = thing{kind: tar.TypeSymlink, target: "../" + up(to) + cached(from+module)}
		}
	},
}

func up(dir string) string { return strings.Repeat("../", strings.Count(dir, "/")) }

// copyAll copies a directory over another one, as far as differs tells to.
func copyAll(w world, from, to string, differs func(from, to thing) bool) {
	from, to = strings.TrimSuffix(from, "/"), strings.TrimSuffix(to, "/")
	for _, p := range w.under(from) {
		if q := to + strings.TrimPrefix(p, from); differs(w[p], w[q]) {
			w[q] = w[p]
		}
	}
}

// Whatever replaces a source, Python runs the new code wherever it does so with the image's own timestamps, and always
// where compiled files are half of a pair: a copy with its times never brings another one's code, but for a collision
// of hashes.
func TestPythonNeverRunsStaleCode(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	compared, better := 0, 0
	stores := []*Store{openStore(t, t.TempDir(), content.Exact), openStore(t, t.TempDir(), content.Python)}
	for round := range 60 {
		stamps := []int64{1600000001, 1600000002, 1600000003, 1700000000}
		if round%3 == 0 {
			stamps = stamps[:1] // all files have one time, as with SOURCE_DATE_EPOCH
		}
		var exact, python []world
		var chains [2][]content.LayerID
		w := world{}
		for range 1 + r.IntN(4) {
			before := maps.Clone(w)
			w.change(r, stamps)
			blob := w.tar(t, r, before)
			for i, s := range stores {
				chains[i] = append(chains[i], ingest(t, s, blob).Layer)
			}
			exact = append(exact, view(t, stores[0], chains[0]))
			python = append(python, view(t, stores[1], chains[1]))
		}
		if diff := cmp.Diff(w, exact[len(exact)-1], cmp.AllowUnexported(thing{})); diff != "" {
			t.Fatalf("the model is wrong: %s", diff)
		}
		check := func(what string, e, p world, source, compiledExact, compiledPython string) {
			ran, want := p.imports(source, compiledPython)
			was, wanted := e.imports(source, compiledExact)
			compared++
			if ran == want && was != wanted {
				better++
			}
			// What runs under overlayfs, too, is no news: where all files have one time, rsync leaves an old source alone
			// there, and its code runs; here it copies the new one, beside bytecode that has the same time.
			if ran != want && was == wanted && ran != was {
				t.Errorf("round %d, %s: %s runs %q, and is %q", round, what, source, ran, want)
			}
		}
		last := len(exact) - 1
		each(func(from, to, module string) {
			for name, replace := range replacements {
				e, p := maps.Clone(exact[last]), maps.Clone(python[last])
				_, ok := e.open(from + module)
				if _, dir := e[strings.TrimSuffix(to, "/")]; !ok || !dir || from == to {
					continue
				}
				if stale(t, e, p, from+module) || stale(t, e, p, to+module) {
					continue
				}
				replace(e, from, to, module)
				replace(p, from, to, module)
				source := to + module
				check(name, e, p, source, cached(source), cached(source))
			}
		})
		// A cache outside of the images (PYTHONPYCACHEPREFIX) that an earlier one has filled.
		for i := range last {
			for _, dir := range pythonDirs {
				source := dir + "/m.py"
				for _, in := range []struct{ of []world }{{exact}, {python}} {
					old, ok := in.of[i].open(source)
					if ok {
						in.of[last]["cache"] = thing{kind: tar.TypeReg, data: compiled(old.data, old.mtime, false)}
					}
				}
				check("cache of another image", exact[last], python[last], source, "cache", "cache")
				delete(exact[last], "cache")
				delete(python[last], "cache")
			}
		}
	}
	t.Logf("%d imports; %d times Python runs the new code where overlayfs does not", compared, better)
	if compared < 1000 || better == 0 {
		t.Error("the worlds are too poor to show anything")
	}
}

// stale tells whether an image runs stale code by itself: nothing follows from what a copy of it runs. It is an error
// where only Python's timestamps are at fault.
func stale(t *testing.T, e, p world, source string) bool {
	ran, want := p.imports(source, cached(source))
	was, wanted := e.imports(source, cached(source))
	if ran != want && was == wanted {
		t.Errorf("%s runs %q, and is %q", source, ran, want)
	}
	return was != wanted
}

func each(fn func(from, to, module string)) {
	for _, from := range pythonDirs {
		for _, to := range pythonDirs {
			for _, m := range pythonModules {
				fn(from+"/", to+"/", m+".py")
			}
		}
	}
}

// A view is stable: whatever a layer does not name is in its view what it was in the one below, whatever the fidelity;
// also when the layers were built from what is seen here.
func TestViewIsStable(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, f := range []content.Fidelity{content.Exact, content.Python, content.Normalized} {
		t.Run(string(f), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			kept, s := 0, openStore(t, t.TempDir(), f)
			for range 25 {
				var chain []content.LayerID
				var below world
				w := world{}
				for layer := range 6 {
					if layer > 2 { // the builder sees what we show
						w = maps.Clone(below)
					}
					before := maps.Clone(w)
					w.change(r, []int64{1600000001, 1600000002, 1700000000})
					chain = append(chain, ingest(t, s, w.tar(t, r, before)).Layer)
					now := view(t, s, chain)
					for p, f := range now {
						if w[p] != before[p] {
							continue // the layer names it
						}
						kept++
						if diff := cmp.Diff(below[p], f, cmp.AllowUnexported(thing{})); diff != "" {
							t.Fatalf("layer %d does not name %s (-below +now):\n%s", layer, p, diff)
						}
					}
					for p := range below {
						if _, gone := now[p]; !gone && w[p].kind != 0 {
							t.Fatalf("layer %d does not remove %s", layer, p)
						}
					}
					below = now
				}
			}
			if kept < 200 {
				t.Errorf("only %d entries were compared", kept)
			}
		})
	}
}

// However little may wait for sources, and in whatever order a layer's members come, the layer is the same, and as
// drafted.
func TestBytecodeInAnyOrder(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	w := world{}
	for range 40 {
		w.change(r, []int64{1600000001, 1600000002})
	}
	for i := range 200 {
		w.many(r, fmt.Sprintf("v1/many%d", i))
	}
	ids := map[content.Fidelity]content.LayerID{}
	stores := map[content.Fidelity]*Store{}
	for _, f := range []content.Fidelity{content.Exact, content.Python} {
		stores[f] = openStore(t, t.TempDir(), f)
	}
	for i := range 8 {
		blob := w.tar(t, r, nil)
		for f, s := range stores {
			s.parked.most = []int{1, 5000, 40000, 0}[i%4]
			in := ingest(t, s, blob)
			d, err := DraftBlob(t.Context(), digest.FromBytes(blob), bytes.NewReader(blob))
			if err != nil {
				t.Fatal(err)
			}
			draft := map[content.Fidelity]DraftTree{content.Exact: d.Exact, content.Python: d.Python}[f]
			facts, err := s.Facts(in.Layer)
			if err != nil {
				t.Fatal(err)
			}
			if old, ok := ids[f]; ok && old != in.Layer || draft.ID != in.Layer || draft.Payload != facts.Payload {
				t.Fatalf("order %d, %s: layer %s, was %s; drafted %s, %s, payload %s",
					i, f, in.Layer, old, draft.ID, draft.Payload, facts.Payload)
			}
			ids[f] = in.Layer
		}
	}
}

func (w world) many(r *rand.Rand, module string) {
	text, mtime := strings.Repeat(module+"\n", 1+r.IntN(200)), 1600000000+r.Int64N(9)
	code := compiled(text, mtime-r.Int64N(5)/4, r.IntN(4) > 0)
	w[module+".py"] = thing{kind: tar.TypeReg, data: text, mtime: mtime}
	w[cached(module+".py")] = thing{kind: tar.TypeReg, data: code, mtime: 1}
	if f := w["v1/__pycache__"]; f.kind != tar.TypeDir {
		w["v1"], w["v1/__pycache__"] = thing{kind: tar.TypeDir}, thing{kind: tar.TypeDir}
	}
}
