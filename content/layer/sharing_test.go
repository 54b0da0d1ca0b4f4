package layer

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Each object is counted once, with exactly the layers that name it, in however many passes.
func TestSharing(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	s := openStore(t, t.TempDir(), content.Python)
	for i := range 12 {
		members := []member{{name: fmt.Sprintf("own-%d", i), data: big(fmt.Sprint(i))}}
		for file := range 30 {
			if random.IntN(3) == 0 {
				data := strings.Repeat(fmt.Sprintf("%d ", file), 1000+3000*file)
				members = append(members, member{name: fmt.Sprintf("f-%d", file), data: data},
					member{name: fmt.Sprintf("again-%d", file), data: data})
			}
		}
		ingest(t, s, makeTar(t, members...))
	}
	ingest(t, s, pureLayer(t, 1000, 0)) // bytecode without its source names two objects
	for _, distinct := range []int{distinctMax, 7} {
		s.distinct = distinct
		got, err := s.Sharing(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := bruteSharing(t, s)
		if len(want) < 20 {
			t.Fatalf("only %d sets of layers share anything", len(want))
		}
		if d := cmp.Diff(want, collect(got)); d != "" {
			t.Errorf("remembering %d objects at a time (-want +got):\n%s", distinct, d)
		}
	}
}

func collect(sh *Sharing) map[string]Usage {
	out := map[string]Usage{}
	sh.Each(func(layers []int, u Usage) { out[fmt.Sprint(layers)] = u })
	return out
}

// bruteSharing looks at the files on the disk and at the lists of objects in the trees' headers.
func bruteSharing(t *testing.T, s *Store) map[string]Usage {
	t.Helper()
	having := map[content.ObjectID][]int{}
	for i, l := range s.List() {
		_, objects, err := tree.ReadFacts(s.treePath(l.ID), l.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range objects {
			having[id] = append(having[id], i)
		}
	}
	out := map[string]Usage{}
	for id, layers := range having {
		data, err := s.objects.Read(id)
		if err != nil {
			t.Fatal(err)
		}
		u := out[fmt.Sprint(layers)]
		out[fmt.Sprint(layers)] = Usage{Bytes: u.Bytes + content.Blocks(int64(len(data)))}
	}
	return out
}

func TestDuplicates(t *testing.T) {
	s := openStore(t, t.TempDir(), content.Exact)
	data := func(seed string) string { return strings.Repeat(seed, 1000) }
	const site = "usr/lib/python3.11/site-packages/"
	python := []member{
		{name: site + "numpy/core.py", data: data("core")},
		{name: site + "numpy/fast.cpython-311-x86_64-linux-gnu.so", data: data("fast")},
		{name: site + "numpy-1.2.dist-info/RECORD",
			data: "numpy/core.py,sha256=x,4000\n\"numpy/fast.cpython-311-x86_64-linux-gnu.so\",,\n" +
				"../../../bin/f2py,,\n../../../../../../etc/shadow,,\n/etc/shadow,,\n"},
		{name: "usr/bin/f2py", data: data("f2py")},
		{name: site + "loose.py", data: data("loose")},
	}
	debian := []member{
		{name: "usr/lib/libc.so.6", data: data("libc")},
		{name: "etc/shadow", data: data("root")},
		{name: "var/lib/dpkg/info/libc6:amd64.list", data: "/.\n/lib\n/lib/libc.so.6\n"},
		{name: "var/lib/dpkg/info/nonsense.list", data: "\x00\xff\n\n//\n"},
	}
	ingest(t, s, makeTar(t, python...))
	ingest(t, s, makeTar(t, append(slices.Clone(python), member{name: "srv/x.txt", data: data("fast")})...))
	ingest(t, s, makeTar(t, debian...))
	ingest(t, s, makeTar(t, debian...)) // a second use of the same layer
	for _, distinct := range []int{distinctMax, 1} {
		s.distinct = distinct
		d, err := s.Duplicates(t.Context(), 100)
		if err != nil {
			t.Fatal(err)
		}
		byName := func(list []Duplicate) map[string]Duplicate {
			m := map[string]Duplicate{}
			for _, d := range list {
				m[d.Name] = d
			}
			return m
		}
		// numpy's and libc's files are 4,000 bytes each.
		want := map[string]Duplicate{
			"numpy (pip)":  {Name: "numpy (pip)", Files: 6, Used: 24_000, Objects: 3, Stored: 12_000},
			"libc6 (dpkg)": {Name: "libc6 (dpkg)", Files: 2, Used: 8000, Objects: 1, Stored: 4000},
		}
		if d := cmp.Diff(want, byName(d.Packages)); d != "" {
			t.Error(d)
		}
		if got := byName(d.Paths)["/usr/lib/python3.11/site-packages"]; got.Files != 6 || got.Used != 26_000 ||
			got.Objects != 3 || got.Stored != 13_000 {
			t.Errorf("%+v", got)
		}
		types := byName(d.Types)
		if got := types[".so"]; got.Files != 4 || got.Used != 16_000 {
			t.Errorf("%+v", got)
		}
		// An object of two groups is stored once.
		var stored int64
		for _, d := range d.Types {
			stored += d.Stored
		}
		if stored != 3*4000+5000+2*4000 {
			t.Errorf("%d bytes are stored: %+v", stored, d.Types)
		}
		if short, err := s.Duplicates(t.Context(), 1); err != nil || len(short.Types) != 1 || short.Types[0] != d.Types[0] {
			t.Error(short, err)
		}
	}
}

func TestGroupNames(t *testing.T) {
	for p, want := range map[string][2]string{
		"init":                                 {"/", "(none)"},
		"etc/ssl/certs/ca.crt":                 {"/etc/ssl", ".crt"},
		"usr/lib/x86_64-linux-gnu/a/libc.so.6": {"/usr/lib/x86_64-linux-gnu", ".so"},
		"opt/venv/lib/python3/site-packages/a/site-packages/b.PY": {"/opt/venv/lib/python3/site-packages", ".py"},
		"root/.bashrc":                {"/root", "(none)"},
		"a/x.1":                       {"/a", "(none)"},
		"a/x.tar.gz":                  {"/a", ".gz"},
		"a/x.averyveryverylongending": {"/a", "(none)"},
	} {
		if got := [2]string{pathGroup(p), fileType(p)}; got != want {
			t.Errorf("%s: %v, want %v", p, got, want)
		}
	}
}

// Names come from images: there may be any number of them.
func TestGroupsAreBounded(t *testing.T) {
	g := groups{}
	for i := range 3 * maxGroups {
		g.add(fmt.Sprint(i), 2, 10, true)
	}
	list := g.most(1)
	if len(g) != maxGroups+1 || list[0].Name != others || list[0].Files != 2*2*maxGroups {
		t.Errorf("%d groups, %+v", len(g), list)
	}
}
