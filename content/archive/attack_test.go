package archive

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func hexOf(s string) string { return hex.EncodeToString([]byte(s)) }

// refuses checks that each tar is an error of the archive's own which says what
// is wrong with which member.
func refuses(t *testing.T, rows map[string]refusal) {
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			got, err := ReadTar(t.Context(), bytes.NewReader(row.tar), hashing{}, nil)
			if err == nil {
				t.Fatalf("accepted: %d entries", len(got))
			}
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), row.says) || got != nil {
				t.Errorf("want an ErrInvalid that says %q, got: %v", row.says, err)
			}
			if !row.noMember && !strings.Contains(err.Error(), `"evil`) {
				t.Errorf("the member is not named: %v", err)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

type refusal struct {
	tar      []byte
	says     string
	noMember bool
}

func TestDotDotPath(t *testing.T) {
	refuses(t, map[string]refusal{
		"direct": {writeTar(t, file("../evil", "x")), "above the root", true},
		"inside": {writeTar(t, file("evil/../../x", "x")), "above the root", false},
		"dir":    {writeTar(t, dir("evil/../..")), "above the root", false},
		"marker": {writeTar(t, file("../evil/.wh.x", "")), "above the root", true},
	})
}

func TestSymlinkEscape(t *testing.T) {
	refuses(t, map[string]refusal{
		"relative": {writeTar(t, symlink("evil", "../outside"), file("evil/f", "x")), "above the root", false},
		"deep":     {writeTar(t, symlink("evil/a/b", "../../../x"), file("evil/a/b/f", "x")), "above the root", false},
		"absolute": {writeTar(t, symlink("evil", "/../x"), file("evil/f", "x")), "above the root", false},
		"chain": {writeTar(t, symlink("a", ".."), symlink("evil", "a"), file("evil/f", "x")), "above the root",
			false},
		"whiteout": {writeTar(t, symlink("evil", ".."), file("evil/.wh.etc", "")), "above the root", false},
		"opaque":   {writeTar(t, symlink("evil", ".."), file("evil/.wh..wh..opq", "")), "above the root", false},
		"loop": {writeTar(t, symlink("evil", "b"), symlink("b", "evil"), file("evil/f", "x")),
			"more than 255 symlinks", false},
		"self": {writeTar(t, symlink("evil", "evil"), file("evil/f", "x")), "more than 255 symlinks", false},
		"growing": {writeTar(t, symlink("evil", "evil/"+strings.Repeat("x/", 1000)), file("evil/f", "x")), "too long",
			false},
		"too deep after": {writeTar(t, symlink("evil", strings.Repeat("x/", 2040)),
			file("evil/"+strings.Repeat("y", 100), "x")), "longer than 4095", false},
	})
}

func TestBelowNonDirectory(t *testing.T) {
	refuses(t, map[string]refusal{
		"file":   {writeTar(t, file("evil", "x"), file("evil/f", "x")), `"evil" is not a directory`, false},
		"deeper": {writeTar(t, file("evil", "x"), file("evil/a/f", "x")), `"evil" is not a directory`, false},
		"symlink to file": {writeTar(t, file("f", "x"), symlink("evil", "f"), file("evil/a", "x")), `"f" is not a directory`,
			false},
		"whiteout device": {writeTar(t, special(tar.TypeChar, "evil", 0, 0), file("evil/a", "x")),
			`"evil" is not a directory`, false},
	})
}

func TestHardlinkEscape(t *testing.T) {
	refuses(t, map[string]refusal{
		"relative":     {writeTar(t, link("evil", "../etc/shadow")), "above the root", false},
		"later":        {writeTar(t, dir("a"), link("evil", "a/../../etc/shadow")), "above the root", false},
		"last":         {writeTar(t, link("evil", "..")), "above the root", false},
		"by symlink":   {writeTar(t, symlink("s", "../etc"), link("evil", "s/shadow")), "above the root", false},
		"to directory": {writeTar(t, dir("d"), link("evil", "d")), "is a directory", false},
		"to slash":     {writeTar(t, dir("d"), symlink("s", "d"), link("evil", "s/")), "is a directory", false},
		"to root":      {writeTar(t, link("evil", "/")), "is a directory", false},
		"to nothing":   {rawTar(raw{name: "evil", typeflag: '1'}), "is a directory", false},
		"to parent":    {writeTar(t, link("evil/a", "evil")), "is a directory", false},
		"to itself":    {writeTar(t, file("evil", "x"), link("evil", "./evil")), "the link itself", false},
		"below itself": {writeTar(t, file("evil/a", "x"), link("evil", "evil/a")), "below it", false},
		"below file":   {writeTar(t, file("f", "x"), link("evil", "f/a")), `"f" is not a directory`, false},
		"long name":    {writeTar(t, link("evil", strings.Repeat("n", 256))), "longer than 255", false},
		"long path":    {writeTar(t, link("evil", strings.Repeat("n/", 2048)+"x")), "longer than 4095", false},
	})
}

func TestHostileNames(t *testing.T) {
	huge := strings.Repeat("d/", 1<<18)
	refuses(t, map[string]refusal{
		"long name":       {writeTar(t, file("evil"+strings.Repeat("n", 252), "")), "longer than 255", false},
		"long directory":  {writeTar(t, file("evil"+strings.Repeat("n", 252)+"/f", "")), "longer than 255", false},
		"long path":       {writeTar(t, file("evil/"+strings.Repeat("n/", 2046)+"x", "")), "longer than 4095", false},
		"huge path":       {writeTar(t, file("evil/"+huge+"f", "")), "longer than 4095", false},
		"empty target":    {rawTar(raw{name: "evil", typeflag: '2'}), "without a target", false},
		"long target":     {writeTar(t, symlink("evil", strings.Repeat("n", 4096))), "longer than 4095", false},
		"empty whiteout":  {writeTar(t, file("evil/.wh.", "")), "whiteout", false},
		"dot whiteout":    {writeTar(t, file("evil/.wh..", "")), "whiteout", false},
		"dotdot whiteout": {writeTar(t, file("evil/.wh...", "")), "whiteout", false},
	})
	if err := checkPath("a\x00b"); !errors.Is(err, ErrInvalid) {
		t.Errorf("NUL in a path: %v", err)
	}
	if _, err := symlinkTarget(&tar.Header{Linkname: "a\x00"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("NUL in a target: %v", err)
	}
}

func TestOverlayXattr(t *testing.T) {
	for _, name := range []string{"redirect", "metacopy", "opaque", "whiteout", "anything"} {
		refuses(t, map[string]refusal{
			name: {writeTar(t, file("evil", "x", xattr("trusted.overlay."+name, "/aa/bb"))), "trusted.overlay." + name,
				false},
			name + "/dir": {writeTar(t, dir("evil", xattr("trusted.overlay."+name, "x"))), "trusted.overlay." + name, false},
			name + "/link": {writeTar(t, file("f", "x"), link("evil", "f", xattr("trusted.overlay."+name, "y"))),
				"trusted.overlay." + name, false},
		})
	}
}

func TestHostileXattrs(t *testing.T) {
	x := func(name, value string) []byte { return writeTar(t, file("evil", "", xattr(name, value))) }
	access := func(entries ...[3]uint32) []byte { return x("system.posix_acl_access", acl(entries...)) }
	user, group, other := [3]uint32{aclUserObj, 7, 0}, [3]uint32{aclGroupObj, 7, 0}, [3]uint32{aclOther, 7, 0}
	many := func(h *tar.Header) {
		h.PAXRecords = map[string]string{}
		for i := range 10 {
			h.PAXRecords[fmt.Sprintf("%suser.%d", paxXattrPrefix, i)] = strings.Repeat("v", 40000)
		}
	}
	refuses(t, map[string]refusal{
		"no name":             {x("", "1"), "attribute name", false},
		"bare namespace":      {x("user.", "1"), "attribute name", false},
		"long name":           {x("user."+strings.Repeat("n", 251), "1"), "attribute name", false},
		"long value":          {x("user.a", strings.Repeat("v", 1<<16)), "65536 bytes", false},
		"too many":            {writeTar(t, file("evil", "", many)), "extended attributes of 4", false},
		"capability empty":    {x("security.capability", ""), "security.capability", false},
		"capability short":    {x("security.capability", netRaw[:12]), "security.capability", false},
		"capability revision": {x("security.capability", capability(0x04000000, 0, 0, 0, 0)), "security.capability", false},
		"capability size":     {x("security.capability", capability(0x03000000, 0, 0, 0, 0)), "security.capability", false},
		"capability flags":    {x("security.capability", capability(0x02000002, 0, 0, 0, 0)), "security.capability", false},
		"capability no user": {x("security.capability", capability(0x03000000, 0, 0, 0, 0, 1<<32-1)), "names no user",
			false},
		"ACL short":     {x("system.posix_acl_access", "\x02\x00"), "POSIX ACL", false},
		"ACL version":   {x("system.posix_acl_access", "\x03\x00\x00\x00"), "POSIX ACL", false},
		"ACL cut":       {x("system.posix_acl_access", fullACL[:len(fullACL)-1]), "POSIX ACL", false},
		"ACL lacks":     {access(user, group), "lacks entries", false},
		"ACL order":     {access(group, user, other), "out of order", false},
		"ACL twice":     {access(user, user, group, other), "out of order", false},
		"ACL after end": {access(user, group, other, other), "out of order", false},
		"ACL no mask":   {access(user, [3]uint32{aclUser, 7, 1}, group, other), "ACL", false},
		"ACL nobody": {access(user, [3]uint32{aclUser, 7, aclNoID}, group, [3]uint32{aclMask, 7, 0}, other), "ACL",
			false},
		"ACL permissions":     {access([3]uint32{aclUserObj, 8, 0}, group, other), "permissions", false},
		"ACL tag":             {access(user, group, [3]uint32{0x40, 7, 0}, other), "tag 0x40", false},
		"default ACL of file": {x("system.posix_acl_default", fullACL), "not a directory", false},
	})
}

// TestReferenceRefusesXattrs keeps the rows above honest: what is malformed for
// us is so for the kernel.
func TestReferenceRefusesXattrs(t *testing.T) {
	for name, x := range map[string][2]string{
		"bare namespace":     {"user.", "1"},
		"long value":         {"user.a", strings.Repeat("v", 1<<16+1)},
		"capability size":    {"security.capability", capability(0x03000000, 0, 0, 0, 0)},
		"capability no user": {"security.capability", capability(0x03000000, 0, 0, 0, 0, 1<<32-1)},
		"ACL lacks":          {"system.posix_acl_access", acl([3]uint32{aclUserObj, 7, 0})},
		"ACL no mask": {"system.posix_acl_access", acl([3]uint32{aclUserObj, 7, 0}, [3]uint32{aclUser, 7, 1},
			[3]uint32{aclGroupObj, 7, 0}, [3]uint32{aclOther, 7, 0})},
		"ACL nobody": {"system.posix_acl_access", strings.Replace(fullACL, "\xd2\x04\x00\x00", "\xff\xff\xff\xff",
			1)},
		"default ACL of file": {"system.posix_acl_default", fullACL},
	} {
		t.Run(name, func(t *testing.T) {
			data := writeTar(t, file("evil", "", xattr(x[0], x[1])))
			if _, err := applyReference(t, data); err == nil {
				t.Error("the reference accepts it")
			}
			if _, err := ReadTar(t.Context(), bytes.NewReader(data), hashing{}, nil); !errors.Is(err, ErrInvalid) {
				t.Errorf("ReadTar: %v", err)
			}
		})
	}
}

func TestHostileNumbers(t *testing.T) {
	base256 := func(at, n int, v ...byte) func([]byte) {
		return func(b []byte) {
			clear(b[at : at+n])
			b[at] = 0x80
			copy(b[at+n-len(v):], v)
		}
	}
	negative := func(at, n int) func([]byte) {
		return func(b []byte) { copy(b[at:at+n], bytes.Repeat([]byte{0xff}, n)) }
	}
	refuses(t, map[string]refusal{
		"uid -1": {rawTar(raw{name: "evil", typeflag: '0', gnu: true, patch: negative(108, 8)}), "owner -1:100",
			false},
		"uid no change": {rawTar(raw{name: "evil", typeflag: '0', gnu: true, patch: base256(108, 8, 0xff, 0xff, 0xff, 0xff)}),
			"owner 4294967295", false},
		"gid cut off": {rawTar(raw{name: "evil", typeflag: '0', gnu: true, patch: base256(116, 8, 1, 0, 0, 0, 0)}),
			"owner 1000:4294967296", false},
		"major": {writeTar(t, special(tar.TypeChar, "evil", 4096, 0)), "device number", false},
		"minor": {writeTar(t, special(tar.TypeBlock, "evil", 1, 1<<20)), "device number", false},
		"minor below 0": {rawTar(raw{name: "evil", typeflag: '3', gnu: true, patch: negative(337, 8)}), "device number",
			false},
		"size below 0": {rawTar(raw{name: "evil", typeflag: '0', gnu: true, patch: negative(124, 12)}), "invalid tar header",
			true},
		"type":         {rawTar(raw{name: "evil", typeflag: 'Z'}), `unknown member type 'Z'`, false},
		"volume label": {rawTar(raw{name: "evil", typeflag: 'V'}), `unknown member type 'V'`, false},
	})
}

func TestGarbage(t *testing.T) {
	good := writeTar(t, file("evil", strings.Repeat("payload ", 1000)), file("next", "x"))
	broken := bytes.Clone(good)
	broken[len(good)-1024-1024+148] ^= 1 // the checksum of "next"
	refuses(t, map[string]refusal{
		"noise":          {bytes.Repeat([]byte("not a tar "), 1000), "invalid tar header", true},
		"checksum":       {broken, `after member "evil"`, false},
		"cut in header":  {good[:1200], "truncated", true},
		"cut in payload": {good[:4000], "truncated after", false},
	})
}

// TestHugeDeclaredSize: a size costs nothing before its bytes arrive.
func TestHugeDeclaredSize(t *testing.T) {
	huge := rawTar(pax("size", "9223372036854775807"), raw{name: "evil", typeflag: '0', data: "x"})
	sparse := rawTar(pax("GNU.sparse.major", "1", "GNU.sparse.minor", "0", "GNU.sparse.realsize", "9223372036854775807"),
		raw{name: "evil", typeflag: '0', size: 512, data: "0\n"})
	refuses(t, map[string]refusal{"truncated": {huge, "truncated after", false}})
	limit := errors.New("over the limit")
	for name, data := range map[string][]byte{"plain": huge, "sparse": sparse} {
		allocs := testing.AllocsPerRun(1, func() {
			_, err := ReadTar(t.Context(), bytes.NewReader(data), putFunc(func(e *content.Entry, r io.Reader) error {
				if e.Size != 1<<63-1 {
					t.Errorf("%s: size %d", name, e.Size)
				}
				return limit
			}), nil)
			if !errors.Is(err, limit) {
				t.Errorf("%s: %v", name, err)
			}
		})
		if allocs > 500 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}
