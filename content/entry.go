package content

import (
	"cmp"
	"strings"
)

// Kind says what an entry is. The values are part of the tree format: changing
// one is a format break.
type Kind uint8

const (
	Dir     Kind = 1
	Regular Kind = 2
	Symlink Kind = 3
	Char    Kind = 4
	Block   Kind = 5
	Fifo    Kind = 6
	// Hardlink shares the inode of the entry of this layer that Target names.
	// Its own metadata is empty. The smallest path of a group (by ComparePaths)
	// is never a Hardlink.
	Hardlink Kind = 7
	// LowerLink is a hardlink to a path that this layer does not have: the inode is
	// that of Target in the layers below, with this entry's metadata.
	LowerLink Kind = 8
	// Whiteout hides Path of the layers below. It has no metadata.
	Whiteout Kind = 9
	// Socket cannot come from a tar, but from a directory.
	Socket Kind = 10
)

// Flags are facts about an entry that are no inode metadata.
type Flags uint8

const (
	// Opaque, on a Dir: the layers below show nothing inside it. On anything
	// else it has no meaning.
	Opaque Flags = 1 << iota
	// Implied, on a Dir: no archive member named it, only something below it. A
	// directory of the layers below keeps its metadata.
	Implied
	// PycPaired, on a Regular: the .pyc of a CPython pair that is valid in this layer. Its payload carries the
	// SourceTime of its source; PycTime is what the image recorded there.
	PycPaired
	_ // until format 2: a .pyc whose source is in another layer
	// PySource, on a Regular: the source of a PycPaired of this layer. Containers see its SourceTime as its mtime
	// (Shown); Mtime is the image's.
	PySource
)

// Time is a point in time as inodes keep it.
type Time struct {
	Sec  int64  // since 1970-01-01 UTC, may be negative
	Nsec uint32 // 0 to 999,999,999
}

// Xattr is one extended attribute with its full name ("security.capability").
type Xattr struct {
	Name  string
	Value []byte
}

// MaxBelowXattrs bounds what all LowerLinks of a chain may add to the xattrs of one inode, in bytes. Whoever makes
// entries leaves so much room in each, so that no inode of a chain image becomes too large for its format.
const MaxBelowXattrs = 64 << 10

// XattrSize is what an attribute takes of an inode's room in a chain image, its header and its padding included; at
// most.
func XattrSize(x Xattr) int64 { return int64(len(x.Name) + len(x.Value) + 8) }

// Entry is one normalised member of a layer.
type Entry struct {
	// Path is relative, slash-separated, clean, without NUL, never with "." or
	// ".." as a component; "" is the root. Otherwise any bytes.
	Path     string
	Kind     Kind
	Flags    Flags
	Mode     uint32 // 07777: permissions, setuid, setgid, sticky
	UID, GID uint32
	Mtime    Time
	Xattrs   []Xattr // sorted by Name, names unique
	// Target is a Symlink's target as it stands in the image (any bytes), or the
	// Path of a Hardlink's or LowerLink's inode.
	Target       string
	Major, Minor uint32 // Char, Block
	// Size is a Regular's length in bytes. Exactly one of Data and Object holds
	// the payload when it is over 0: Data (len == Size) up to InlineMax, Object above.
	Size   int64
	Data   []byte
	Object ObjectID
	// PycTime is the source mtime that a PycPaired recorded in the image.
	PycTime uint32
}

// Shown returns the entry as containers see it.
func (e *Entry) Shown() *Entry {
	if e.Flags&PySource == 0 {
		return e
	}
	shown := *e
	shown.Mtime = Time{Sec: int64(e.SourceTime())}
	return &shown
}

// InlineMax is the largest payload, in bytes, that lives in the tree and in the
// chain images instead of in an object of its own: such a file costs neither an
// inode nor a block. Changing it changes layer ids, and so is a format break.
const InlineMax = 640

// ComparePaths orders paths so that a directory comes directly before all that
// is below it: bytewise, with '/' before every other byte.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			switch {
			case a[i] == '/':
				return -1
			case b[i] == '/':
				return 1
			}
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

// SplitPath returns the parent directory ("" is the root) and the last component.
func SplitPath(p string) (dir, name string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}

// Fidelity says which differences between payloads are kept.
type Fidelity string

const (
	// Exact keeps every byte and every metadata field as in the image.
	Exact Fidelity = "exact"
	// Python keeps all but the timestamps of valid CPython source and bytecode pairs: these follow from the sources'
	// bytes.
	Python Fidelity = "python"
	// Normalized is Python, and a layer whose payload digest is known reuses
	// the known layer, with its mtimes, uids and gids.
	Normalized Fidelity = "normalized"
)
