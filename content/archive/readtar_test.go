package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// tortures are tars that both the reference and ReadTar take. Each must come out
// the same.
func tortures(t testing.TB) map[string][]byte {
	w := func(members ...member) []byte { return writeTar(t, members...) }
	all := map[string][]byte{}
	for _, some := range []map[string][]byte{
		plainTortures(w), pathTortures(w), linkTortures(w), whiteoutTortures(w), xattrTortures(w), formatTortures(w),
	} {
		maps.Copy(all, some)
	}
	return all
}

func plainTortures(w func(...member) []byte) map[string][]byte {
	long := strings.Repeat("long-directory-name/", 20) + strings.Repeat("n", 255)
	return map[string][]byte{
		"empty":          w(),
		"nothing at all": {},
		"root member":    w(dir("./", mode(0o700), owner(5, 6)), file("a", "x")),
		"root as file": rawTar(raw{name: "./", typeflag: '0', size: 1, data: "x"},
			raw{name: "/", typeflag: '0', size: 1, data: "y"}),
		"absolute":       w(file("/a/b", "x"), dir("//c//")),
		"dot dot inside": w(dir("a"), file("a/../b/./c", "x"), file("/../d", "x")),
		"ustar":          w(file("a", "x", format(tar.FormatUSTAR)), dir("d", format(tar.FormatUSTAR))),
		"gnu":            w(file("a", "x", format(tar.FormatGNU)), file(long, "x", format(tar.FormatGNU))),
		"pax long names": w(file(long, "x"), symlink("s", strings.Repeat("t/", 2000)), link("l", long)),
		"not UTF-8": w(file("caf\xe9/\xff\xfe", "x", format(tar.FormatGNU)),
			symlink("\x80", "\xc0\xaf", format(tar.FormatGNU))),
		"odd bytes": w(file("a\nb", "x"), file("a\x01b", "x"), file("a\\b", "x"), file("a ", "x"), file("*", "x")),
		"ordering": w(file("a!", "x"), dir("a"), file("a/x", "x"), file("a0", "x"), file("a-b", "x"), dir("a/b"),
			file("a/b!", "")),
		"empty file": w(file("a", "")),
		"mode bits": w(file("suid", "x", mode(0o4755)), file("sgid", "x", mode(0o2711)), dir("sticky", mode(0o1777)),
			dir("sg", mode(0o2775)), file("none", "", mode(0)), file("type bits", "x", mode(0o100644))),
		"owners": w(file("a", "x", owner(0, 0)), file("b", "x", owner(1<<32-2, 1<<32-2)),
			symlink("s", "a", owner(7, 8))),
		"times": w(file("ns", "x", mtime(1, 1)), file("pre", "x", mtime(-1, 500)), file("0", "", mtime(0, 0)),
			dir("d", mtime(-86400*365*100, 0)), file("far", "", mtime(7258118400, 7)),
			file("max", "", mtime(9223372036, 854775807)), file("beyond", "", mtime(9223372036, 854775808)),
			symlink("s", "x", mtime(-5, 5)), file("absurd", "", mtime(1<<61, 0))),
		"devices": w(special(tar.TypeChar, "null", 1, 3), special(tar.TypeBlock, "vda", 254, 0),
			special(tar.TypeChar, "big", 4095, 1048575), special(tar.TypeBlock, "zero", 0, 0),
			special(tar.TypeFifo, "fifo", 3, 4)),
		"whiteout device": w(file("a", "x"), special(tar.TypeChar, "a", 0, 0), special(tar.TypeChar, "b", 0, 0),
			file("b", "x"), special(tar.TypeChar, "c", 0, 0), link("d", "c")),
	}
}

