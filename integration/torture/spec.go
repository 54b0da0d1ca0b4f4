package torture

import (
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// SpecBelow and SpecAbove are two layers of an image that containerd's overlayfs does
// not show as the image spec asks for: its applier
//
//   - makes directories that a layer implies anew, at the time of the pull, and lets
//     them take the place of what a lower layer says of them when it unpacks layers
//     apart from each other;
//   - drops a whiteout of a directory that the layer has itself, and deletes a member that
//     the layer has before its whiteout;
//   - lets files inherit the default ACL of their directory.
func SpecBelow() []image.Entry {
	return []image.Entry{
		at(with(image.Dir("described"), 0o711, 3, 4), specTime.Unix(), 5),
		image.File("described/below", "b"),
		image.File("implied/deep/file", "nothing describes its directories"),
		image.Dir("again"),
		image.File("again/below", "hidden by the whiteout"),
		image.Dir("before"),
		image.File("before/below", "hidden by the whiteout"),
		image.File("file", "below"),
		image.File("file-before", "below"),
		image.Dir("opaque"),
		image.File("opaque/below", "hidden by the marker"),
	}
}

// SpecAbove is the upper layer; see SpecBelow.
func SpecAbove() []image.Entry {
	acl := with(image.Dir("acl"), 0o750, 0, 0)
	acl.Xattrs = map[string]string{"system.posix_acl_default": acl1000()}
	sgid := with(image.Dir("sgid"), 0o2755, 0, 50)
	return []image.Entry{
		image.File("described/above", "its directory stays as the lower layer says"),
		image.File(".wh.again", ""),
		image.Dir("again"),
		image.File("again/above", "a"),
		image.Dir("before"),
		image.File("before/above", "a"),
		image.File(".wh.before", ""),
		image.File(".wh.file", ""),
		image.File("file", "above"),
		image.File("file-before", "above"),
		image.File(".wh.file-before", ""),
		image.Dir("opaque"),
		image.File("opaque/above", "before the marker"),
		image.File("opaque/.wh..wh..opq", ""),
		acl,
		image.File("acl/file", "says nothing of an ACL"),
		image.Dir("acl/dir"),
		sgid,
		image.File("sgid/file", "says that it is of group 0"),
	}
}

// Want is what the image spec asks for at one path.
type Want struct {
	Dir      bool
	Mode     int64
	UID, GID int
	Time     time.Time
	Content  string
	Xattrs   map[string]string
}

// specTime is the mtime, with 5 ns more, of the one directory that has not the default.
var specTime = time.Unix(1234567890, 0)

// SpecWant is the whole tree of the image, by path.
func SpecWant() map[string]Want {
	dir := Want{Dir: true, Mode: 0o755, Time: image.DefaultTime}
	file := func(content string) Want { return Want{Mode: 0o644, Time: image.DefaultTime, Content: content} }
	acl, sgid := dir, dir
	acl.Mode, acl.Xattrs = 0o750, map[string]string{"system.posix_acl_default": acl1000()}
	sgid.Mode, sgid.GID = 0o2755, 50
	return map[string]Want{
		".":                 dir,
		"described":         {Dir: true, Mode: 0o711, UID: 3, GID: 4, Time: specTime.Add(5)},
		"described/below":   file("b"),
		"described/above":   file("its directory stays as the lower layer says"),
		"implied":           dir,
		"implied/deep":      dir,
		"implied/deep/file": file("nothing describes its directories"),
		"again":             dir,
		"again/above":       file("a"),
		"before":            dir,
		"before/above":      file("a"),
		"file":              file("above"),
		"file-before":       file("above"),
		"opaque":            dir,
		"opaque/above":      file("before the marker"),
		"acl":               acl,
		"acl/file":          file("says nothing of an ACL"),
		"acl/dir":           dir,
		"sgid":              sgid,
		"sgid/file":         file("says that it is of group 0"),
	}
}
