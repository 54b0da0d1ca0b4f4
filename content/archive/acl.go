package archive

import (
	"encoding/binary"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// A POSIX ACL's value (linux include/uapi/linux/posix_acl_xattr.h): a 32-bit
// version, then entries of a 16-bit tag, 16 bits of permissions and a 32-bit id, all
// little endian.
const (
	aclVersion   = 2
	aclHeaderLen = 4
	aclEntryLen  = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20

	aclNoID = 1<<32 - 1
)

// parseACL checks an ACL as posix_acl_from_xattr and posix_acl_valid do (linux
// fs/posix_acl.c) and returns it as the kernel shows it, with no id where there
// is no name. nil means that there is no ACL.
func parseACL(v []byte) ([]byte, error) {
	if len(v) == 0 {
		return nil, nil // setxattr with an empty value removes
	}
	if len(v) < aclHeaderLen || binary.LittleEndian.Uint32(v) != aclVersion || (len(v)-aclHeaderLen)%aclEntryLen != 0 {
		return nil, invalid("a malformed POSIX ACL of %d bytes", len(v))
	}
	if len(v) == aclHeaderLen {
		return nil, nil
	}
	// The entries' order is fixed; next is the lowest tag that may follow.
	next, named, masked := uint16(aclUserObj), false, false
	for ace := v[aclHeaderLen:]; len(ace) > 0; ace = ace[aclEntryLen:] {
		tag, perm := binary.LittleEndian.Uint16(ace), binary.LittleEndian.Uint16(ace[2:])
		id := binary.LittleEndian.Uint32(ace[4:])
		if perm > 7 {
			return nil, invalid("a POSIX ACL with permissions %#o", perm)
		}
		ok := false
		switch tag {
		case aclUserObj:
			ok, next = next == aclUserObj, aclUser
		case aclUser:
			ok, named = next == aclUser && id != aclNoID, true
		case aclGroupObj:
			ok, next = next == aclUser, aclGroup
		case aclGroup:
			ok, named = next == aclGroup && id != aclNoID, true
		case aclMask:
			ok, next, masked = next == aclGroup, aclOther, true
		case aclOther:
			ok = next == aclOther || next == aclGroup && !named
			next = 0
		}
		if !ok {
			return nil, invalid("a POSIX ACL whose entry of tag %#x is wrong or out of order", tag)
		}
		if tag != aclUser && tag != aclGroup {
			binary.LittleEndian.PutUint32(ace[4:], aclNoID)
		}
	}
	if next != 0 || named && !masked {
		return nil, invalid("a POSIX ACL that lacks entries")
	}
	return v, nil
}

// chmodACL makes e's access ACL follow e.Mode, as the kernel's chmod does: the
// group's bits go to the mask, or to the group where there is none.
func chmodACL(e *content.Entry) {
	i, found := findXattr(e, accessACLXattr)
	if !found {
		return
	}
	var group []byte
	v := e.Xattrs[i].Value
	for ace := v[aclHeaderLen:]; len(ace) > 0; ace = ace[aclEntryLen:] {
		switch binary.LittleEndian.Uint16(ace) {
		case aclUserObj:
			binary.LittleEndian.PutUint16(ace[2:], uint16(e.Mode>>6&7))
		case aclGroupObj:
			if group == nil {
				group = ace
			}
		case aclMask:
			group = ace
		case aclOther:
			binary.LittleEndian.PutUint16(ace[2:], uint16(e.Mode&7))
		}
	}
	binary.LittleEndian.PutUint16(group[2:], uint16(e.Mode>>3&7))
}
