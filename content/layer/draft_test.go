package layer

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// A draft comes to the same layers as an ingest of the same blob, and its tree files have the same length.
func TestDraftBlob(t *testing.T) {
	const m = 1700000000
	source, code := big("import sys"), string(bytes.Repeat([]byte("long bytecode"), 3*chunkSize/13))
	for name, plain := range map[string][]byte{
		"empty":  makeTar(t),
		"python": pythonLayer(t, m, 7),
		"long bytecode": makeTar(t,
			member{"long.py", source, m, 0}, member{"long.pyc", pycOf(m, uint32(len(source)), code), m, 0},
			member{"stale.py", source, m, 0}, member{"stale.pyc", pycOf(m-1, uint32(len(source)), code), m, 0}),
		"large": makeTar(t, member{"large", string(bytes.Repeat([]byte("0123456789abcdef"), bufferMax/16+1)), m, 0},
			member{"small", "x", m, 0}),
	} {
		for _, f := range []content.Fidelity{content.Exact, content.Python} {
			t.Run(fmt.Sprintf("%s, %s", name, f), func(t *testing.T) {
				blob := compress(t, plain, 1)
				d, err := DraftBlob(t.Context(), digest.FromBytes(blob), bytes.NewReader(blob))
				if err != nil {
					t.Fatal(err)
				}
				s := openStore(t, t.TempDir(), f)
				in := ingest(t, s, blob)
				facts, err := s.Facts(in.Layer)
				if err != nil {
					t.Fatal(err)
				}
				got := map[content.Fidelity]DraftTree{content.Exact: d.Exact, content.Python: d.Python}[f]
				if got.ID != in.Layer || got.Payload != facts.Payload || d.DiffID != in.DiffID || d.TarSize != in.TarSize {
					t.Errorf("drafted %s, %s, %s, %d; stored %+v, %s", got.ID, got.Payload, d.DiffID, d.TarSize, in, facts.Payload)
				}
				file, err := os.ReadFile(s.treePath(in.Layer))
				if err != nil {
					t.Fatal(err)
				}
				if diff := len(file) - len(got.File); diff < -8 || diff > 8 { // digits of what the ingest added
					t.Errorf("the tree file has %d bytes, the draft %d", len(file), len(got.File))
				}
				if entries, err := got.Entries(); err != nil || int64(len(entries)) != facts.Entries {
					t.Errorf("%d entries, %v; stored %d", len(entries), err, facts.Entries)
				}
			})
		}
	}
}

func TestDraftDir(t *testing.T) {
	dir := t.TempDir()
	source := big("import os")
	for name, data := range map[string]string{"a.py": source, "a.pyc": pycOf(1700000000, uint32(len(source)), big("code")),
		"large": big("large"), "tiny": "x"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Unix(1700000000, 0), time.Unix(1700000000, 0)); err != nil {
			t.Fatal(err)
		}
	}
	var read int64
	d, err := DraftDir(t.Context(), dir, content.DiffID{}, func(n int64) { read += n })
	if err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), content.Python)
	in, err := s.IngestDir(t.Context(), Dir{Upper: dir})
	if err != nil {
		t.Fatal(err)
	}
	if d.Python.ID != in.Layer || d.TarSize != 0 {
		t.Errorf("drafted %s, stored %s", d.Python.ID, in.Layer)
	}
	_, entries, err := tree.Decode(d.Exact.File, d.Exact.ID)
	if err != nil {
		t.Fatal(err)
	}
	var want int64
	for _, e := range entries {
		want += e.Size
	}
	if read != want || want == 0 {
		t.Errorf("read %d bytes of %d", read, want)
	}
}

func TestDraftOfBadBlob(t *testing.T) {
	whole := compress(t, pythonLayer(t, 1700000000, 0), 1)
	for name, blob := range map[string][]byte{"truncated": whole[:len(whole)/2],
		"no tar": compress(t, bytes.Repeat([]byte("x"), 2000), 1)} {
		if _, err := DraftBlob(t.Context(), digest.FromBytes(blob), bytes.NewReader(blob)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
