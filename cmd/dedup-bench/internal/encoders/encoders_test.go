package encoders

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"os"
	"path/filepath"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

func testTar(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	text := bytes.Repeat([]byte("a line of many that are alike\n"), 5000)
	for _, f := range []struct {
		name string
		data []byte
	}{{"text", text}, {"empty", nil}, {"a.pyc", append([]byte("cafe\x00\x00\x00\x00"), text[:100]...)}} {
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

// A program is an encoder like those of a library.
func TestFind(t *testing.T) {
	data := testTar(t)
	var blob bytes.Buffer
	z, err := stdgzip.NewWriterLevel(&blob, 4)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	path, tarPath := filepath.Join(t.TempDir(), "blob"), filepath.Join(t.TempDir(), "tar")
	if err := os.WriteFile(path, blob.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tarPath, data, 0o600); err != nil {
		t.Fatal(err)
	}
	programs := []recipe.Encoder{
		command(recipe.Gzip, "none", "cat"),
		command(recipe.Gzip, "all", "sh", "-c", "cat >/dev/null; cat \"$0\"", path),
	}
	for _, row := range []struct {
		want string
		list []recipe.Encoder
	}{
		{"compress/gzip 4", recipe.Encoders(recipe.Gzip)}, {"all", programs}, {"", programs[:1]},
	} {
		if m, err := Find(t.Context(), path, row.list); err != nil || m.Encoder != row.want {
			t.Errorf("found %+v, %v; want %q", m, err, row.want)
		}
	}
	if m, err := Find(t.Context(), tarPath, recipe.Encoders(recipe.Plain)); err != nil || m.Encoder != "tar" {
		t.Errorf("found %+v, %v", m, err)
	}
}

func TestRecipe(t *testing.T) {
	path, data := filepath.Join(t.TempDir(), "tar"), testTar(t)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := MakeRecipe(t.Context(), path, data)
	if err != nil || r.Files != 2 || r.Pycs != 1 || r.Bytes == 0 || r.Bytes > 1000 || r.Encoder != "tar" {
		t.Errorf("%+v, %v", r, err)
	}
}
