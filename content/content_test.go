package content

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"testing"
	"time"
)

// Computed with sha256sum: 315705600 and the first 30 bits.
const (
	vectorEmpty  = 1270708752
	vectorImport = 547042431
)

func TestComparePaths(t *testing.T) {
	want := []string{"", "a", "a/b", "a/b/c", "a/b.c", "a\x01", "a.b", "a0", "b"}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, ComparePaths)
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// The vector is of the OCI image spec's formula, computed with sha256sum.
func TestChain(t *testing.T) {
	a, err := ParseSum("sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb")
	if err != nil {
		t.Fatal(err)
	}
	var none ChainID
	one := none.Chain(DiffID{a})
	if one.Sum != a {
		t.Errorf("chainID of a base layer is %s", one)
	}
	const want = "d76fa7fcc3c98373e78d03a76c1447a1bec04bf49a44cb1f098bd84523f8450f"
	if got := one.Chain(DiffID{a}).Hex(); got != want {
		t.Errorf("chainID %s", got)
	}
}

func TestPycSource(t *testing.T) {
	for path, want := range map[string]string{
		"a/__pycache__/m.cpython-311.pyc":       "a/m.py",
		"a/__pycache__/m.cpython-39.opt-1.pyc":  "a/m.py",
		"a/__pycache__/m.cpython-313.opt-2.pyc": "a/m.py",
		"__pycache__/m.cpython-311.pyc":         "m.py",
		"a/__pycache__/m.n.cpython-311.pyc":     "a/m.n.py",
		"a/m.pyc":                               "a/m.py",
		"m.pyc":                                 "m.py",
		"a/__pycache__/m.pyc":                   "",
		"a/__pycache__/.pyc":                    "",
		"a/.pyc":                                "",
		"a/m.py":                                "",
	} {
		if got, ok := PycSource(path); got != want || ok != (want != "") {
			t.Errorf("%s: %q, %v", path, got, ok)
		}
	}
}

func TestParsePyc(t *testing.T) {
	good := []byte{0xa7, 0x0d, '\r', '\n', 0, 0, 0, 0, 1, 2, 3, 4, 9, 0, 0, 0}
	h, ok := ParsePyc(good)
	if !ok || h.Mtime != 0x04030201 || h.Size != 9 {
		t.Errorf("%+v %v", h, ok)
	}
	for name, change := range map[string]func([]byte) []byte{
		"short":              func(b []byte) []byte { return b[:15] },
		"hash-based":         func(b []byte) []byte { b[4] = 1; return b },
		"checked hash-based": func(b []byte) []byte { b[4] = 3; return b },
		"python 2.7":         func(b []byte) []byte { b[0], b[1] = 0x03, 0xf3; return b },
		"python 3.6":         func(b []byte) []byte { b[0], b[1] = 0x33, 0x0d; return b },
		"no newline":         func(b []byte) []byte { b[2] = 0; return b },
	} {
		if _, ok := ParsePyc(change(slices.Clone(good))); ok {
			t.Errorf("%s: taken for a timestamp .pyc", name)
		}
	}
}

// The vectors are pinned: another mapping is a format break. zip, tar and clocks hold what comes of any sum.
func TestSourceTime(t *testing.T) {
	for source, want := range map[string]uint32{"": vectorEmpty, "import os\n": vectorImport} {
		sum := Sum(sha256.Sum256([]byte(source)))
		if got := SourceTime(sum); got != want {
			t.Errorf("%q: %d, want %d", source, got, want)
		}
		inline, object := Entry{Data: []byte(source)}, Entry{Object: ObjectID{sum}}
		if inline.SourceTime() != want || object.SourceTime() != want {
			t.Errorf("%q: an entry says %d inline, %d with an object", source, inline.SourceTime(), object.SourceTime())
		}
		shown := (&Entry{Data: []byte(source), Flags: PySource, Mtime: Time{Sec: 5, Nsec: 6}}).Shown()
		if shown.Mtime != (Time{Sec: int64(want)}) {
			t.Errorf("%q shows %+v", source, shown.Mtime)
		}
	}
	for _, first := range []uint32{0, 1 << 31, 1<<32 - 1} {
		var sum Sum
		binary.BigEndian.PutUint32(sum[:], first)
		at := time.Unix(int64(SourceTime(sum)), 0).UTC()
		if at.Year() < 1980 || at.YearDay() < 3 && at.Year() == 1980 || at.Year() > 2014 {
			t.Errorf("%08x: %s", first, at)
		}
	}
}

func FuzzPyc(f *testing.F) {
	f.Add("a/__pycache__/m.cpython-311.pyc", []byte{0xa7, 0x0d, '\r', '\n', 0, 0, 0, 0, 1, 2, 3, 4, 9, 0, 0, 0})
	f.Fuzz(func(t *testing.T, path string, b []byte) {
		if src, ok := PycSource(path); ok && (len(src) < 4 || src[len(src)-3:] != ".py") {
			t.Errorf("%q is the source of %q", src, path)
		}
		h, ok := ParsePyc(b)
		if !ok {
			return
		}
		c := slices.Clone(b)
		stamp := SourceTime(sha256.Sum256(b))
		SetPycTime(c, stamp)
		if h2, ok := ParsePyc(c); !ok || h2.Size != h.Size || h2.Mtime != stamp {
			t.Error("the header with another timestamp does not parse")
		}
		SetPycTime(c, h.Mtime)
		if !slices.Equal(b, c) {
			t.Error("the exact bytes do not come back")
		}
	})
}

func TestLeads(t *testing.T) {
	parent, d := ChainID{Sum{1}}, DiffID{Sum{2}}
	leads := parent.Leads(parent.Chain(d))
	if leads(DiffID{Sum{3}}) || !leads(d) || leads(DiffID{}) {
		t.Error("Leads and Chain disagree")
	}
}

func TestPackID(t *testing.T) {
	for text, want := range map[string]PackID{"0000000000000": 0, "00064f0a1b2c3": 0x64f0a1b2c3,
		"fffffffffffff": 1<<52 - 1} {
		if got, ok := ParsePackID(text); got != want || !ok || got.String() != text {
			t.Errorf("%s: %v %v", text, got, ok)
		}
	}
	for _, text := range []string{"", "1", "00064F0A1B2C3", "+064f0a1b2c30", "00064f0a1b2c30", "00064f0a1b2cg"} {
		if got, ok := ParsePackID(text); ok {
			t.Errorf("%q is taken for %s", text, got)
		}
	}
}
