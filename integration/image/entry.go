package image

import (
	"archive/tar"
	"fmt"
	"io"
	"time"
)

// Entry is one tar member. The zero Type is a regular file, the zero Mode 0644 (0755
// for a directory; for mode 0 set a bit above 07777, which is masked), the zero Time 2024-01-01 UTC.
type Entry struct {
	Name    string
	Type    byte // tar.TypeReg, ...
	Mode    int64
	UID     int
	GID     int
	Time    time.Time
	Link    string // target of a symlink or hardlink
	Content string
	Major   int64
	Minor   int64
	Xattrs  map[string]string
	PAX     map[string]string // further PAX records
	Format  tar.Format        // FormatUnknown lets archive/tar choose
}

// DefaultTime is the mtime of an entry that names none.
var DefaultTime = time.Unix(1704067200, 0)

// Header is the tar header of the entry.
func (e Entry) Header() *tar.Header {
	if e.Type == tar.TypeXGlobalHeader { // archive/tar refuses anything more in it
		return &tar.Header{Name: e.Name, Typeflag: e.Type, PAXRecords: e.PAX}
	}
	h := &tar.Header{
		Name: e.Name, Typeflag: e.Type, Mode: e.Mode, Uid: e.UID, Gid: e.GID, ModTime: e.Time,
		Linkname: e.Link, Size: int64(len(e.Content)), Devmajor: e.Major, Devminor: e.Minor,
		Format: e.Format, PAXRecords: map[string]string{},
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	h.Mode &= 0o7777
	if h.ModTime.IsZero() {
		h.ModTime = DefaultTime
	}
	if h.ModTime.Nanosecond() != 0 && h.Format == tar.FormatUnknown {
		h.Format = tar.FormatPAX // any other rounds to seconds
	}
	for name, value := range e.Xattrs {
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
	for key, value := range e.PAX {
		h.PAXRecords[key] = value
	}
	return h
}

// WriteEntries writes a tar of entries in the order given.
func WriteEntries(w io.Writer, entries []Entry) error {
	tw := tar.NewWriter(w)
	for _, e := range entries {
		if err := tw.WriteHeader(e.Header()); err != nil {
			return fmt.Errorf("write tar header of %q: %w", e.Name, err)
		}
		if _, err := io.WriteString(tw, e.Content); err != nil {
			return fmt.Errorf("write tar member %q: %w", e.Name, err)
		}
	}
	return tw.Close()
}

// Convenient entries, for tables of tests.

// Dir is a directory.
func Dir(name string) Entry { return Entry{Name: name + "/", Type: tar.TypeDir} }

// File is a regular file.
func File(name, content string) Entry { return Entry{Name: name, Content: content} }

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Name: name, Type: tar.TypeSymlink, Link: target, Mode: 0o777}
}

// Hardlink is a further name of an earlier member, of this layer or one below it.
func Hardlink(name, target string) Entry { return Entry{Name: name, Type: tar.TypeLink, Link: target} }
