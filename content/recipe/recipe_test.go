package recipe

import (
	"archive/tar"
	"bufio"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
)

// memory is a store of objects.
type memory map[content.ObjectID][]byte

func (m memory) Put(e *content.Entry, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if len(data) <= content.InlineMax {
		e.Data = data
		return nil
	}
	e.Object.Sum = sha256.Sum256(data)
	m[e.Object] = data
	return nil
}

func (m memory) readAt(id content.ObjectID, b []byte, off int64) error {
	data, ok := m[id]
	if !ok || off+int64(len(b)) > int64(len(data)) {
		return errors.New("no such object")
	}
	copy(b, data[off:])
	return nil
}

// layerOf is the layer of a tar.
func layerOf(t testing.TB, data []byte) Layer {
	t.Helper()
	m := memory{}
	entries, err := archive.ReadTar(context.Background(), bytes.NewReader(data), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	return Layer{ID: content.LayerID{Sum: sha256.Sum256(data)}, Entries: entries, ReadAt: m.readAt}
}

type member struct {
	tar.Header
	data []byte
}

func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d of many that are much alike\n", r.IntN(5000))
	}
	return b.Bytes()[:n]
}

func pyc(mtime byte, n int) []byte {
	b := append([]byte("\xa7\x0d\r\n\x00\x00\x00\x00"), mtime, 0, 0, 0, 9, 0, 0, 0)
	return append(b, noise(3, n)...)
}

func tarOf(t testing.TB, list ...member) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, m := range list {
		h := m.Header
		h.Size = int64(len(m.data))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// usual has what most layers have, and more than a block of pgzip.
func usual(t testing.TB) []byte {
	t.Helper()
	list := []member{
		{Header: tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755}},
		{tar.Header{Name: "usr/small"}, []byte("inline")},
		{tar.Header{Name: "usr/empty"}, nil},
		{tar.Header{Name: "usr/text"}, text(1, 2_500_000)},
		{tar.Header{Name: "usr/noise"}, noise(1, 300_000)},
		{Header: tar.Header{Name: "usr/link", Typeflag: tar.TypeLink, Linkname: "usr/text"}},
		{Header: tar.Header{Name: "usr/symlink", Typeflag: tar.TypeSymlink, Linkname: "text"}},
		{Header: tar.Header{Name: "usr/.wh.gone"}},
		{tar.Header{Name: "etc/" + strings.Repeat("long/", 40) + "name"}, text(2, 5000)},
		{tar.Header{Name: "etc/pax", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}, text(3, 700)},
		{tar.Header{Name: "./etc/../etc/odd"}, text(4, 900)},
	}
	for n := range 300 {
		list = append(list, member{tar.Header{Name: fmt.Sprintf("var/%03d", n)}, text(uint64(n), 10+n*9)})
	}
	return tarOf(t, list...)
}

type opener func(io.Writer) (io.WriteCloser, error)

func compress(t testing.TB, data []byte, open opener) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := open(&out)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(data); at += 3000 {
		if _, err := w.Write(data[at:min(at+3000, len(data))]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func std(level int) opener {
	return func(w io.Writer) (io.WriteCloser, error) { return stdgzip.NewWriterLevel(w, level) }
}

func blobOf(blob []byte, tarSize int) Blob {
	return Blob{Sum: sha256.Sum256(blob), Size: int64(len(blob)), TarSize: int64(tarSize),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob)), nil }}
}

// roundTrip makes a recipe, and the blob of it.
func roundTrip(t testing.TB, data, blob []byte, l Layer) (*Recipe, Stats, []byte) {
	t.Helper()
	var file bytes.Buffer
	stats, err := Make(context.Background(), &file, blobOf(blob, len(data)), l, nil)
	if err != nil {
		t.Fatal(err)
	}
	bytesOf := bytes.Clone(file.Bytes())
	r, err := Read(&file)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var again bytes.Buffer
	if err := r.Build(context.Background(), &again, l); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.Bytes(), blob) {
		t.Error("the blob is another one")
	}
	return r, stats, bytesOf
}

