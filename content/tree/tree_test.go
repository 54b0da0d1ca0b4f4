package tree

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func object(s string) content.ObjectID {
	sum, err := content.ParseSum(digest.FromString(s).String())
	if err != nil {
		panic(err)
	}
	return content.ObjectID{Sum: sum}
}

func torture() []*content.Entry {
	return []*content.Entry{
		{Kind: content.Dir, Mode: 0o755},
		{Path: "a", Kind: content.Dir, Mode: 0o1777, UID: 1 << 31, GID: 70000, Flags: content.Opaque,
			Mtime: content.Time{Sec: -5, Nsec: 999999999}},
		{Path: "a/\xff\xfe", Kind: content.Regular, Mode: 0o4755, Size: 5, Data: []byte("hello"),
			Xattrs: []content.Xattr{{Name: "security.capability", Value: []byte{1, 0, 2}}, {Name: "user.empty"}}},
		{Path: "a/big", Kind: content.Regular, Mode: 0o644, Size: 1 << 40, Object: object("big")},
		{Path: "a/big2", Kind: content.Hardlink, Target: "a/big"},
		{Path: "a.b", Kind: content.Symlink, Mode: 0o777, Target: "../\xff"},
		{Path: "dev", Kind: content.Char, Major: 5, Minor: 300},
		{Path: "gone", Kind: content.Whiteout},
		{Path: "low", Kind: content.LowerLink, Target: "etc/x", Mode: 0o600},
		{Path: "z.pyc", Kind: content.Regular, Size: 9000, Object: object("zc"), Flags: content.PycPaired, PycTime: 7},
		{Path: "z.py", Kind: content.Regular, Mode: 0o644, Mtime: content.Time{Sec: 7}, Size: 3, Data: []byte("zpy"),
			Flags: content.PySource},
	}
}

func TestTreeFileRoundTrip(t *testing.T) {
	entries := torture()
	facts := Facts{
		Fidelity: content.Python, Payload: PayloadDigest(entries, nil), Entries: 10, Bytes: 1 << 40, UsedBytes: 8192,
		UsedInodes: 3,
		Tars: []Tar{{DiffID: content.DiffID(object("d")), Fidelity: content.Python, Size: 10240,
			Blobs: []digest.Digest{digest.FromString("blob")}}},
	}
	enc := Encode(content.Python, entries)
	facts.Layer = enc.ID
	file, err := enc.Marshal(facts)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), enc.ID.Hex())
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	fidelity, got, err := Read(path, enc.ID)
	if err != nil {
		t.Fatal(err)
	}
	if fidelity != content.Python {
		t.Errorf("fidelity %q", fidelity)
	}
	if d := cmp.Diff(entries, got); d != "" {
		t.Error(d)
	}
	gotFacts, ids, err := ReadFacts(path, enc.ID)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(facts, gotFacts); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(enc.Objects(), ids); d != "" || len(ids) != 2 {
		t.Errorf("%d objects: %s", len(ids), d)
	}

	facts.Tars = append(facts.Tars, Tar{DiffID: content.DiffID(object("e")), Fidelity: content.Normalized})
	if file, err = WithFacts(file, facts); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, got, err = Read(path, enc.ID); err != nil || len(got) != len(entries) {
		t.Fatal(len(got), err)
	}
	if gotFacts, _, err = ReadFacts(path, enc.ID); err != nil || cmp.Diff(facts, gotFacts) != "" {
		t.Fatal(err, cmp.Diff(facts, gotFacts))
	}

	other := content.LayerID(object("f"))
	if _, _, err := ReadFacts(path, other); !errors.Is(err, ErrDamaged) {
		t.Errorf("the file under another name: %v", err)
	}
	facts.Layer = other
	if _, err := WithFacts(file, facts); !errors.Is(err, ErrDamaged) {
		t.Errorf("another layer's facts: %v", err)
	}
}

