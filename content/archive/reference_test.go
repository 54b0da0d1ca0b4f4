package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	reference "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// hashing is a Payloads that names every payload by its sha256.
type hashing struct{}

func (hashing) Put(e *content.Entry, r io.Reader) error {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return err
	}
	if n != e.Size {
		return fmt.Errorf("payload has %d bytes, the entry says %d", n, e.Size)
	}
	h.Sum(e.Object.Sum[:0])
	return nil
}

// readTar reads a tar that must be fine.
func readTar(t *testing.T, data []byte) []*content.Entry {
	t.Helper()
	got, err := ReadTar(t.Context(), bytes.NewReader(data), hashing{}, nil)
	if err != nil {
		t.Fatalf("ReadTar: %v", err)
	}
	checkEntries(t, got)
	return got
}

// checkEntries checks what ReadTar and ReadDir promise of every result.
func checkEntries(t *testing.T, entries []*content.Entry) {
	t.Helper()
	if len(entries) == 0 || entries[0].Path != "" || entries[0].Kind != content.Dir {
		t.Fatal("the root does not come first")
	}
	byPath := map[string]*content.Entry{}
	for i, e := range entries {
		byPath[e.Path] = e
		if i == 0 {
			continue
		}
		if content.ComparePaths(entries[i-1].Path, e.Path) >= 0 {
			t.Fatalf("%q comes before %q", entries[i-1].Path, e.Path)
		}
		if filepath.Clean("/"+e.Path) != "/"+e.Path {
			t.Fatalf("path %q is not clean", e.Path)
		}
		dir, _ := content.SplitPath(e.Path)
		if d := byPath[dir]; d == nil || d.Kind != content.Dir {
			t.Fatalf("%q has no parent directory", e.Path)
		}
		if e.Kind == content.Hardlink {
			if o := byPath[e.Target]; o == nil || o.Kind == content.Hardlink || o.Kind == content.Dir ||
				o.Kind == content.Whiteout {
				t.Fatalf("hardlink %q to %q has no inode before it", e.Path, e.Target)
			}
		}
		for j, x := range e.Xattrs {
			if j > 0 && e.Xattrs[j-1].Name >= x.Name {
				t.Fatalf("%q: attributes are not sorted", e.Path)
			}
		}
	}
}

// applyReference applies a tar with containerd's own applier, and reads what
// overlayfs would find in its upper directory.
func applyReference(t *testing.T, data []byte) ([]*content.Entry, error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the reference makes devices and sets trusted attributes")
	}
	dir := filepath.Join(t.TempDir(), "upper")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	_, err := reference.Apply(context.Background(), dir, bytes.NewReader(data),
		reference.WithConvertWhiteout(reference.OverlayConvertWhiteout))
	if err != nil {
		return nil, err
	}
	entries, err := ReadDir(t.Context(), dir, "", hashing{}, nil)
	if err != nil {
		t.Fatalf("ReadDir: %v", err)
	}
	checkEntries(t, entries)
	return entries, nil
}

// diffReference compares ReadTar's result with the reference's, but for what the
// reference leaves to the moment of unpacking: the root's metadata and the times
// of implied directories.
func diffReference(got, want []*content.Entry) string {
	implied := map[string]bool{"": true}
	for _, e := range got {
		if e.Flags&content.Implied != 0 {
			implied[e.Path] = true
		}
	}
	normal := func(entries []*content.Entry) []string {
		var out []string
		for _, e := range entries {
			c := *e
			if implied[c.Path] {
				c.Mtime, c.Flags = content.Time{}, c.Flags&^content.Implied
			}
			out = append(out, describe(&c))
		}
		return out
	}
	return cmp.Diff(normal(want), normal(got))
}

// describe is an entry as a line, for tests to compare and people to read.
func describe(e *content.Entry) string {
	s := fmt.Sprintf("%q %s", e.Path, kindNames[e.Kind])
	if e.Kind == content.Whiteout {
		return s
	}
	if e.Kind == content.Hardlink {
		return s + fmt.Sprintf(" -> %q", e.Target)
	}
	s += fmt.Sprintf(" %04o %d:%d %d.%09d", e.Mode, e.UID, e.GID, e.Mtime.Sec, e.Mtime.Nsec)
	switch e.Kind {
	case content.Symlink, content.LowerLink:
		s += fmt.Sprintf(" -> %q", e.Target)
	case content.Char, content.Block:
		s += fmt.Sprintf(" %d:%d", e.Major, e.Minor)
	case content.Regular:
		s += fmt.Sprintf(" %d bytes", e.Size)
		if e.Size > 0 {
			s += " " + e.Object.Hex()[:8]
		}
	}
	if e.Flags&content.Opaque != 0 {
		s += " opaque"
	}
	if e.Flags&content.Implied != 0 {
		s += " implied"
	}
	for _, x := range e.Xattrs {
		s += fmt.Sprintf(" %s=%s", x.Name, hex.EncodeToString(x.Value))
	}
	return s
}

var kindNames = map[content.Kind]string{
	content.Dir: "dir", content.Regular: "file", content.Symlink: "symlink", content.Char: "char",
	content.Block: "block", content.Fifo: "fifo", content.Hardlink: "hardlink",
	content.LowerLink: "lowerlink", content.Whiteout: "whiteout", content.Socket: "socket",
}