// What a library here makes, in writes of any size, is made again by the same one, whatever its gzip header says.
func TestEncoders(t *testing.T) {
	data := usual(t)
	l := layerOf(t, data)
	named := func(w io.Writer) (io.WriteCloser, error) {
		z, err := stdgzip.NewWriterLevel(w, 6)
		z.Name, z.Comment, z.Extra, z.OS = "layer.tar", "any", []byte("extra"), 3
		return z, err
	}
	for _, row := range []struct {
		want string
		open opener
	}{
		{"tar", func(w io.Writer) (io.WriteCloser, error) { return plain{w}, nil }},
		{"compress/gzip 6", named},
		{"compress/gzip 6", std(stdgzip.DefaultCompression)},
		{"compress/gzip 1", std(1)},
		{"compress/gzip 9", std(9)},
		{"klauspost/gzip 3", func(w io.Writer) (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, 3) }},
		{"pgzip 5 1024k", func(w io.Writer) (io.WriteCloser, error) { return pgzip.NewWriter(w), nil }},
		{"pgzip 3 256k", func(w io.Writer) (io.WriteCloser, error) {
			z, err := pgzip.NewWriterLevel(w, 3)
			return z, errors.Join(err, z.SetConcurrency(256<<10, 3))
		}},
		{"klauspost/zstd 2", func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }},
	} {
		t.Run(row.want, func(t *testing.T) {
			r, stats, _ := roundTrip(t, data, compress(t, data, row.open), l)
			if r.Encoder != row.want {
				t.Errorf("encoder %q, want %q", r.Encoder, row.want)
			}
			if stats.Kept != 0 || stats.Payloads < 300 {
				t.Errorf("%+v", stats)
			}
		})
	}
}

// A tar comes back as it was, whatever is odd about it.
func TestOddTars(t *testing.T) {
	short := tarOf(t, member{tar.Header{Name: "a"}, text(1, 5000)})
	for _, row := range []struct {
		name string
		data []byte
		kept int64 // content that has to be in the recipe
	}{
		{"no member", tarOf(t), 0},
		{"garbage behind the end", append(bytes.Clone(short), noise(5, 30_000)...), 0},
		{"no end", short[:len(short)-1024], 0},
		{"replaced later", tarOf(t, member{tar.Header{Name: "a"}, text(1, 5000)},
			member{tar.Header{Name: "a"}, text(2, 6000)}), 5000},
		{"replaced by the same", tarOf(t, member{tar.Header{Name: "a"}, text(1, 5000)},
			member{tar.Header{Name: "a"}, text(1, 5000)}), 0},
		{"below a symbolic link", tarOf(t, member{Header: tar.Header{Name: "d", Typeflag: tar.TypeDir, Mode: 0o755}},
			member{Header: tar.Header{Name: "s", Typeflag: tar.TypeSymlink, Linkname: "d"}},
			member{tar.Header{Name: "s/a"}, text(1, 5000)}), 0},
		{"not in order", tarOf(t, member{tar.Header{Name: "z"}, text(1, 5000)}, member{tar.Header{Name: "b"}, text(2, 100)},
			member{tar.Header{Name: "a"}, text(3, 900)}), 0},
		{"a linked name comes first", tarOf(t, member{tar.Header{Name: "z"}, text(1, 5000)},
			member{Header: tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "z"}}), 0},
		{"old sparse", oldSparse(t), 0},
		{"pax sparse", tarOf(t, member{tar.Header{Name: "a", PAXRecords: map[string]string{
			"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a", "GNU.sparse.numblocks": "1",
			"GNU.sparse.map": "0,4", "GNU.sparse.size": "1000000", "GNU.sparse.realsize": "1000000"}}, []byte("data")}), 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			blob := compress(t, row.data, std(6))
			_, stats, _ := roundTrip(t, row.data, blob, layerOf(t, row.data))
			if stats.Kept != row.kept {
				t.Errorf("%+v", stats)
			}
		})
	}
}

// oldSparse is a member of GNU tar's old format: a map in the header, and only the data behind it.
func oldSparse(t testing.TB) []byte {
	t.Helper()
	data := tarOf(t, member{tar.Header{Name: "lastlog", Format: tar.FormatGNU}, text(1, 600)})
	h := data[:512]
	h[156] = tar.TypeGNUSparse
	copy(h[386:], fmt.Sprintf("%011o\x00%011o\x00", 4096, 600))
	copy(h[483:], fmt.Sprintf("%011o\x00", 4696))
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return data
}

// Bytecode whose timestamp was changed on its way into the layer costs four bytes more.
func TestBytecode(t *testing.T) {
	big, small := pyc(7, 900_000), pyc(7, 100)
	data := tarOf(t, member{tar.Header{Name: "big.pyc"}, big}, member{tar.Header{Name: "small.pyc"}, small})
	l := layerOf(t, tarOf(t, member{tar.Header{Name: "big.pyc"}, pyc(9, 900_000)},
		member{tar.Header{Name: "small.pyc"}, pyc(8, 100)}))
	for _, e := range l.Entries {
		e.Flags |= content.PycPaired
	}
	_, stats, _ := roundTrip(t, data, compress(t, data, std(6)), l)
	if stats.Stamped != 2 || stats.Kept != 0 {
		t.Errorf("%+v", stats)
	}
}