func pathTortures(w func(...member) []byte) map[string][]byte {
	return map[string][]byte{
		"symlinks": w(symlink("abs", "/etc/passwd"), symlink("up", "../../../../etc"),
			symlink("odd", " \n//.."), symlink("self", "self")),
		"implied parents":   w(file("a/b/c/d", "x"), dir("a/b", mode(0o711)), file("x/y", "x")),
		"dir after content": w(file("d/f", "x"), dir("d", mode(0o700), mtime(5, 5))),
		"dir times":         w(dir("d", mtime(5, 0)), file("d/f", "x"), dir("d", mtime(6, 1)), file("d/g", "x")),
		"file twice":        w(file("a", "one"), file("a", "three")),
		"file over dir":     w(file("d/e/f", "x"), file("d", "y")),
		"symlink over dir":  w(file("d/e", "x"), dir("o"), symlink("d", "o")),
		"dir over file":     w(file("a", "x"), dir("a"), file("a/b", "x")),
		"dir over symlink":  w(dir("t"), file("t/f", ""), symlink("l", "t"), dir("l"), file("l/g", "")),
		"symlink parent": w(dir("usr/lib"), symlink("lib", "usr/lib"), file("lib/x", "x"),
			dir("lib/y", mtime(9, 9)), file("lib/y/z", "x")),
		"symlink chain": w(symlink("a", "/b"), symlink("b", "c/d"), file("a/f", "x"),
			symlink("c/d/up", "../e"), file("c/d/up/g", "x")),
		"symlink dangling": w(symlink("a", "missing/dir"), file("a/f", "x")),
		"symlink changes": w(dir("x"), dir("y"), symlink("l", "x"), file("l/1", ""), symlink("l", "y"),
			file("l/2", "")),
		"symlink over whiteout parent": w(dir("x"), symlink("l", "x"), file("l/.wh.gone", ""), file("l/.wh..wh..opq", "")),
	}
}

func linkTortures(w func(...member) []byte) map[string][]byte {
	return map[string][]byte{
		"hardlinks":           w(file("b", "x"), link("a", "b"), link("c", "./a"), link("d/e", "/c")),
		"hardlink metadata":   w(file("b", "x"), link("a", "b", mode(0o4700), owner(1, 2), mtime(77, 7))),
		"hardlink of symlink": w(symlink("s", "nowhere"), link("t", "s", mode(0o600), mtime(3, 3))),
		"hardlink of device": w(special(tar.TypeChar, "c", 5, 1), link("d", "c"), special(tar.TypeFifo, "p", 0, 0),
			link("q", "p")),
		"hardlink via symlink":   w(file("d/f", "x"), symlink("l", "d"), link("g", "l/f"), link("h", "l/../d/f")),
		"hardlink replaced":      w(file("a", "x"), link("b", "a"), file("a", "other")),
		"hardlink over dir":      w(file("f", "x"), file("d/g", ""), link("d", "f")),
		"hardlink kept by chain": w(file("a", "x"), link("b", "a"), link("c", "b"), dir("a"), file("b", "y")),
		"hardlink xattrs": w(file("a", "x", xattr("user.one", "1"), xattr("user.two", "2")),
			link("b", "a", xattr("user.two", "3"))),
		"hardlink drops capability": w(file("a", "x", xattr("security.capability", netRaw)), link("b", "a"),
			file("c", "x"), link("d", "c", xattr("security.capability", netRaw))),
	}
}

func whiteoutTortures(w func(...member) []byte) map[string][]byte {
	return map[string][]byte{
		"whiteouts": w(file(".wh.a", ""), file("d/.wh.b", ""), dir(".wh.dir"), file(".wh..wh.plnk", "")),
		"opaque": w(dir("d"), file("d/.wh..wh..opq", ""), file("d/x", "x"), file("e/y", ""),
			file("e/.wh..wh..opq", "")),
		"opaque lost": w(dir("d"), file("d/.wh..wh..opq", ""), file("d", ""), dir("d")),
		"opaque root": w(file(".wh..wh..opq", ""), file("a", "")),
		"opaque xattr": w(dir("alone", xattr(opaqueXattr, "y"), xattr("user.a", "1")),
			dir("both", xattr(opaqueXattr, "y")), file("both/.wh..wh..opq", "")),
		"opaque xattr of users": w(dir("d", xattr("user.overlay.opaque", "y"), xattr("user.fuseoverlayfs.opaque", "y"))),
		"below a marker name":   w(file(".wh.d/f", "x")),
	}
}

