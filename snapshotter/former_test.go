package snapshotter

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
	"time"
)

// member is one of a tar: a directory when its name ends in a slash, a symlink when it has a link.
type member struct {
	name, link, data string
	mtime            int64
}

func tarOfMembers(t *testing.T, members []member) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, m := range members {
		h := tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.data)), Linkname: m.link}
		h.ModTime = time.Unix(m.mtime, 0)
		switch {
		case strings.HasSuffix(m.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case m.link != "":
			h.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// bytecodeOf is a timestamp .pyc of CPython 3.11.
func bytecodeOf(mtime int64, source, code string) string {
	b := []byte{0xa7, 0x0d, '\r', '\n', 0, 0, 0, 0}
	b = binary.LittleEndian.AppendUint32(b, uint32(mtime))
	return string(binary.LittleEndian.AppendUint32(b, uint32(len(source)))) + code
}

// formerTars are the layers in testdata/layout-3.tar.gz: all that Python's files came as.
func formerTars(t *testing.T) [][]byte {
	t.Helper()
	const at = 1700000000
	large, other, tiny := strings.Repeat("import os\n", 200), strings.Repeat("import io\n", 200), "pass"
	code := func(name string) string { return strings.Repeat(name+" code ", 200) }
	return [][]byte{
		tarOfMembers(t, []member{
			{name: "app/"}, {name: "app/__pycache__/"},
			{name: "app/__pycache__/empty.cpython-311.pyc", data: bytecodeOf(at+3, "", "nothing"), mtime: at + 50},
			{name: "app/__pycache__/link.cpython-311.pyc", data: bytecodeOf(at, large, code("link")), mtime: at + 50},
			{name: "app/__pycache__/large.cpython-311.pyc", data: bytecodeOf(at, large, code("large")), mtime: at + 50},
			{name: "app/__pycache__/stale.cpython-311.pyc", data: bytecodeOf(at-1, other, code("stale")), mtime: at + 50},
			{name: "app/__pycache__/tiny.cpython-311.pyc", data: bytecodeOf(at+4, tiny, "tiny"), mtime: at + 50},
			{name: "app/empty.py", mtime: at + 3}, {name: "app/large.py", data: large, mtime: at},
			{name: "app/link.py", link: "large.py", mtime: at + 9},
			{name: "app/stale.py", data: other, mtime: at}, {name: "app/tiny.py", data: tiny, mtime: at + 4},
			{name: "else/"}, {name: "else/__pycache__/"},
			{name: "else/__pycache__/far.cpython-311.pyc", data: bytecodeOf(at, large, code("far")), mtime: at + 50},
			{name: "else/far.py", link: "../app/large.py", mtime: at + 9},
			{name: "lib/"}, {name: "lib/alone.py", data: other, mtime: at + 7},
		}),
		tarOfMembers(t, []member{
			{name: "app/__pycache__/large.cpython-311.opt-1.pyc", data: bytecodeOf(at, large, code("optimised")),
				mtime: at + 60},
			{name: "lib/__pycache__/"},
			{name: "lib/__pycache__/alone.cpython-311.pyc", data: bytecodeOf(at+7, other, code("alone")), mtime: at + 60},
		}),
	}
}
