package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ReadTar reads one layer tar up to its end-of-archive marker, hands the bytes of
// its regular files to p, and returns its entries sorted by content.ComparePaths.
// Bytes after the marker stay in r. Members that were replaced later are not in
// the result though their payload was put. Errors name the member; those that are
// the archive's fault wrap ErrInvalid. Memory grows with the number of entries,
// never with a declared size, and memory is told of it.
func ReadTar(ctx context.Context, r io.Reader, p Payloads, memory Memory) ([]*content.Entry, error) {
	l := &layerReader{ctx: ctx, tr: tar.NewReader(r), payloads: p, tree: newLayerTree()}
	l.tree.memory = memory
	last := ""
	for {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("read tar: %w", err)
		}
		hdr, err := l.tr.Next()
		if err == io.EOF {
			return l.tree.entries(), nil
		}
		if errors.Is(err, tar.ErrInsecurePath) {
			err = nil // place judges names, whatever GODEBUG says
		}
		if err != nil {
			return nil, nextError(last, err)
		}
		err = l.member(hdr)
		if err == nil {
			err = l.tree.tell()
		}
		if err != nil {
			return nil, fmt.Errorf("read tar member %s: %w", quote(hdr.Name), err)
		}
		last = hdr.Name
	}
}

// nextError explains why there is no member after the one named last.
func nextError(last string, err error) error {
	where := "at its first member"
	if last != "" {
		where = "after member " + quote(last)
	}
	switch {
	case errors.Is(err, ErrInvalid):
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("%w: truncated: %w", ErrInvalid, err)
	case errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong):
		err = fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return fmt.Errorf("read tar %s: %w", where, err)
}

// quote makes a name fit for a message; a PAX name may be a megabyte long.
func quote(name string) string {
	const most = 256
	if len(name) > most {
		return fmt.Sprintf("%q...", name[:most])
	}
	return fmt.Sprintf("%q", name)
}

// invalid is an error of the archive itself.
func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// layerReader plays one tar's members through on a tree.
type layerReader struct {
	ctx      context.Context
	tr       *tar.Reader
	payloads Payloads
	tree     *layerTree
}

// member applies one header as containerd's applier would.
func (l *layerReader) member(hdr *tar.Header) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	path, err := memberPath(hdr)
	if err != nil {
		return err
	}
	if path == "" {
		return l.root(hdr)
	}
	dirPath, name := content.SplitPath(path)
	dir, err := l.tree.dir(dirPath)
	if err != nil {
		return err
	}
	if dir.entry.Path != dirPath { // symlinks led elsewhere
		path = join(dir.entry.Path, name)
		if err := checkPath(path); err != nil {
			return err
		}
	}
	if strings.HasPrefix(name, whiteoutPrefix) {
		return l.whiteout(dir, name)
	}
	return l.place(hdr, dir, path, name)
}

// memberPath is the member's path as it stands in the archive: relative, clean,
// symlinks not followed. "" is the root.
func memberPath(hdr *tar.Header) (string, error) {
	path := strings.TrimPrefix(filepath.Clean(hdr.Name), "/")
	if path == "." {
		path = ""
	}
	if len(hdr.PAXRecords) > 0 {
		path = strings.Clone(path) // or it keeps up to 1 MiB of PAX records alive
	}
	return path, checkPath(path)
}

// root takes over the root's mtime. The applier ignores the member otherwise: a
// container's root is 0755 and root's, whatever the archive says.
func (l *layerReader) root(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return nil
	}
	root := l.tree.root.entry
	root.Mtime = inodeTime(hdr.ModTime)
	root.Flags &^= content.Implied
	return nil
}