func xattrTortures(w func(...member) []byte) map[string][]byte {
	return map[string][]byte{
		"user xattrs": w(file("f", "x", xattr("user.a", "v"), xattr("user.empty", ""), xattr("user.nul", "a\x00b")),
			dir("d", xattr("user.d", "1")), symlink("s", "f", xattr("user.s", "1")), special(tar.TypeFifo, "p", 0, 0)),
		"dir xattr union": w(dir("d", xattr("user.a", "1"), xattr("user.b", "2")),
			dir("d", xattr("user.b", "3"), xattr("user.c", "4"))),
		"fifo user xattr": w(newMember(tar.TypeFifo, "p", "", "", 0o600,
			[]edit{xattr("user.p", "1"), xattr("security.p", "2")})),
		"dropped xattrs": w(file("f", "x", xattr("trusted.foo", "1"), xattr("system.foo", "2"),
			xattr("btrfs.compression", "zstd"), xattr("nodots", "x"), xattr("trusted.overlay", "x"),
			xattr("user.overlay.opaque", "y"))),
		"security xattrs": w(file("f", "x", xattr("security.selinux", "system_u:object_r:bin_t:s0\x00"),
			xattr("security.foo", "")), symlink("s", "f", xattr("security.foo", "1")), dir("d", xattr("security.foo", "1"))),
		"capabilities": w(file("v2", "x", xattr("security.capability", netRaw), mode(0o4755)),
			file("v3", "x", xattr("security.capability", capability(0x03000001, 1<<13, 0, 0, 0, 100000))),
			file("v3 root", "x", xattr("security.capability", capability(0x03000000, 1<<13, 2, 3, 4, 0))),
			dir("d", xattr("security.capability", netRaw)), symlink("s", "v2", xattr("security.capability", netRaw)), dir("d")),
		"access ACLs": w(file("f", "x", xattr("system.posix_acl_access", fullACL), mode(0o640)),
			file("m", "x", xattr("system.posix_acl_access", maskACL), mode(0o751)),
			dir("d", xattr("system.posix_acl_access", fullACL), mode(0o2710)),
			file("b", "x", xattr("system.posix_acl_access", baseACL), mode(0o600)),
			file("e", "x", xattr("system.posix_acl_access", "")), file("h", "x", xattr("system.posix_acl_access", acl())),
			symlink("s", "f", xattr("system.posix_acl_access", fullACL)),
			newMember(tar.TypeFifo, "p", "", "", 0o604, []edit{xattr("system.posix_acl_access", fullACL)})),
		"default ACLs": w(dir("d", xattr("system.posix_acl_default", fullACL), xattr("system.posix_acl_access", fullACL)),
			dir("b", xattr("system.posix_acl_default", baseACL)),
			dir("e", xattr("system.posix_acl_default", "")), file("f", "x", xattr("system.posix_acl_default", "")),
			symlink("s", "x", xattr("system.posix_acl_default", fullACL))),
		"ACL changes": w(dir("d", xattr("system.posix_acl_access", fullACL)), dir("d", mode(0o701)),
			dir("r", xattr("system.posix_acl_access", fullACL), xattr("system.posix_acl_default", fullACL)),
			dir("r", xattr("system.posix_acl_access", baseACL), xattr("system.posix_acl_default", "")),
			file("f", "x", xattr("system.posix_acl_access", fullACL)), link("g", "f", mode(0o620))),
	}
}

func formatTortures(w func(...member) []byte) map[string][]byte {
	return map[string][]byte{
		"legacy dir": rawTar(raw{name: "d/", typeflag: 0, mode: 0o755}, raw{name: "f", typeflag: 0, mode: 0o644, size: 1,
			data: "x"}),
		"slash file": rawTar(raw{name: "f/", typeflag: '0', mode: 0o644, size: 1, data: "x"}),
		"global header": rawTar(raw{name: "pax_global_header", typeflag: 'g', size: 18, mode: 0o644,
			data: "18 comment=abcdef\n"}, raw{name: "f", typeflag: '0', mode: 0o644}),
		"no end marker": endless(w(file("a", "x"))),
		"PAX sparse 0.0": rawTar(pax("GNU.sparse.size", "20", "GNU.sparse.numblocks", "2", "GNU.sparse.offset", "2",
			"GNU.sparse.numbytes", "3", "GNU.sparse.offset", "10", "GNU.sparse.numbytes", "2"),
			raw{name: "f", typeflag: '0', mode: 0o644, size: 5, data: "abcde"}),
		"PAX sparse 0.1": rawTar(pax("GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.name", "real",
			"GNU.sparse.size", "20", "GNU.sparse.numblocks", "2", "GNU.sparse.map", "2,3,10,2"),
			raw{name: "GNUSparseFile.0/f", typeflag: '0', mode: 0o644, size: 5, data: "abcde"}),
		"PAX sparse 1.0": rawTar(pax("GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.name", "real",
			"GNU.sparse.realsize", "20"), raw{name: "GNUSparseFile.0/f", typeflag: '0', mode: 0o644, size: 517,
			data: "2\n2\n3\n10\n2\n" + strings.Repeat("\x00", 501) + "abcde"}),
	}
}

