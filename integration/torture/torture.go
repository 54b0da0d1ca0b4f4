// Package torture holds layers with every kind of entry that an image may carry, over
// several layers, and says where containerd's overlayfs does not show what the image
// spec asks for.
//
// The entries are sound: an applier has to accept all of them. Hostile input is not
// here, since it is refused rather than shown.
package torture

import (
	"archive/tar"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// Layer is one layer of the torture image.
type Layer struct {
	Name    string
	Entries []image.Entry
}

// Layers returns the layers, lowest first. They build on each other.
func Layers() []Layer {
	return []Layer{
		{"kinds", kinds()},
		{"metadata", metadata()},
		{"names", names()},
		{"order", order()},
		{"below", below()},
		{"above", above()},
	}
}

// at returns e with another mtime.
func at(e image.Entry, sec, nsec int64) image.Entry {
	e.Time = time.Unix(sec, nsec)
	return e
}

// with returns e with another mode and owner.
func with(e image.Entry, mode int64, uid, gid int) image.Entry {
	e.Mode, e.UID, e.GID = mode, uid, gid
	return e
}

// as returns e in a tar format.
func as(f tar.Format, e image.Entry) image.Entry {
	e.Format = f
	return e
}

func device(name string, kind byte, major, minor int64) image.Entry {
	return image.Entry{Name: name, Type: kind, Mode: 0o640, Major: major, Minor: minor}
}

// kinds has every type of entry, and files of sizes around every limit that a store may
// have: empty, inlined, a block, several.
func kinds() []image.Entry {
	entries := []image.Entry{
		{Type: tar.TypeXGlobalHeader, Name: "pax_global_header", PAX: map[string]string{"comment": "as git archive writes"}},
		at(with(image.Entry{Name: "./", Type: tar.TypeDir}, 0o755, 0, 0), RootTime.Unix(), 0),
		image.Dir("kinds"),
	}
	for _, size := range []int{0, 1, 63, 64, 255, 256, 257, 1024, 4095, 4096, 4097, 65537, 1 << 20} {
		entries = append(entries, image.File(fmt.Sprintf("kinds/size-%d", size), Content(size, size)))
	}
	return append(entries,
		image.File("kinds/zeros", strings.Repeat("\x00", 12345)),
		image.File("kinds/same-1", Content(7, 5000)),
		image.File("kinds/same-2", Content(7, 5000)),
		with(image.File("kinds/setuid", Content(1, 100)), 0o4755, 0, 0),
		with(image.File("kinds/setgid", Content(2, 100)), 0o2755, 0, 5),
		with(image.File("kinds/none", Content(3, 100)), 0o100000, 0, 0), // mode 0, with the type bits of stat
		with(image.Dir("kinds/sticky"), 0o1777, 0, 0),
		with(image.Dir("kinds/sgid"), 0o2775, 0, 50),
		with(image.Dir("kinds/private"), 0o700, 1000, 1000),
		image.Dir("kinds/empty"),
		image.Symlink("kinds/relative", "size-1"),
		image.Symlink("kinds/absolute", "/kinds/size-1"),
		image.Symlink("kinds/dangling", "../../../no/where"),
		image.Symlink("kinds/to-dir", "empty"),
		image.Symlink("kinds/long", strings.Repeat("x/", 500)+"y"),
		image.Hardlink("kinds/hard-2", "kinds/same-1"),
		image.Hardlink("kinds/hard-3", "kinds/same-1"),
		image.Hardlink("kinds/hard-of-hard", "kinds/hard-2"),
		image.Hardlink("kinds/hard-of-empty", "kinds/size-0"),
		device("kinds/null", tar.TypeChar, 1, 3),
		device("kinds/loop", tar.TypeBlock, 7, 200),
		device("kinds/big", tar.TypeChar, 4095, 1<<20-1),
		with(image.Entry{Name: "kinds/fifo", Type: tar.TypeFifo}, 0o600, 7, 8),
		image.Hardlink("kinds/hard-of-fifo", "kinds/fifo"),
		image.Hardlink("kinds/hard-of-symlink", "kinds/relative"),
	)
}

// metadata has owners, times and xattrs.
func metadata() []image.Entry {
	x := func(name string, attrs map[string]string) image.Entry {
		return image.Entry{Name: name, Content: Content(9, 300), Xattrs: attrs}
	}
	aclDir := image.Dir("meta/acl-dir")
	aclDir.Xattrs = map[string]string{"system.posix_acl_default": acl1000(), "system.posix_acl_access": acl1000()}
	aclDir.Mode = 0o770
	aclFile := x("meta/acl", map[string]string{"system.posix_acl_access": acl1000()})
	aclFile.Mode = 0o670
	userDir := image.Dir("meta/user-dir")
	userDir.Xattrs = map[string]string{"user.dir": "yes"}
	attributed := func(e image.Entry) image.Entry {
		e.Xattrs = map[string]string{"security.dedup": "on what is no file"}
		return e
	}
	return []image.Entry{
		image.Dir("meta"),
		attributed(image.Symlink("meta/attributed-link", "owner")),
		attributed(image.Entry{Name: "meta/attributed-fifo", Type: tar.TypeFifo}),
		attributed(device("meta/attributed-device", tar.TypeChar, 1, 5)),
		attributed(image.Dir("meta/attributed-dir")),
		x("meta/user-overlay", map[string]string{"user.overlay.opaque": "y", "user.overlay.metacopy": ""}),
		{Name: "meta/pax-times", Content: "p", Format: tar.FormatPAX, Time: time.Unix(1e9, 7),
			PAX: map[string]string{"comment": "ignored"}},
		with(image.File("meta/owner", "o"), 0o644, 1000, 1001),
		with(image.File("meta/big-owner", "b"), 0o644, 4294967294, 3000000000),
		as(tar.FormatGNU, with(image.File("meta/gnu-big-owner", "in base 256"), 0o644, 3000000000, 4000000)),
		as(tar.FormatGNU, at(image.File("meta/gnu-before-1970", "in base 256"), -1234567, 0)),
		with(image.Symlink("meta/link-owner", "owner"), 0o777, 33, 44),
		with(image.File("meta/chown-keeps-setuid", "s"), 0o6755, 12, 13),
		at(image.File("meta/nanoseconds", "n"), 1234567890, 123456789),
		at(image.Dir("meta/dir-nanoseconds"), 1234567890, 987654321),
		at(image.Symlink("meta/link-nanoseconds", "x"), 1234567890, 1),
		at(image.File("meta/epoch", "e"), 0, 0),
		at(image.File("meta/before-1970", "containerd's appliers make it 1970"), -86400*365*10, 500),
		at(image.File("meta/after-2038", "f"), 1<<32+5, 5),
		x("meta/user", map[string]string{"user.one": "1", "user.empty": "", "user.binary": "\x00\x01\xff=\n"}),
		x("meta/user-long", map[string]string{"user.long": Content(4, 3000)}),
		x("meta/capability", map[string]string{
			"security.capability": "\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14),
		}),
		x("meta/trusted", map[string]string{"trusted.mine": "t"}),
		aclFile, aclDir, userDir,
		image.Hardlink("meta/hard-of-xattr", "meta/user"),
	}
}

// acl1000 is the binary form of user::rw-,user:1000:rwx,group::r-x,mask::rwx,other::--- with
// the access ACL's mode bits, linux/posix_acl_xattr.h.
func acl1000() string {
	buf := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range [][3]uint32{{1, 6, ^uint32(0)}, {2, 7, 1000}, {4, 5, ^uint32(0)}, {0x10, 7, ^uint32(0)},
		{0x20, 0, ^uint32(0)}} {
		buf = binary.LittleEndian.AppendUint16(buf, uint16(e[0]))
		buf = binary.LittleEndian.AppendUint16(buf, uint16(e[1]))
		buf = binary.LittleEndian.AppendUint32(buf, e[2])
	}
	return string(buf)
}

// names has long and odd names in all three formats of tar.
func names() []image.Entry {
	long := strings.Repeat("n", 255)
	deep := "names/" + strings.Repeat("deep-directory-name/", 60) + "end"
	prefix := "names/ustar/" + strings.Repeat("p", 90) + "/" + strings.Repeat("s", 90)
	return []image.Entry{
		image.Dir("names"),
		image.File("names/"+long, "255 bytes"),
		as(tar.FormatGNU, image.File("names/gnu-"+long[:251], "a GNU long name")),
		as(tar.FormatGNU, image.Symlink("names/gnu-link", long+"/"+long)),
		as(tar.FormatUSTAR, image.File(prefix, "a ustar prefix")),
		image.File(deep, "deep"),
		image.Hardlink("names/hard-of-deep", deep),
		as(tar.FormatGNU, image.File("names/latin1-\xe9\xff", "not UTF-8")),
		image.File("names/ünïcödé-☃", "UTF-8"),
		image.File("names/new\nline\ttab", "control characters"),
		image.File("names/ space ", "spaces"),
		image.File("names/back\\slash:colon,comma", "what mount options are made of"),
		image.File("names/.wh", "a name that only starts like a whiteout"),
		image.File("names/...", "dots"),
		image.File("names/-rf", "dash"),
	}
}

// order has entries whose meaning depends on where they stand: implied parents, parents
// after their children, and the same path more than once.
func order() []image.Entry {
	return []image.Entry{
		image.File("order/implied/parents/file", "no entry for any parent"),
		image.File("order/late/file", "before its directory"),
		at(with(image.Dir("order/late"), 0o711, 3, 4), 1500000000, 0),
		image.File("./order/./dot-names//file", "a name that has to be cleaned"),
		image.File("order/twice", "first"),
		with(image.File("order/twice", "the last one counts"), 0o600, 1, 1),
		image.File("order/file-then-link", "x"),
		image.Symlink("order/file-then-link", "twice"),
		image.Symlink("order/link-then-file", "twice"),
		image.File("order/link-then-file", "not through the link"),
		image.File("order/file-then-dir", "x"),
		image.Dir("order/file-then-dir"),
		image.File("order/file-then-dir/inside", "y"),
		image.Dir("order/dir-twice"),
		image.File("order/dir-twice/kept", "k"),
		with(image.Dir("order/dir-twice"), 0o750, 9, 9),
		image.File("order/linked", "the hardlink keeps these bytes"),
		image.Hardlink("order/link", "order/linked"),
		image.File("order/linked", "and this is another file"),
		image.Dir("order/real"),
		image.Symlink("order/dir-link", "real"),
		image.File("order/dir-link/through", "goes to order/real"),
		image.Hardlink("order/dir-link/hard", "order/dir-link/through"),
		at(image.Hardlink("order/hard-late", "order/real/through"), 1300000000, 0),
	}
}

// marked is a directory with attributes that say that it is opaque.
func marked(name string, attrs ...string) image.Entry {
	e := image.Dir(name)
	e.Xattrs = map[string]string{}
	for _, attr := range attrs {
		e.Xattrs[attr] = "y"
	}
	return e
}

// below is what above deletes, replaces and changes.
func below() []image.Entry {
	var entries []image.Entry
	for _, dir := range []string{"w", "w/opaque", "w/opaque/sub", "w/opaque-late", "w/opaque-xattr", "w/opaque-both",
		"w/opaque-user", "w/deleted", "w/deleted/sub", "w/dir-to-file", "w/dir-to-link", "w/kept", "w/again"} {
		entries = append(entries, image.Dir(dir))
	}
	for _, file := range []string{"w/file", "w/opaque/gone", "w/opaque/sub/gone", "w/opaque/replaced",
		"w/opaque-late/gone",
		"w/opaque-xattr/stays", "w/opaque-both/gone", "w/opaque-user/stays",
		"w/deleted/sub/f", "w/dir-to-file/f", "w/dir-to-link/f", "w/file-to-dir", "w/kept/f", "w/kept/g", "w/again/old",
		"w/mode", "w/linked", "w/lower"} {
		entries = append(entries, image.File(file, "below "+file))
	}
	return append(entries, image.Symlink("w/link", "file"), image.Symlink("w/link-to-dir", "kept"),
		image.Hardlink("w/linked-2", "w/linked"), image.Hardlink("w/linked-3", "w/linked"))
}

// above has whiteouts of every kind, and changes of what lies below.
func above() []image.Entry {
	wh := func(name string) image.Entry { return image.Entry{Name: name, Mode: 0o600} }
	return []image.Entry{
		wh("w/.wh.file"),
		wh("w/.wh.link"),
		wh("w/.wh.deleted"),
		wh("w/.wh.never-was"),
		image.Dir("w/opaque"),
		wh("w/opaque/.wh..wh..opq"),
		image.File("w/opaque/new", "above"),
		image.File("w/opaque/replaced", "above"),
		image.File("w/opaque-late/new", "before the marker"),
		wh("w/opaque-late/.wh..wh..opq"),
		// What umoci and fuse-overlayfs left in tars, alone and beside the marker.
		marked("w/opaque-xattr", "trusted.overlay.opaque"),
		image.File("w/opaque-xattr/new", "above"),
		marked("w/opaque-both", "trusted.overlay.opaque"),
		wh("w/opaque-both/.wh..wh..opq"),
		image.File("w/opaque-both/new", "above"),
		marked("w/opaque-user", "user.overlay.opaque", "user.fuseoverlayfs.opaque"),
		image.File("w/opaque-user/new", "above"),
		image.File("w/dir-to-file", "a directory was here"),
		image.Symlink("w/dir-to-link", "kept"),
		image.Dir("w/file-to-dir"),
		image.File("w/file-to-dir/f", "a file was here"),
		image.Dir("w/link-to-dir"),
		image.File("w/link-to-dir/f", "not through the link"),
		wh("w/.wh.again"),
		image.Dir("w/again"),
		image.File("w/again/new", "the directory is another one"),
		wh("w/kept/.wh.g"),
		with(image.File("w/mode", "below w/mode"), 0o4711, 21, 22),
		wh("w/.wh.linked-2"),
		at(with(image.Dir("w/kept"), 0o705, 31, 32), 1400000000, 0),
	}
}

// Content is n bytes that compress badly enough and repeat nowhere, the same for the
// same seed.
func Content(seed, n int) string {
	buf := make([]byte, n)
	state := uint64(seed)*0x9e3779b97f4a7c15 + 1
	for i := range buf {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		buf[i] = byte(state)
	}
	return string(buf)
}

// RootTime is the mtime of the root directory: the lowest layer has an entry for it.
var RootTime = time.Unix(1600000000, 0).UTC()

// ImpliedParents are the directories that no entry describes. The image spec does not
// say what their mode, owner and mtime are; every applier chooses.
func ImpliedParents() []string {
	described, implied := map[string]bool{".": true}, map[string]bool{}
	for _, l := range Layers() {
		for _, e := range l.Entries {
			if e.Type == tar.TypeDir {
				described[path.Clean(e.Name)] = true
			}
			if e.Type != tar.TypeXGlobalHeader {
				for dir := path.Dir(path.Clean(e.Name)); dir != "."; dir = path.Dir(dir) {
					implied[dir] = true
				}
			}
		}
	}
	maps.DeleteFunc(implied, func(dir string, _ bool) bool { return described[dir] })
	return slices.Sorted(maps.Keys(implied))
}