// The markers of the image spec, from AUFS.
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// whiteout notes a marker. Its own type and metadata have no meaning.
func (l *layerReader) whiteout(dir *node, name string) error {
	if name == opaqueMarker {
		dir.entry.Flags |= content.Opaque
		return nil
	}
	hidden := name[len(whiteoutPrefix):]
	if hidden == "" || hidden == "." || hidden == ".." {
		return invalid("whiteout of %q", hidden)
	}
	if c := dir.child(hidden); !c.hidden {
		c.hidden = true
		l.tree.entry(len(dir.entry.Path)+len(hidden)+1, &content.Entry{})
	}
	return nil
}

// place makes the member what dir has under name.
func (l *layerReader) place(hdr *tar.Header, dir *node, path, name string) error {
	kind, err := kindOf(hdr)
	if err != nil {
		return err
	}
	if kind == content.Hardlink {
		return l.link(hdr, dir, path, name)
	}
	if n := dir.children[name]; kind == content.Dir && n != nil && n.isDir() {
		n.entry.Flags &^= content.Implied
		l.tree.entry(len(path), n.entry)
		return applyMetadata(l.ctx, n.entry, hdr)
	}
	e := &content.Entry{Path: path, Kind: kind}
	switch kind {
	case content.Whiteout: // no metadata
		l.tree.put(dir, name, e)
		return nil
	case content.Symlink:
		if e.Target, err = symlinkTarget(hdr); err != nil {
			return err
		}
	case content.Char, content.Block:
		e.Major, e.Minor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	case content.Regular:
		e.Size = hdr.Size
	}
	if err := applyMetadata(l.ctx, e, hdr); err != nil {
		return err
	}
	if e.Size > 0 {
		if err := l.payload(e); err != nil {
			return err
		}
	}
	l.tree.put(dir, name, e)
	return nil
}

// payload hands one file's bytes over and makes sure that all were taken.
func (l *layerReader) payload(e *content.Entry) error {
	r := memberReader{ctx: l.ctx, r: l.tr}
	if err := l.payloads.Put(e, &r); err != nil {
		if r.truncated {
			return invalid("truncated after %d of %d bytes: %v", r.n, e.Size, err)
		}
		return err
	}
	if r.n != e.Size {
		return fmt.Errorf("store payload: took %d of %d bytes", r.n, e.Size)
	}
	return nil
}

// link makes name share the inode that the header's target leads to. The applier
// gives that inode the link's own metadata, and so does this.
func (l *layerReader) link(hdr *tar.Header, dir *node, path, name string) error {
	target, err := l.tree.linkTarget(hdr.Linkname)
	if err != nil {
		return fmt.Errorf("hardlink to %s: %w", quote(hdr.Linkname), err)
	}
	if target == path || strings.HasPrefix(target, path+"/") {
		return invalid("hardlink to %s: that is the link itself, or below it", quote(hdr.Linkname))
	}
	n, err := l.tree.find(target)
	if err != nil {
		return fmt.Errorf("hardlink to %s: %w", quote(hdr.Linkname), err)
	}
	if n == nil || n.entry == nil { // not in this layer, or only hidden by it
		e := &content.Entry{Path: path, Kind: content.LowerLink, Target: target}
		if err := applyMetadata(l.ctx, e, hdr); err != nil {
			return err
		}
		l.tree.put(dir, name, e)
		return nil
	}
	switch n.entry.Kind {
	case content.Dir:
		return invalid("hardlink to %s: that is a directory", quote(hdr.Linkname))
	case content.Whiteout: // a 0/0 device, of which any link is one, too
		l.tree.put(dir, name, &content.Entry{Path: path, Kind: content.Whiteout})
		return nil
	}
	if err := applyMetadata(l.ctx, n.entry, hdr); err != nil {
		return err
	}
	l.tree.share(n.entry)
	l.tree.put(dir, name, n.entry)
	return nil
}

// memberReader counts what was read of one member, and ends early with ctx.
type memberReader struct {
	ctx       context.Context
	r         io.Reader
	n         int64
	truncated bool
}

func (m *memberReader) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.r.Read(p)
	m.n += int64(n)
	m.truncated = err == io.ErrUnexpectedEOF
	return n, err
}
