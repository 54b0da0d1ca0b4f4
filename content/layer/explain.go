package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// explained is an error that already says what to do.
type explained struct {
	error
	hint string
}

func (e explained) Error() string { return e.error.Error() + " (" + e.hint + ")" }
func (e explained) Unwrap() error { return e.error }

// Explain adds what to do to errors of the system, once. They are of the file system of root where they name no other
// path.
func Explain(err error, root string) error {
	if err == nil || Explained(err) {
		return err
	}
	at, named := root, (*fs.PathError)(nil)
	if errors.As(err, &named) && filepath.IsAbs(named.Path) && !strings.HasPrefix(named.Path, root+"/") {
		at = named.Path
	}
	for _, known := range []struct {
		errno unix.Errno
		hint  string
	}{
		{unix.ENOSPC, "free space or inodes on the file system of %s, or remove images"},
		{unix.EDQUOT, "raise the disk quota on %s, or remove images"},
		{unix.EROFS, "the file system of %s has become read-only: check the kernel log"},
		{unix.EIO, "the disk under %s does not work: check the kernel log"},
		{unix.ESHUTDOWN, "the kernel has shut the file system of %s down: check the kernel log"},
		{unix.EMFILE, "the daemon for %s has too many files open: raise LimitNOFILE in its unit"},
		{unix.ENFILE, "the machine of %s has too many files open: raise fs.file-max"},
		{unix.ENOMEM, "the kernel has no memory for %s: free memory, or raise the limit of the daemon's unit"},
	} {
		if errors.Is(err, known.errno) {
			return explained{err, fmt.Sprintf(known.hint, at)}
		}
	}
	return err
}

// Explained reports whether an error is one of the system that Explain knows.
func Explained(err error) bool { return errors.As(err, new(explained)) }

func (d *directory) explain(err error) error { return Explain(err, d.root) }
