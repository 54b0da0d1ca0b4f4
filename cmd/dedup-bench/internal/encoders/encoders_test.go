package encoders

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

// testTar has text, noise, bytecode and an empty file.
func testTar(t *testing.T) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 400_000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	var text bytes.Buffer
	for text.Len() < 3<<20 {
		fmt.Fprintf(&text, "line %d of many that are much alike\n", r.IntN(5000))
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"text", text.Bytes()}, {"noise", noise}, {"empty", nil},
		{"a.pyc", append([]byte("cafe\x00\x00\x00\x00"), noise[:100]...)},
	} {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Size: int64(len(f.data)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// What a library makes in writes of any size is found again, by the name of the library, whatever the gzip header says.
func TestFind(t *testing.T) {
	data := testTar(t)
	compress := func(open func(w io.Writer) (io.WriteCloser, error)) []byte {
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
	std := func(w io.Writer) (io.WriteCloser, error) {
		z, err := stdgzip.NewWriterLevel(w, 6)
		z.Name, z.Comment, z.Extra = "layer.tar", "any", []byte("extra")
		return z, err
	}
	goEncoder := writer("go", func(w io.Writer) (io.WriteCloser, error) { return stdgzip.NewWriterLevel(w, 6) })
	for _, row := range []struct {
		want string
		list []Encoder
		open func(w io.Writer) (io.WriteCloser, error)
	}{
		{"go", []Encoder{goEncoder}, std},
		{"", []Encoder{goEncoder}, func(w io.Writer) (io.WriteCloser, error) { return stdgzip.NewWriterLevel(w, 1) }},
		{"klauspost gzip 3", kinds(), func(w io.Writer) (io.WriteCloser, error) {
			return kgzip.NewWriterLevel(w, 3)
		}},
		{"pgzip 3, blocks of 1024 KiB", kinds(), func(w io.Writer) (io.WriteCloser, error) {
			return pgzip.NewWriterLevel(w, 3)
		}},
		{"klauspost zstd default", Zstd(), func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }},
	} {
		m, err := Find(t.Context(), compress(row.open), data, row.list)
		if err != nil || m.Encoder != row.want {
			t.Errorf("found %+v, %v; want %q", m, err, row.want)
		}
	}
}

func TestRecipe(t *testing.T) {
	data := testTar(t)
	r, err := MakeRecipe(data)
	if err != nil || !r.Same || r.Files != 3 || r.Pycs != 1 || r.Bytes == 0 || r.Bytes > 1000 {
		t.Errorf("%+v, %v", r, err)
	}
}