// Every flipped bit of a tree file is noticed, by Read or (in the header) by both.
func TestDamagedTreeFile(t *testing.T) {
	enc := Encode(content.Exact, torture())
	file, err := enc.Marshal(Facts{Fidelity: content.Exact, Entries: 10})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "tree")
	for i := range file {
		bad := slices.Clone(file)
		bad[i] ^= 1 << (i % 8)
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, entries, err := Read(path, enc.ID); err == nil && len(cmp.Diff(torture(), entries)) > 0 {
			t.Fatalf("bit flip at byte %d of %d goes unnoticed", i, len(file))
		}
	}
	for n := range file {
		if err := os.WriteFile(path, file[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Read(path, enc.ID); err == nil {
			t.Fatalf("truncation to %d of %d bytes goes unnoticed", n, len(file))
		}
	}
}

// The formats are pinned: a change here is a format break.
func TestFormatVectors(t *testing.T) {
	entries := torture()
	if got, want := Encode(content.Exact, entries).ID.Hex(), vectorLayer; got != want {
		t.Errorf("layer id %s, want %s", got, want)
	}
	if got, want := PayloadDigest(entries, nil).Hex(), vectorPayload; got != want {
		t.Errorf("payload digest %s, want %s", got, want)
	}
}

func TestPayloadDigestIgnoresTimeAndOwner(t *testing.T) {
	a, b := torture(), torture()
	for _, e := range b {
		e.UID, e.GID, e.Mtime = 42, 43, content.Time{Sec: 99}
	}
	if PayloadDigest(a, nil) != PayloadDigest(b, nil) {
		t.Error("mtime, uid or gid changes the payload digest")
	}
	b[2].Mode = 0o755
	if PayloadDigest(a, nil) == PayloadDigest(b, nil) {
		t.Error("mode does not change the payload digest")
	}
	c := torture()
	c[3].Object = object("small")
	if PayloadDigest(a, nil) == PayloadDigest(c, nil) {
		t.Error("a payload does not change the payload digest")
	}
}

// show prints a merged tree, one line a node.
func show(n *Node) string {
	var b strings.Builder
	var rec func(n *Node, path string)
	rec = func(n *Node, path string) {
		for _, c := range n.Children {
			p := path + "/" + c.Name
			fmt.Fprintf(&b, "%s %d %o %d %s%s\n", p, c.Entry.Kind, c.Entry.Mode, c.Entry.Mtime.Sec, c.Entry.Data, c.Entry.Target)
			rec(c, p)
		}
	}
	rec(n, "")
	return b.String()
}

func dir(path string, mtime int64, flags content.Flags) *content.Entry {
	return &content.Entry{Path: path, Kind: content.Dir, Mode: 0o755, Mtime: content.Time{Sec: mtime}, Flags: flags}
}

func file(path, data string, mtime int64) *content.Entry {
	return &content.Entry{Path: path, Kind: content.Regular, Mode: 0o644, Size: int64(len(data)), Data: []byte(data),
		Mtime: content.Time{Sec: mtime}}
}

func TestMerge(t *testing.T) {
	base := []*content.Entry{
		dir("", 0, 0), dir("d", 1, 0), file("d/a", "a1", 1), file("d/b", "b1", 1), dir("d/sub", 1, 0), file("d/sub/x", "x",
			1),
		dir("e", 1, 0), file("e/f", "f", 1), {Path: "l", Kind: content.Symlink, Target: "d"},
		{Path: "lib", Kind: content.Symlink, Target: "/usr/lib"},
		dir("usr", 1, 0), {Path: "usr/lib", Kind: content.Dir, Mode: 0o711, Mtime: content.Time{Sec: 4}},
	}
	for _, row := range []struct {
		name  string
		layer []*content.Entry
		want  string
	}{
		{"whiteout", []*content.Entry{dir("d", 2, 0), {Path: "d/a", Kind: content.Whiteout},
			{Path: "d/sub", Kind: content.Whiteout}, {Path: "e", Kind: content.Whiteout},
			{Path: "nothing", Kind: content.Whiteout}},
			"/d 1 755 2 \n/d/b 2 644 1 b1\n/l 3 0 0 d\n/lib 3 0 0 /usr/lib\n/usr 1 755 1 \n/usr/lib 1 711 4 \n"},
		{"opaque", []*content.Entry{dir("d", 2, content.Opaque), file("d/n", "n", 2)},
			"/d 1 755 2 \n/d/n 2 644 2 n\n/e 1 755 1 \n/e/f 2 644 1 f\n/l 3 0 0 d\n/lib 3 0 0 /usr/lib\n/usr 1 755 1 " +
				"\n/usr/lib 1 711 4 \n"},
		{"implied keeps metadata", []*content.Entry{dir("d", 0, content.Implied), file("d/a", "a2", 2),
			dir("lib", 0, content.Implied), file("lib/so", "s", 2)},
			"/d 1 755 1 \n/d/a 2 644 2 a2\n/d/b 2 644 1 b1\n/d/sub 1 755 1 \n/d/sub/x 2 644 1 x\n/e 1 755 1 \n/e/f 2 644 1 " +
				"f\n/l 3 0 0 d\n/lib 1 711 4 \n/lib/so 2 644 2 s\n/usr 1 755 1 \n/usr/lib 1 711 4 \n"},
		{"dir over file, file over dir", []*content.Entry{dir("d", 2, 0), dir("d/a", 2, 0), file("d/a/in", "i", 2),
			file("e", "e", 2), file("l", "l", 2)},
			"/d 1 755 2 \n/d/a 1 755 2 \n/d/a/in 2 644 2 i\n/d/b 2 644 1 b1\n/d/sub 1 755 1 \n/d/sub/x 2 644 1 x\n/e 2 644 " +
				"2 e\n/l 2 644 2 l\n/lib 3 0 0 /usr/lib\n/usr 1 755 1 \n/usr/lib 1 711 4 \n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			n, err := Merge(t.Context(), base, append([]*content.Entry{dir("", 0, content.Implied)}, row.layer...))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(row.want, show(n)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestMergeHardlinks(t *testing.T) {
	root := dir("", 0, 0)
	base := []*content.Entry{root, file("a", "one", 1), {Path: "b", Kind: content.Hardlink, Target: "a"},
		file("c", "c", 1)}
	n, err := Merge(t.Context(), base, []*content.Entry{root, {Path: "a", Kind: content.Whiteout},
		{Path: "l", Kind: content.LowerLink, Target: "a", Mode: 0o600, Mtime: content.Time{Sec: 9}},
		{Path: "m", Kind: content.Hardlink, Target: "l"}})
	if err != nil {
		t.Fatal(err)
	}
	b, l, m := n.child("b"), n.child("l"), n.child("m")
	if n.child("a") != nil || b.Entry != l.Entry || l.Entry != m.Entry || string(l.Entry.Data) != "one" ||
		l.Entry.Mode != 0o600 || l.Entry.Mtime.Sec != 9 {
		t.Error(show(n))
	}
	if _, err := Merge(t.Context(), base, []*content.Entry{root, {Path: "l", Kind: content.LowerLink,
		Target: "nope"}}); err == nil || !strings.Contains(err.Error(), "nope") {
		t.Error(err)
	}
}

// A source of a pair shows what follows from its bytes under all its names, also one that a later layer gives it.
func TestMergeShowsSources(t *testing.T) {
	root := dir("", 0, 0)
	source := file("m.py", "src", 1700000000)
	source.Flags = content.PySource
	time := int64(source.SourceTime())
	base := []*content.Entry{root, source}
	link := func(mtime int64) *content.Entry {
		at := content.Time{Sec: mtime}
		return &content.Entry{Path: "n.py", Kind: content.LowerLink, Target: "m.py", Mode: 0o644, Mtime: at}
	}
	for _, row := range []struct {
		name  string
		above []*content.Entry
		want  int64
	}{
		{"alone", nil, time},
		{"hard link made elsewhere", []*content.Entry{root, link(1700000000)}, time},
		{"hard link made here", []*content.Entry{root, link(time)}, time},
		{"hard link of another time", []*content.Entry{root, link(5)}, 5},
		{"replaced", []*content.Entry{root, file("m.py", "new", 1700000000)}, 1700000000},
	} {
		t.Run(row.name, func(t *testing.T) {
			n, err := Merge(t.Context(), base, row.above)
			if err != nil {
				t.Fatal(err)
			}
			m := n.child("m.py")
			if m.Entry.Mtime.Sec != row.want {
				t.Errorf("m.py shows %d, want %d", m.Entry.Mtime.Sec, row.want)
			}
			if n := n.child("n.py"); n != nil && n.Entry != m.Entry {
				t.Error("its names are two inodes")
			}
		})
	}
	if source.Mtime.Sec != 1700000000 {
		t.Error("Merge changes what it is given")
	}
}

// Files shows the regular files that Read returns, one at a time, and checks the same.
func TestFiles(t *testing.T) {
	entries := torture()
	enc := Encode(content.Exact, entries)
	file, err := enc.Marshal(Facts{})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "tree")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	type seen struct {
		Path, Data string
		Size       int64
		Object     content.ObjectID
	}
	var want, got []seen
	for _, e := range entries {
		if e.Kind == content.Regular {
			want = append(want, seen{e.Path, string(e.Data), e.Size, e.Object})
		}
	}
	err = Files(path, enc.ID, func(f *File) error {
		got = append(got, seen{string(f.Path), string(f.Data), f.Size, f.Object})
		return nil
	})
	if d := cmp.Diff(want, got); err != nil || d != "" || len(want) < 3 {
		t.Error(err, d)
	}
	calls, stop := 0, errors.New("enough")
	if err := Files(path, enc.ID, func(*File) error { calls++; return stop }); err != stop || calls != 1 {
		t.Error(err, calls)
	}
	if err := Files(path, content.LayerID{},
		func(*File) error { t.Error("a damaged tree is shown"); return nil }); err == nil {
		t.Error("a damaged tree is no error")
	}
	for n := range file { // no cut may panic, or pass for the whole
		if err := os.WriteFile(path, file[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Files(path, enc.ID, func(*File) error { return nil }); err == nil {
			t.Errorf("a tree cut to %d of %d bytes is no error", n, len(file))
		}
	}
}
