package image

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A layer's digests are those of what is in its file, in each compression, and survive
// a Save and Load.
func TestLayerDigests(t *testing.T) {
	for _, c := range []Compression{Gzip, Gzips, Estargz, Zstd, Zstds, None} {
		t.Run(string(c), func(t *testing.T) {
			dir := t.TempDir()
			l, err := FromEntries(dir, LayerOptions{Compression: c}, Dir("d"), File("d/f", "content"), Symlink("s", "d"))
			if err != nil {
				t.Fatal(err)
			}
			blob, err := os.ReadFile(l.File)
			if err != nil {
				t.Fatal(err)
			}
			if hexSum(blob) != l.Hash.Hex || int64(len(blob)) != l.Length {
				t.Errorf("blob is %s, %d bytes; the layer says %s, %d", hexSum(blob), len(blob), l.Hash.Hex, l.Length)
			}
			saved := filepath.Join(dir, "layer.json")
			if err := l.Save(saved); err != nil {
				t.Fatal(err)
			}
			loaded, err := Load(dir, saved)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(l, loaded, cmp.AllowUnexported(Layer{})); diff != "" {
				t.Errorf("loaded layer (-saved +loaded):\n%s", diff)
			}
			r, err := loaded.Uncompressed()
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil {
				t.Fatal(err)
			}
			if hexSum(text) != l.Diff.Hex || int64(len(text)) != l.TarSize {
				t.Errorf("tar is %s, the layer says %s", hexSum(text), l.Diff.Hex)
			}
			if err := os.Truncate(l.File, 10); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(dir, saved); err == nil {
				t.Error("a truncated blob was loaded")
			}
		})
	}
}

// A directory's hardlinks, symlinks and sizes arrive in its tar, and Map is obeyed.
func TestWriteDir(t *testing.T) {
	root := t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(root, "a/b"), 0o755),
		os.WriteFile(filepath.Join(root, "a/b/one"), []byte("12345"), 0o640),
		os.Link(filepath.Join(root, "a/b/one"), filepath.Join(root, "a/two")),
		os.Symlink("b/one", filepath.Join(root, "a/three")),
		os.WriteFile(filepath.Join(root, "left-out"), nil, 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r, w := io.Pipe()
	go func() {
		err := WriteDir(w, root, DirOptions{Map: func(h *tar.Header) bool {
			h.Uid = 77
			return h.Name != "left-out"
		}})
		w.CloseWithError(err)
	}()
	type member struct {
		Name, Link string
		Type       byte
		Size       int64
		UID        int
	}
	var got []member
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, member{h.Name, h.Linkname, h.Typeflag, h.Size, h.Uid})
	}
	want := []member{
		{"a/", "", tar.TypeDir, 0, 77},
		{"a/b/", "", tar.TypeDir, 0, 77},
		{"a/b/one", "", tar.TypeReg, 5, 77},
		{"a/three", "b/one", tar.TypeSymlink, 0, 77},
		{"a/two", "a/b/one", tar.TypeLink, 0, 77},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
}

func hexSum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