// endless takes a tar's end marker away.
func endless(data []byte) []byte { return data[:len(data)-1024] }

func TestEqualsContainerd(t *testing.T) {
	for name, data := range tortures(t) {
		t.Run(name, func(t *testing.T) {
			got := readTar(t, data)
			want, err := applyReference(t, data)
			if err != nil {
				t.Fatalf("the reference refuses: %v", err)
			}
			if diff := diffReference(got, want); diff != "" {
				t.Errorf("reference (-), ReadTar (+):\n%s", diff)
			}
		})
	}
}

// sum8 is how describe shows a payload.
func sum8(body string) string {
	return content.ObjectID{Sum: sha256.Sum256([]byte(body))}.Hex()[:8]
}

// TestFollowsSpec has what the reference refuses, or shows by accident.
func TestFollowsSpec(t *testing.T) {
	const inode, implied = "0644 1000:100 1700000000.123456789", "0755 0:0 0.000000000"
	const dirInode = "0755 1000:100 1700000000.123456789"
	x := inode + " 1 bytes " + sum8("x")
	oldSparse := func(b []byte) {
		copy(b[386:], "00000000002\x0000000000003\x00") // offset, length
		copy(b[410:], "00000000012\x0000000000002\x00")
		copy(b[483:], "00000000024\x00") // real size: 20
	}
	sparse := "0644 1000:100 1700000000.000000000 20 bytes " +
		sum8("\x00\x00abc\x00\x00\x00\x00\x00de"+strings.Repeat("\x00", 8))
	rows := map[string]struct {
		tar  []byte
		want []string // without the root
	}{
		"empty":            {nil, nil},
		"marker then file": {writeTar(t, file(".wh.a", ""), file("a", "x")), []string{`"a" file ` + x}},
		"file then marker": {writeTar(t, file("a", "x"), file(".wh.a", "")), []string{`"a" file ` + x}},
		"marker twice":     {writeTar(t, file(".wh.a", ""), file(".wh.a", "")), []string{`"a" whiteout`}},
		"marker then dir":  {writeTar(t, file(".wh.a", ""), dir("a")), []string{`"a" dir ` + dirInode + " opaque"}},
		"dir then marker":  {writeTar(t, dir("a"), file(".wh.a", "")), []string{`"a" dir ` + dirInode + " opaque"}},
		"marker then implied dir": {writeTar(t, file(".wh.a", ""), file("a/b", "x")),
			[]string{`"a" dir ` + implied + " opaque", `"a/b" file ` + x}},
		"implied and opaque": {writeTar(t, file("a/.wh..wh..opq", "")),
			[]string{`"a" dir ` + implied + " opaque implied"}},
		"marker of a symlink": {writeTar(t, dir("d"), symlink("l", "d"), file(".wh.l", ""), file("l/f", "x")),
			[]string{`"d" dir ` + dirInode, `"d/f" file ` + x, `"l" symlink 0777 1000:100 1700000000.123456789 -> "d"`}},
		"link to a lower file": {writeTar(t, link("a", "usr/bin/b", xattr("user.a", "1")), link("c", "a")),
			[]string{`"a" lowerlink ` + inode + ` -> "usr/bin/b" user.a=31`, `"c" hardlink -> "a"`}},
		"link before its target": {writeTar(t, link("a", "b"), file("b", "x")),
			[]string{`"a" lowerlink ` + inode + ` -> "b"`, `"b" file ` + x}},
		"link renames lower file": {writeTar(t, file(".wh.old", ""), link("new", "old")),
			[]string{`"new" lowerlink ` + inode + ` -> "old"`, `"old" whiteout`}},
		"link through symlink": {writeTar(t, symlink("lib", "/usr/lib"), link("a", "lib/b")),
			[]string{`"a" lowerlink ` + inode + ` -> "usr/lib/b"`,
				`"lib" symlink 0777 1000:100 1700000000.123456789 -> "/usr/lib"`}},
		"contiguous file": {rawTar(raw{name: "a", typeflag: '7', mode: 0o644, size: 1, data: "x"}),
			[]string{`"a" file 0644 1000:100 1700000000.000000000 1 bytes ` + sum8("x")}},
		"old GNU sparse": {rawTar(raw{name: "f", typeflag: 'S', gnu: true, mode: 0o644, size: 5, data: "abcde",
			patch: oldSparse}), []string{`"f" file ` + sparse}},
		"default ACL is no heir": {writeTar(t, dir("d", xattr("system.posix_acl_default", baseACL)), file("d/f", "x")),
			[]string{`"d" dir ` + dirInode + " system.posix_acl_default=" + hexOf(baseACL), `"d/f" file ` + x}},
		"setgid dir is no heir": {writeTar(t, dir("d", mode(0o2775)), file("d/e/f", "x")),
			[]string{`"d" dir 2775 1000:100 1700000000.123456789`, `"d/e" dir ` + implied + " implied", `"d/e/f" file ` + x}},
		"times of a replaced dir": {writeTar(t, dir("d", mtime(5, 0)), file("d", "x")), []string{`"d" file ` + x}},
		"global header is no file": {rawTar(raw{name: "dir/global", typeflag: 'g', size: 18, mode: 0o644,
			data: "18 comment=abcdef\n"}), nil},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, e := range readTar(t, row.tar)[1:] {
				got = append(got, describe(e))
			}
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("want (-), got (+):\n%s", diff)
			}
		})
	}
}