func TestRefused(t *testing.T) {
	data := usual(t)
	l := layerOf(t, data)
	half := len(data) / 2
	for _, row := range []struct {
		name string
		blob []byte
		data []byte
		want error
	}{
		{"two members", append(compress(t, data[:half], std(6)), compress(t, data[half:], std(6))...), data, ErrNoEncoder},
		{"flushed in between", compress(t, data, func(w io.Writer) (io.WriteCloser, error) {
			z, err := stdgzip.NewWriterLevel(w, 6)
			_, werr := z.Write(nil)
			return z, errors.Join(err, werr, z.Flush())
		}), data, ErrNoEncoder},
		{"a file that is not in the layer", nil, tarOf(t, member{tar.Header{Name: "x"}, noise(9, 2<<20)}), ErrTooLarge},
		{"garbage as long as the rest", nil, append(tarOf(t, member{tar.Header{Name: "usr/noise"}, noise(1, 300_000)}),
			noise(8, 400_000)...), ErrTooLarge},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.blob == nil {
				row.blob = compress(t, row.data, std(6))
			}
			if _, err := Make(t.Context(), io.Discard, blobOf(row.blob, len(row.data)), l, nil); !errors.Is(err, row.want) {
				t.Errorf("%v, want %v", err, row.want)
			}
		})
	}
}

// A recipe that was cut off, changed, or made for something else is refused, and never gives other bytes.
func TestDamage(t *testing.T) {
	data := tarOf(t, member{tar.Header{Name: "a"}, text(1, 5000)}, member{tar.Header{Name: "b"}, noise(1, 200)})
	l := layerOf(t, data)
	blob := compress(t, data, std(6))
	_, _, file := roundTrip(t, data, blob, l)
	build := func(file []byte, l Layer) error {
		r, err := Read(bytes.NewReader(file))
		if err != nil {
			return err
		}
		defer r.Close()
		var out bytes.Buffer
		err = r.Build(t.Context(), &out, l)
		if err == nil && !bytes.Equal(out.Bytes(), blob) {
			t.Fatal("other bytes, and no error")
		}
		return err
	}
	for n := range file {
		changed := bytes.Clone(file)
		changed[n] ^= 0x55
		if build(file[:n], l) == nil {
			t.Errorf("%d bytes are enough", n)
		}
		_ = build(changed, l) // a bit of zstd's frame header may mean nothing
	}
	other := l
	other.ID = content.LayerID{Sum: sha256.Sum256(nil)}
	if err := build(file, other); !errors.Is(err, ErrDamaged) {
		t.Errorf("of another layer: %v", err)
	}
	other = l
	other.ReadAt = func(content.ObjectID, []byte, int64) error { return nil } // zeros
	if err := build(file, other); !errors.Is(err, ErrOtherBytes) {
		t.Errorf("other payloads: %v", err)
	}
	r, err := Read(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	r.Fingerprint[0]++
	if err := r.Build(t.Context(), io.Discard, l); !errors.Is(err, ErrOtherEncoder) {
		t.Errorf("another encoder: %v", err)
	}
}

// The fixed text never changes.
func TestFixedText(t *testing.T) {
	const want = "1db9ad81fb6467dde2a4608027102aeaf7476b3f4baa2641313196065a488b52"
	if got := content.Sum(sha256.Sum256(fixedText())).Hex(); got != want {
		t.Errorf("%s", got)
	}
}

func FuzzRead(f *testing.F) {
	data := tarOf(f, member{tar.Header{Name: "a"}, text(1, 5000)}, member{tar.Header{Name: "b"}, noise(1, 200)})
	l := layerOf(f, data)
	_, _, file := roundTrip(f, data, compress(f, data, std(6)), l)
	z, err := zstd.NewReader(nil)
	if err != nil {
		f.Fatal(err)
	}
	defer z.Close()
	raw, err := z.DecodeAll(file, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		// Without zstd, whose checksum would keep everything else out.
		r := &Recipe{in: bufio.NewReader(bytes.NewReader(raw)), last: -1}
		if r.readHeader() != nil {
			return
		}
		var n counter
		if err := r.tar(t.Context(), &n, l); int64(n) > r.TarSize || err == nil && int64(n) != r.TarSize {
			t.Errorf("%d of %d bytes: %v", n, r.TarSize, err)
		}
	})
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
