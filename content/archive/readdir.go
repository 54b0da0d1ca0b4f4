package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ReadDir reads the upper directory of an overlay, hands the bytes of its regular
// files to p, and returns its entries sorted by content.ComparePaths. The root
// entry has upper's own metadata. view is the overlay's merged mount, through
// which metacopy files (which have no data in upper) are read; "" is fine where
// there are none. Symlinks are never followed: a container may be writing
// there. What vanishes meanwhile is left out, a file that shrinks is an error. memory is
// told of what the entries take.
func ReadDir(ctx context.Context, upper, view string, p Payloads, memory Memory) ([]*content.Entry, error) {
	fd, err := unix.Open(upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read directory %q: %w", upper, err)
	}
	root := os.NewFile(uintptr(fd), upper)
	defer root.Close()
	w := &dirReader{keeper: keeper{memory: memory}, ctx: ctx, view: view, payloads: p, first: map[inode]string{}}
	e := &content.Entry{Kind: content.Dir}
	if err := w.dir(root, e); err != nil {
		return nil, fmt.Errorf("read directory %q: %w", upper, err)
	}
	return w.out, nil
}

type inode struct{ dev, ino uint64 }

type dirReader struct {
	keeper
	ctx      context.Context
	view     string
	payloads Payloads
	first    map[inode]string // smallest path of each inode with several links
	out      []*content.Entry
}

// dir appends the open directory and all that is below it. e has Kind and Path.
func (w *dirReader) dir(f *os.File, e *content.Entry) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %q: %w", e.Path, err)
	}
	setStat(e, &st)
	marks, err := readXattrs(e, fdXattrs(f))
	if err != nil {
		return fmt.Errorf("read attributes of %q: %w", e.Path, err)
	}
	if _, ok := marks["redirect"]; ok {
		return fmt.Errorf("directory %q was renamed by an overlay with redirect_dir=on: mount without it", e.Path)
	}
	if marks["opaque"] == "y" { // "x" only says that there are whiteouts in xattrs
		e.Flags |= content.Opaque
	}
	if err := w.add(e); err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list %q: %w", e.Path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := w.name(f, name, join(e.Path, name)); err != nil {
			return err
		}
	}
	return nil
}

// name appends what parent has under name.
func (w *dirReader) name(parent *os.File, name, path string) error {
	if err := checkPath(path); err != nil {
		return fmt.Errorf("read %s: %w", quote(path), err)
	}
	var st unix.Stat_t
	err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stat %q: %w", path, err)
	}
	e := &content.Entry{Path: path}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Kind = content.Dir
		return w.opened(parent, name, e, unix.O_DIRECTORY, w.dir)
	case unix.S_IFREG:
		e.Kind = content.Regular
		return w.opened(parent, name, e, unix.O_NONBLOCK, w.regular)
	}
	return w.special(parent, name, e, &st)
}

func (w *dirReader) opened(parent *os.File, name string, e *content.Entry, flags int,
	do func(*os.File, *content.Entry) error) error {
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NOATIME|flags, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %q: %w", e.Path, err)
	}
	f := os.NewFile(uintptr(fd), e.Path)
	defer f.Close()
	return do(f, e)
}

// regular appends a file, or the whiteout or hardlink that it stands for.
func (w *dirReader) regular(f *os.File, e *content.Entry) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %q: %w", e.Path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%q changed while it was read", e.Path)
	}
	setStat(e, &st)
	e.Size = st.Size
	marks, err := readXattrs(e, fdXattrs(f))
	if err != nil {
		return fmt.Errorf("read attributes of %q: %w", e.Path, err)
	}
	if _, ok := marks["whiteout"]; ok && e.Size == 0 {
		return w.add(&content.Entry{Path: e.Path, Kind: content.Whiteout})
	}
	if again, err := w.linked(e, &st); again || err != nil || e.Size == 0 {
		return err
	}
	data := f
	if _, ok := marks["metacopy"]; ok {
		if data, err = w.openView(e); err != nil {
			return fmt.Errorf("open metacopy file %q in the merged view: %w", e.Path, err)
		}
		defer data.Close()
	}
	return w.put(e, data)
}

// linked appends e, or a Hardlink to the path that its inode already has.
func (w *dirReader) linked(e *content.Entry, st *unix.Stat_t) (again bool, err error) {
	if st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := w.first[id]; ok {
			return true, w.add(&content.Entry{Path: e.Path, Kind: content.Hardlink, Target: first})
		}
		w.first[id] = e.Path
	}
	return false, w.add(e)
}

// add appends an entry. Its Size must be set.
func (w *dirReader) add(e *content.Entry) error {
	w.out = append(w.out, e)
	w.entry(len(e.Path), e)
	if err := w.tell(); err != nil {
		return fmt.Errorf("read %s: %w", quote(e.Path), err)
	}
	return nil
}

func (w *dirReader) put(e *content.Entry, f *os.File) error {
	r := memberReader{ctx: w.ctx, r: io.LimitReader(f, e.Size)}
	err := w.payloads.Put(e, &r)
	switch {
	case r.n < e.Size && (err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
		return fmt.Errorf("read %q: it changed while it was read: got %d of %d bytes", e.Path, r.n, e.Size)
	case err != nil:
		return fmt.Errorf("read %q: %w", e.Path, err)
	}
	return nil
}

// openView opens the file that the merged mount shows for e, with its data.
func (w *dirReader) openView(e *content.Entry) (*os.File, error) {
	if w.view == "" {
		return nil, errors.New("there is no view")
	}
	root, err := unix.Open(w.view, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, e.Path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), e.Path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != e.Size {
		f.Close()
		return nil, errors.Join(err, errors.New("it is another file there"))
	}
	return f, nil
}

// special appends what cannot be opened: symlinks, devices, fifos and sockets.
func (w *dirReader) special(parent *os.File, name string, e *content.Entry, st *unix.Stat_t) error {
	setStat(e, st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		e.Kind = content.Symlink
		buf := make([]byte, maxPath+1)
		n, err := unix.Readlinkat(int(parent.Fd()), name, buf)
		if err == unix.ENOENT {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read symlink %q: %w", e.Path, err)
		}
		e.Target = string(buf[:n])
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Kind = content.Char
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			e.Kind = content.Block
		} else if st.Rdev == 0 {
			return w.add(&content.Entry{Path: e.Path, Kind: content.Whiteout})
		}
		e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	case unix.S_IFIFO:
		e.Kind = content.Fifo
	case unix.S_IFSOCK:
		e.Kind = content.Socket
	default:
		return fmt.Errorf("read %q: unknown file type %#o", e.Path, st.Mode&unix.S_IFMT)
	}
	if _, err := readXattrs(e, nameXattrs(parent, name)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("read attributes of %q: %w", e.Path, err)
	}
	_, err := w.linked(e, st)
	return err
}

func setStat(e *content.Entry, st *unix.Stat_t) {
	e.Mode, e.UID, e.GID = st.Mode&0o7777, st.Uid, st.Gid
	e.Mtime = content.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
}
