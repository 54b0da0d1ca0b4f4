package archive

import (
	"archive/tar"
	"context"
	"math"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// The kernel's limits, in bytes without a final NUL.
const (
	maxName = 255  // NAME_MAX
	maxPath = 4095 // PATH_MAX - 1, also of a symlink's target
)

// The kernel's device numbers have 12 and 20 bits; mknod cuts off the rest.
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

// maxID is the largest uid or gid; the next one means "leave it" to chown.
const maxID = math.MaxUint32 - 1

// checkPath refuses what cannot be a path below the root. path is clean.
func checkPath(path string) error {
	if path == ".." || strings.HasPrefix(path, "../") {
		return invalid("the path leads above the root")
	}
	if len(path) > maxPath {
		return invalid("the path is longer than %d bytes", maxPath)
	}
	if strings.IndexByte(path, 0) >= 0 {
		return invalid("the path has a NUL byte")
	}
	if len(path) <= maxName {
		return nil
	}
	for _, name := range components(path) {
		if len(name) > maxName {
			return invalid("a name in the path is longer than %d bytes", maxName)
		}
	}
	return nil
}

// kindOf says what a member becomes and refuses types that no layer has.
func kindOf(hdr *tar.Header) (content.Kind, error) {
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse, 0:
		return content.Regular, nil
	case tar.TypeDir:
		return content.Dir, nil
	case tar.TypeSymlink:
		return content.Symlink, nil
	case tar.TypeLink:
		return content.Hardlink, nil
	case tar.TypeFifo:
		return content.Fifo, nil
	case tar.TypeChar, tar.TypeBlock:
		return deviceKind(hdr)
	}
	return 0, invalid("unknown member type %q", hdr.Typeflag)
}

func deviceKind(hdr *tar.Header) (content.Kind, error) {
	if hdr.Devmajor < 0 || hdr.Devmajor > maxMajor || hdr.Devminor < 0 || hdr.Devminor > maxMinor {
		return 0, invalid("device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
	}
	if hdr.Typeflag == tar.TypeBlock {
		return content.Block, nil
	}
	if hdr.Devmajor == 0 && hdr.Devminor == 0 {
		return content.Whiteout, nil // overlayfs takes it for one
	}
	return content.Char, nil
}

// symlinkTarget is the target as it stands in the archive. It may lead anywhere:
// a container's kernel follows it inside the container's root.
func symlinkTarget(hdr *tar.Header) (string, error) {
	switch target := hdr.Linkname; {
	case target == "":
		return "", invalid("a symlink without a target")
	case len(target) > maxPath:
		return "", invalid("a symlink target longer than %d bytes", maxPath)
	case strings.IndexByte(target, 0) >= 0:
		return "", invalid("a symlink target with a NUL byte")
	default:
		return strings.Clone(target), nil // see memberPath
	}
}

// applyMetadata does to e what the applier does to an inode, new or not, in its
// order: chown, setxattr, chmod, utimes.
func applyMetadata(ctx context.Context, e *content.Entry, hdr *tar.Header) error {
	uid, gid := int64(hdr.Uid), int64(hdr.Gid)
	if uid < 0 || uid > maxID || gid < 0 || gid > maxID {
		return invalid("owner %d:%d is out of range", uid, gid)
	}
	e.UID, e.GID = uint32(uid), uint32(gid)
	if e.Kind != content.Dir {
		// chown takes a file's capabilities away, even when it changes nothing:
		// a hardlink member that does not repeat them removes them.
		removeXattr(e, capabilityXattr)
	}
	if err := applyXattrs(ctx, e, hdr.PAXRecords); err != nil {
		return err
	}
	if e.Kind == content.Symlink {
		e.Mode = 0o777 // Linux has no other
	} else {
		e.Mode = uint32(hdr.Mode & 0o7777)
		chmodACL(e)
	}
	e.Mtime = inodeTime(hdr.ModTime)
	return nil
}

// Times that containerd's applier leaves alone (pkg/archive/time.go).
var (
	minTime = time.Unix(0, 0)
	maxTime = time.Unix(0, math.MaxInt64)
)

// inodeTime keeps a member's mtime to the nanosecond, but, as the applier does,
// makes 1970-01-01 of whatever lies before that or after 2262-04-11.
func inodeTime(t time.Time) content.Time {
	if t.Before(minTime) || t.After(maxTime) {
		t = minTime
	}
	return content.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
}