// TestHardlinkGroups: the inode of a group moves to the
// smallest path that is left.
func TestHardlinkGroups(t *testing.T) {
	got := readTar(t, writeTar(t, file("m", "x"), link("z", "m"), link("b", "m"), link("a", "z"), file("a", "y")))
	want := map[string]string{"a": "", "b": "", "m": "b", "z": "b"}
	for _, e := range got[1:] {
		if target, ok := want[e.Path]; !ok || e.Target != target {
			t.Errorf("%s", describe(e))
		}
	}
	if got[2].Object.Hex()[:8] != sum8("x") {
		t.Errorf("the inode lost its payload: %s", describe(got[2]))
	}
}

func TestRootMember(t *testing.T) {
	got := readTar(t, writeTar(t, dir("./", mode(0o700), owner(5, 6), xattr("user.a", "1"))))
	if s := describe(got[0]); s != `"" dir 0755 0:0 1700000000.123456789` {
		t.Error(s)
	}
	if got := readTar(t, nil); got[0].Flags&content.Implied == 0 {
		t.Error("a root that no member names must be implied")
	}
}

// TestLeavesTrailingBytes: the caller hashes what comes after the end marker.
func TestLeavesTrailingBytes(t *testing.T) {
	r := strings.NewReader(string(writeTar(t, file("a", "x"))) + "trailing")
	if _, err := ReadTar(t.Context(), r, hashing{}, nil); err != nil {
		t.Fatal(err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "trailing" {
		t.Errorf("%d bytes are left", len(rest))
	}
}

type putFunc func(e *content.Entry, r io.Reader) error

func (f putFunc) Put(e *content.Entry, r io.Reader) error { return f(e, r) }

func TestPayloadErrors(t *testing.T) {
	data := writeTar(t, file("full", "payload"))
	refused := errors.New("refused")
	_, err := ReadTar(t.Context(), bytes.NewReader(data), putFunc(func(*content.Entry, io.Reader) error {
		return refused
	}), nil)
	if !errors.Is(err, refused) || errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), `"full"`) {
		t.Errorf("refusing: %v", err)
	}
	_, err = ReadTar(t.Context(), bytes.NewReader(data), putFunc(func(e *content.Entry, r io.Reader) error {
		_, err := io.CopyN(io.Discard, r, 3)
		return err
	}), nil)
	if err == nil || errors.Is(err, ErrInvalid) {
		t.Errorf("taking too little: %v", err)
	}
}

func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, err := ReadTar(ctx, bytes.NewReader(writeTar(t, file("a", "x"), file("b", "y"))),
		putFunc(func(e *content.Entry, r io.Reader) error {
			cancel()
			_, err := io.Copy(io.Discard, r)
			return err
		}), nil)
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
}
