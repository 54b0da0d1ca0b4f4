package erofs

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const (
	xattrHeaderSize = 12
	xattrEntrySize  = 4 // before name and value
	xattrIDSize     = 4 // reference to a shared xattr
	maxSharedIDs    = 255
	maxXattrName    = 255 // Linux counts the prefix too, EROFS does not
	maxXattrValue   = math.MaxUint16
	// maxXattrArea is what a 16-bit count of 4-byte units can say.
	maxXattrArea = xattrHeaderSize + 4*(math.MaxUint16-1)

	trustedIndex  = 4
	overlayPrefix = "trusted.overlay."
	metacopyName  = "overlay.metacopy"
	redirectName  = "overlay.redirect"
)

// xattrPrefixes are the name spaces of the format; a name is stored as the
// index of one of them and the rest.
var xattrPrefixes = [...]struct {
	prefix string
	index  uint8
	whole  bool // the prefix is the whole name
}{
	{"user.", 1, false},
	{"system.posix_acl_access", 2, true},
	{"system.posix_acl_default", 3, true},
	{"trusted.", trustedIndex, false},
	{"security.", 6, false},
}

// splitXattr returns how a name is stored.
func splitXattr(name string) (index uint8, rest string, ok bool) {
	for _, p := range xattrPrefixes {
		if rest, ok := strings.CutPrefix(name, p.prefix); ok && (rest == "") == p.whole {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

func checkXattr(x *content.Xattr) error {
	_, rest, ok := splitXattr(x.Name)
	switch {
	case strings.HasPrefix(x.Name, overlayPrefix):
		return fmt.Errorf("xattr %q would steer overlayfs", x.Name)
	case !ok || strings.IndexByte(rest, 0) >= 0:
		return fmt.Errorf("xattr %q: EROFS has user.*, trusted.*, security.* and the POSIX ACLs only", x.Name)
	case len(x.Name) > maxXattrName:
		return fmt.Errorf("xattr %q: name of %d bytes, at most %d fit", x.Name, len(x.Name), maxXattrName)
	case len(x.Value) > maxXattrValue:
		return fmt.Errorf("xattr %q: value of %d bytes, at most %d fit", x.Name, len(x.Value), maxXattrValue)
	}
	return nil
}

// storedSize is the length of a stored xattr.
func storedSize(name, value int) int64 { return alignUp(int64(xattrEntrySize+name+value), 4) }

// xattrCount is the field of the inode that tells the length of its xattr area.
func xattrCount(area uint32) uint16 {
	if area == 0 {
		return 0
	}
	return uint16((area-xattrHeaderSize)/4 + 1)
}

// sharedXattrs holds those xattrs that are stored once for several inodes. The two
// xattrs of overlayfs are not among them: redirects differ, and an own metacopy
// takes 16 bytes that the rounding to slots would waste anyway.
type sharedXattrs struct {
	byKey map[string]*sharedXattr
	list  []*sharedXattr // in the order in which they were met
	most  int64          // how large one may be
	// redirectLen is the length of every redirect; 0: overlayfs is not to find payloads elsewhere.
	redirectLen int
	key         []byte // scratch
	end         int64  // of the area in the image; 0 if there is none
}

type sharedXattr struct {
	xattr *content.Xattr
	size  int64
	count int64
	// id is the offset in the image in 4-byte units; 0: not shared after all.
	id uint32
}

// find returns what is known about an xattr, or nil.
func (s *sharedXattrs) find(x *content.Xattr) *sharedXattr {
	s.key = append(append(append(s.key[:0], x.Name...), 0), x.Value...)
	return s.byKey[string(s.key)]
}

// count notes the xattrs of one more inode.
func (s *sharedXattrs) count(e *content.Entry) {
	for i := range e.Xattrs {
		x := &e.Xattrs[i]
		_, rest, _ := splitXattr(x.Name)
		size := storedSize(len(rest), len(x.Value))
		if size > s.most {
			continue
		}
		known := s.find(x)
		if known == nil {
			known = &sharedXattr{xattr: x, size: size}
			if s.byKey == nil {
				s.byKey = make(map[string]*sharedXattr)
			}
			s.byKey[string(s.key)] = known
			s.list = append(s.list, known)
		}
		known.count++
	}
}

// choose drops all that is smaller when every inode has its own.
func (s *sharedXattrs) choose() {
	kept := s.list[:0]
	for _, x := range s.list {
		if x.count*xattrIDSize+x.size < x.count*x.size {
			kept = append(kept, x)
			x.id = math.MaxUint32 // until place knows better
		}
	}
	s.list = kept
}

// place lays the area out from the given offset and returns its end.
func (s *sharedXattrs) place(at int64) int64 {
	at = alignUp(at, 4)
	for _, x := range s.list {
		x.id = uint32(at / 4)
		at += x.size
		s.end = at
	}
	return at
}

// begin is where the area begins; 0 if there is none.
func (s *sharedXattrs) begin() int64 {
	if len(s.list) == 0 {
		return 0
	}
	return int64(s.list[0].id) * 4
}

func (s *sharedXattrs) encode(o *out) {
	for _, x := range s.list {
		encodeXattr(o.at(int64(x.id)*4, x.size), x.xattr)
	}
}

// split calls shared or own for each xattr of e. It decides alike in every pass.
func (s *sharedXattrs) split(e *content.Entry, shared func(*sharedXattr), own func(*content.Xattr)) {
	ids := 0
	for i := range e.Xattrs {
		x := &e.Xattrs[i]
		if known := s.find(x); known != nil && known.id != 0 && ids < maxSharedIDs {
			ids++
			shared(known)
			continue
		}
		own(x)
	}
}

// areaSize is the length of an inode's xattr area, 0 without xattrs.
func (s *sharedXattrs) areaSize(e *content.Entry) (uint32, error) {
	n := int64(xattrHeaderSize)
	if dataless(e) && s.redirectLen > 0 {
		n += storedSize(len(metacopyName), 0) + storedSize(len(redirectName), s.redirectLen)
	}
	s.split(e,
		func(*sharedXattr) { n += xattrIDSize },
		func(x *content.Xattr) {
			_, rest, _ := splitXattr(x.Name)
			n += storedSize(len(rest), len(x.Value))
		})
	switch {
	case n == xattrHeaderSize:
		return 0, nil
	case n > maxXattrArea:
		return 0, errors.New("more xattrs than the 256 KiB that fit an inode")
	}
	return uint32(n), nil
}

// encodeArea writes an inode's xattr area at b[0]: the header with the count of
// shared ids in its fifth byte, the ids, the inode's own xattrs.
func (s *sharedXattrs) encodeArea(b []byte, e *content.Entry, redirect []byte) {
	at := int64(xattrHeaderSize)
	s.split(e,
		func(x *sharedXattr) {
			b[4]++
			le.PutUint32(b[at:], x.id)
			at += xattrIDSize
		},
		func(*content.Xattr) {})
	if dataless(e) && s.redirectLen > 0 {
		// Metacopy first: overlayfs asks for it before anything else.
		at += put(b[at:], trustedIndex, metacopyName, nil)
		at += put(b[at:], trustedIndex, redirectName, redirect)
	}
	s.split(e,
		func(*sharedXattr) {},
		func(x *content.Xattr) { at += encodeXattr(b[at:], x) })
}

func encodeXattr(b []byte, x *content.Xattr) int64 {
	index, rest, _ := splitXattr(x.Name)
	return put(b, index, rest, x.Value)
}

// put writes one xattr at b[0] and returns the length of what it wrote.
func put(b []byte, index uint8, name string, value []byte) int64 {
	b[0] = uint8(len(name))
	b[1] = index
	le.PutUint16(b[2:], uint16(len(value)))
	n := xattrEntrySize + copy(b[xattrEntrySize:], name)
	copy(b[n:], value)
	return storedSize(len(name), len(value))
}
