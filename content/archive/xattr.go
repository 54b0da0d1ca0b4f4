package archive

import (
	"context"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const (
	capabilityXattr = "security.capability"
	accessACLXattr  = "system.posix_acl_access"
	defaultACLXattr = "system.posix_acl_default"
	overlayPrefix   = "trusted.overlay."
	opaqueXattr     = overlayPrefix + "opaque"

	paxXattrPrefix = "SCHILY.xattr."
)

// Limits of one attribute and of all of one inode. The kernel's are 255 and 65536
// bytes; a chain image counts a value's length in 16 bits and the
// attributes of an inode in 2^16 words of 4 bytes. Hard links in layers above may add to them
// (content.MaxBelowXattrs), and so does the chain image itself.
const (
	maxXattrName  = 255
	maxXattrValue = 1<<16 - 1
	maxXattrs     = 1<<18 - content.MaxBelowXattrs - 512
)

// applyXattrs does what setxattr would, member by member: e's attributes stay
// unless records name them again.
func applyXattrs(ctx context.Context, e *content.Entry, records map[string]string) error {
	for key, value := range records {
		name, ok := strings.CutPrefix(key, paxXattrPrefix)
		if !ok {
			continue
		}
		if err := applyXattr(ctx, e, name, value); err != nil {
			return err
		}
	}
	return checkXattrs(e)
}

// checkXattrs refuses more than an inode of a chain image has room for.
func checkXattrs(e *content.Entry) error {
	var total int64
	for _, x := range e.Xattrs {
		if len(x.Value) > maxXattrValue {
			return invalid("extended attribute %s has %d bytes", quote(x.Name), len(x.Value))
		}
		total += content.XattrSize(x)
	}
	if total > maxXattrs {
		return invalid("extended attributes of %d bytes, at most %d fit", total, maxXattrs)
	}
	return nil
}

func applyXattr(ctx context.Context, e *content.Entry, name, value string) error {
	if name == opaqueXattr && value == "y" && e.Kind == content.Dir {
		// umoci and fuse-overlayfs have left it beside the marker. containerd's applier drops it (setxattr in
		// pkg/archive/tar_unix.go), so alone it hides nothing in any of its snapshotters.
		log.G(ctx).WithField("path", e.Path).Infof("extended attribute %s ignored, as containerd does", name)
		return nil
	}
	if strings.HasPrefix(name, overlayPrefix) {
		// It would let an image point at any object of the store.
		return invalid("extended attribute %s is overlayfs's own", quote(name))
	}
	if len(name) == 0 || len(name) > maxXattrName || strings.HasSuffix(name, ".") && strings.Count(name, ".") == 1 {
		return invalid("extended attribute name %s", quote(name))
	}
	if !keepsXattr(e.Kind, name) {
		log.G(ctx).WithField("path", e.Path).Debugf("extended attribute %q ignored", name)
		return nil
	}
	stored := []byte(value)
	var err error
	switch name {
	case capabilityXattr:
		stored, err = parseCapability(stored)
	case accessACLXattr:
		stored, err = parseACL(stored)
		if stored != nil && len(stored) == aclHeaderLen+3*aclEntryLen {
			stored = nil // says what the mode says, and chmod follows
		}
	case defaultACLXattr:
		stored, err = parseACL(stored)
		if err == nil && stored != nil && e.Kind != content.Dir {
			err = invalid("a default ACL on something that is not a directory")
		}
	}
	switch {
	case err != nil:
		return err
	case stored == nil:
		removeXattr(e, name)
	default:
		setXattr(e, strings.Clone(name), stored) // see memberPath
	}
	return nil
}

// keepsXattr says what the kernel would store. It answers ENOTSUP or, for user.*,
// EPERM to the rest, which the applier ignores; and the applier itself never sets
// a trusted.* attribute.
func keepsXattr(kind content.Kind, name string) bool {
	switch {
	case strings.HasPrefix(name, "user."):
		return kind == content.Regular || kind == content.Dir || kind == content.LowerLink
	case strings.HasPrefix(name, "security."):
		return true
	case name == accessACLXattr || name == defaultACLXattr:
		return kind != content.Symlink
	}
	return false
}

func findXattr(e *content.Entry, name string) (int, bool) {
	return slices.BinarySearchFunc(e.Xattrs, name, func(x content.Xattr, name string) int {
		return strings.Compare(x.Name, name)
	})
}

func setXattr(e *content.Entry, name string, value []byte) {
	i, found := findXattr(e, name)
	if found {
		e.Xattrs[i].Value = value
		return
	}
	e.Xattrs = slices.Insert(e.Xattrs, i, content.Xattr{Name: name, Value: value})
}

func removeXattr(e *content.Entry, name string) {
	if i, found := findXattr(e, name); found {
		e.Xattrs = slices.Delete(e.Xattrs, i, i+1)
	}
}

// parseCapability checks a security.capability value as cap_convert_nscap does
// (linux security/commoncap.c) and returns it as the kernel shows it: of revision
// 2, or of revision 3 when it belongs to a user namespace's root.
func parseCapability(v []byte) ([]byte, error) {
	const (
		revision2, len2 = 0x02000000, 20
		revision3, len3 = 0x03000000, 24
		effective       = 1
	)
	if len(v) < 4 {
		return nil, invalid("%s has %d bytes", capabilityXattr, len(v))
	}
	magic := binary.LittleEndian.Uint32(v)
	switch revision := magic &^ effective; {
	case revision == revision2 && len(v) == len2:
		return v, nil
	case revision == revision3 && len(v) == len3:
		root := binary.LittleEndian.Uint32(v[len2:])
		if root == 1<<32-1 {
			return nil, invalid("%s names no user", capabilityXattr)
		}
		if root == 0 {
			binary.LittleEndian.PutUint32(v, revision2|magic&effective)
			return v[:len2], nil
		}
		return v, nil
	default:
		return nil, invalid("%s of revision %#x has %d bytes", capabilityXattr, revision, len(v))
	}
}
