package compare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	cfs "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// changes finds what differs between two directories, and where. It tells what continuity's fs.Changes would, in the
// same order, but looks at names alone.
type changes struct {
	ctx          context.Context
	lower, upper string
	tell         cfs.ChangeFunc
}

// find tells the changes in a directory of the upper side, which the lower one may have, too.
func (c *changes) find(path string, inLower bool, n *names) error {
	if err := c.ctx.Err(); err != nil {
		return context.Cause(c.ctx)
	}
	all := n.all || !inLower
	list := slices.Sorted(maps.Keys(n.below))
	if all {
		var err error
		if list, err = c.list(path, inLower); err != nil {
			return err
		}
	}
	for _, name := range list {
		below := n.below[name]
		if all || below == nil {
			below = everything
		}
		if err := c.name(path+"/"+name, inLower, below); err != nil {
			return err
		}
	}
	return nil
}

// name tells what changed under one name.
func (c *changes) name(path string, inLower bool, n *names) (err error) {
	var old, now os.FileInfo
	if inLower {
		if old, err = stat(c.lower + path); err != nil {
			return err
		}
	}
	if now, err = stat(c.upper + path); err != nil {
		return err
	}
	switch {
	case now == nil && old == nil:
		return nil
	case now == nil:
		return c.tell(cfs.ChangeKindDelete, path, nil, nil)
	case old == nil:
		err = c.tell(cfs.ChangeKindAdd, path, now, nil)
	default:
		err = c.both(path, old, now)
	}
	if err != nil || !now.IsDir() {
		return err
	}
	return c.find(path, old != nil && old.IsDir(), n)
}

// both tells how a name that both sides have differs.
func (c *changes) both(path string, old, now os.FileInfo) error {
	equal, err := same(c.lower+path, c.upper+path, old, now)
	if err != nil {
		return fmt.Errorf("compare %q: %w", path, err)
	}
	if !equal {
		return c.tell(cfs.ChangeKindModify, path, now, nil)
	}
	if st, ok := now.Sys().(*syscall.Stat_t); ok && !now.IsDir() && st.Nlink > 1 {
		return c.tell(cfs.ChangeKindUnmodified, path, now, nil) // another of its names may have changed
	}
	return nil
}

// list returns the names that either side has in a directory, sorted.
func (c *changes) list(path string, inLower bool) ([]string, error) {
	both := map[string]bool{}
	dirs := []string{c.upper + path}
	if inLower {
		dirs = append(dirs, c.lower+path)
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			both[e.Name()] = true
		}
	}
	return slices.Sorted(maps.Keys(both)), nil
}

// stat returns nil for what is not there.
func stat(path string) (os.FileInfo, error) {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && fi.Mode()&os.ModeCharDevice != 0 && st.Rdev == 0 {
		return nil, nil
	}
	return fi, nil
}

// same tells whether containerd's differ takes two files for one: it looks at the contents only where times may have
// been cut to seconds, and of extended attributes only at capabilities.
func same(lower, upper string, old, now os.FileInfo) (bool, error) {
	a, aok := old.Sys().(*syscall.Stat_t)
	b, bok := now.Sys().(*syscall.Stat_t)
	if !aok || !bok {
		return false, errors.New("no status")
	}
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return false, nil
	}
	if equal, err := sameCapabilities(lower, upper); err != nil || !equal {
		return false, err
	}
	switch {
	case now.IsDir():
		return true, nil
	case a.Size != b.Size, a.Mtim != b.Mtim:
		return false, nil
	case a.Mtim.Nsec != 0:
		return true, nil
	case now.Mode()&os.ModeSymlink != 0:
		was, err := os.Readlink(lower)
		if err != nil {
			return false, err
		}
		is, err := os.Readlink(upper)
		return was == is, err
	case !now.Mode().IsRegular() || now.Size() == 0:
		return true, nil
	}
	return sameBytes(lower, upper)
}

func sameCapabilities(lower, upper string) (bool, error) {
	was, err := capability(lower)
	if err != nil {
		return false, err
	}
	is, err := capability(upper)
	return bytes.Equal(was, is), err
}

func capability(path string) ([]byte, error) {
	value := make([]byte, 64)
	n, err := unix.Lgetxattr(path, "security.capability", value)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("capabilities of %s: %w", filepath.Base(path), err)
	}
	return value[:n], nil
}

func sameBytes(lower, upper string) (bool, error) {
	a, err := os.Open(lower)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := os.Open(upper)
	if err != nil {
		return false, err
	}
	defer b.Close()
	was, is := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, aerr := io.ReadFull(a, was)
		m, berr := io.ReadFull(b, is)
		if n != m || !bytes.Equal(was[:n], is[:m]) {
			return false, nil
		}
		if aerr != nil || berr != nil {
			return ended(aerr) && ended(berr), errors.Join(real(aerr), real(berr))
		}
	}
}

func ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

func real(err error) error {
	if ended(err) {
		return nil
	}
	return err
}
