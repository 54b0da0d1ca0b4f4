package forecast

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// member is one tar member; a name that ends in a slash is a directory's, link makes it a symlink.
type member struct {
	name, data, link string
	mtime            int64
}

func makeTar(t *testing.T, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.data)), ModTime: time.Unix(m.mtime, 0),
			Linkname: m.link}
		switch {
		case strings.HasSuffix(m.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case m.link != "":
			h.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func draft(t *testing.T, blob []byte) layer.Draft {
	t.Helper()
	d, err := layer.DraftBlob(t.Context(), digest.FromBytes(blob), bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// pyc is a timestamp .pyc of CPython 3.11.
func pyc(mtime int64, source, code string) string {
	b := []byte{0xa7, 0x0d, '\r', '\n', 0, 0, 0, 0, 0, 0, 0, 0, byte(len(source)), byte(len(source) >> 8), 0, 0}
	content.SetPycTime(b, uint32(mtime))
	return string(b) + code
}

// builds are the tars of a base with many files, and of two builds of one application on it.
func builds(t *testing.T) [][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	text := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return string(b)
	}
	base := []member{{name: "usr/"}, {name: "usr/lib/"}}
	for i := range 4000 {
		base = append(base, member{name: fmt.Sprintf("usr/lib/file-%d", i), data: text(rng.IntN(2 * content.InlineMax))})
	}
	large, source, code := text(300_000), text(5000), text(9000)
	app := func(mtime int64) []member {
		return []member{
			{name: "app/", mtime: mtime}, {name: "app/large", data: large, mtime: mtime},
			{name: "app/m.py", data: source, mtime: mtime}, {name: "app/m.pyc", data: pyc(mtime, source, code), mtime: mtime},
			{name: "app/link", link: strings.Repeat("x", 100), mtime: mtime},
		}
	}
	return [][]byte{makeTar(t, base...), makeTar(t, app(1_700_000_000)...), makeTar(t, app(1_700_009_999)...)}
}

// What is forecast is what a store then measures.
func TestOf(t *testing.T) {
	blobs := builds(t)
	var drafts []layer.Draft
	for _, b := range blobs {
		drafts = append(drafts, draft(t, b))
	}
	for _, f := range []content.Fidelity{content.Exact, content.Python} {
		got, err := Of(t.Context(), Options{Fidelity: f}, drafts, []Chain{{0, 1}, {0, 2}, {0, 1}})
		if err != nil {
			t.Fatal(err)
		}
		s, err := layer.Open(t.Context(), layer.Options{Root: t.TempDir(), Fidelity: f}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		var ids []content.LayerID
		for _, b := range blobs {
			in, err := s.IngestBlob(t.Context(),
				layer.Blob{Digest: digest.FromBytes(b), Open: func(context.Context) (io.ReadCloser, error) {
					return io.NopCloser(bytes.NewReader(b)), nil
				}})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, in.Layer)
		}
		all, err := s.Measure(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stored := Add(got.Packs, got.Trees)
		if want := s.Used(); stored.Inodes+got.Directories.Inodes != want.Inodes {
			t.Errorf("%s: %+v forecast, the store has %+v", f, got, want)
		}
		if d := all.Bytes - stored.Bytes - got.Directories.Bytes; onExt4(t) && (d < -all.Bytes/50 || d > all.Bytes/50) {
			t.Errorf("%s: %d bytes forecast, %d measured", f, stored.Bytes+got.Directories.Bytes, all.Bytes)
		}
		var images layer.Usage
		for _, chain := range [][]content.LayerID{{ids[0], ids[1]}, {ids[0], ids[2]}} {
			root, err := s.Merge(t.Context(), chain)
			if err != nil {
				t.Fatal(err)
			}
			n, err := erofs.WriteChain(t.Context(), io.Discard, root, options(t, s, root))
			if err != nil {
				t.Fatal(err)
			}
			images = Add(images, layer.Usage{Bytes: n, Inodes: 1})
		}
		if d := cmp.Diff(images, got.ChainImages); d != "" {
			t.Errorf("%s: chain images (-written +forecast):\n%s", f, d)
		}
	}
}

// options are those of the image of a merged tree, as the snapshotter has them.
func options(t *testing.T, s *layer.Store, root *tree.Node) erofs.Options {
	t.Helper()
	placed, err := s.Places(t.Context(), root.Objects())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = placed.Release() })
	return erofs.Options{Place: placed.Place, Packs: placed.Packs(), Redirect: true}
}

// fs-verity costs blocks of hashes for each pack.
func TestOfVerity(t *testing.T) {
	drafts := []layer.Draft{draft(t, builds(t)[1])}
	plain, err := Of(t.Context(), Options{Fidelity: content.Python}, drafts, []Chain{{0}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := Of(t.Context(), Options{Fidelity: content.Python, Verity: true}, drafts, []Chain{{0}})
	if err != nil {
		t.Fatal(err)
	}
	if more := got.Packs.Bytes - plain.Packs.Bytes; more != 2*4096 || got.Packs.Inodes != 1 || got.Trees != plain.Trees ||
		got.ChainImages != plain.ChainImages {
		t.Errorf("%d bytes more: %+v, %+v", more, plain, got)
	}
}

// The second build adds one payload of bytecode under exact, and none under python.
func TestOfPython(t *testing.T) {
	var drafts []layer.Draft
	for _, b := range builds(t) {
		drafts = append(drafts, draft(t, b))
	}
	packs := func(f content.Fidelity, drafts ...layer.Draft) int64 {
		s, err := Of(t.Context(), Options{Fidelity: f}, drafts, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s.Packs.Inodes
	}
	for f, more := range map[content.Fidelity]int64{content.Exact: 1, content.Python: 0} {
		if got := packs(f, drafts[1:]...) - packs(f, drafts[1]); got != more {
			t.Errorf("%s: the second build adds %d packs, want %d", f, got, more)
		}
	}
}

func onExt4(t *testing.T) bool {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(t.TempDir(), &st); err != nil {
		t.Fatal(err)
	}
	return st.Type == unix.EXT4_SUPER_MAGIC
}

func TestDirectories(t *testing.T) {
	if !onExt4(t) {
		t.Skip("the directory for temporary files is not on ext4")
	}
	for i, b := range builds(t) {
		dir := t.TempDir()
		unpack(t, dir, b)
		want, err := layer.DiskUsage(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Directories(draft(t, b))
		if err != nil {
			t.Fatal(err)
		}
		if d := got.Bytes - want.Bytes; got.Inodes != want.Inodes || d < -want.Bytes/100 || d > want.Bytes/100 {
			t.Errorf("layer %d: %+v, want %+v", i, got, want)
		}
	}
}

func unpack(t *testing.T, dir string, b []byte) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		default:
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestDuplicates(t *testing.T) {
	const m = 1_700_000_000
	source := strings.Repeat("import os\n", 1000)
	site := "usr/lib/python3.11/site-packages/"
	build := func(mtime int64) layer.Draft {
		return draft(t, makeTar(t,
			member{name: site + "a/m.py", data: source, mtime: mtime},
			member{name: site + "a/m.pyc", data: pyc(mtime, source, source), mtime: mtime},
			member{name: site + "b/tiny", data: "tiny", mtime: mtime}, member{name: "etc/own", data: fmt.Sprint(mtime),
				mtime: mtime},
			member{name: "usr/lib/x", data: strings.Repeat("lib", 4000), mtime: mtime},
			member{name: "usr/share/doc", data: strings.Repeat("doc", 4000), mtime: mtime}))
	}
	top, all, err := Duplicates([]layer.Draft{build(m), build(m + 7)}, []int{2, 1})
	if err != nil {
		t.Fatal(err)
	}
	const py, doc = 12288, 12288 // blocks of one copy
	want := []Prefix{
		{Path: "usr/lib/python3.11/site-packages", Bytes: 2 * (2*py + 4096), Files: 6, Parts: []Prefix{
			{Path: "a", Bytes: 2 * 2 * py, Files: 4}, {Path: "b", Bytes: 2 * 4096, Files: 2},
		}},
		{Path: "usr/lib", Bytes: 2 * doc, Files: 2, Rest: true},
		{Path: "usr/share", Bytes: 2 * doc, Files: 2},
		{Path: "etc", Bytes: 4096, Files: 1},
	}
	if d := cmp.Diff(want, top, cmpopts.EquateEmpty()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(Prefix{Bytes: 2*(2*py+4096) + 2*2*doc + 4096, Files: 11}, all); d != "" {
		t.Error(d)
	}
}

// Directories of objects have the size that ext4 gives them, give or take how its hashes fall.
func TestDirectory(t *testing.T) {
	if !onExt4(t) {
		t.Skip("the directory for temporary files is not on ext4")
	}
	for _, n := range []int{0, 50, 80, 300, 1000} {
		var got, want int64
		for dir := range 2 {
			path := filepath.Join(t.TempDir(), fmt.Sprint(dir))
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			for i := range n {
				name := digest.FromString(fmt.Sprint(dir, i)).Encoded()[2:]
				if err := os.WriteFile(filepath.Join(path, name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			want += st.Blocks * 512
			got += directory(n, n*dirent(62))
		}
		if got < want*80/100 || got > want*120/100 {
			t.Errorf("%d objects: %d bytes, want %d", n, got, want)
		}
	}
}
