package compare

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// names says where two file systems can differ: a directory with the names in it, or all that a name stands for.
type names struct {
	// all: nothing is known of what lies below.
	all   bool
	below map[string]*names
}

// everything serves for all names that are no directories.
var everything = &names{all: true}

// add notes an entry of a layer that only one side has.
func (n *names) add(path string, kind content.Kind, flags content.Flags) {
	if kind == content.LowerLink {
		n.all = true // it may change other names of its inode, which the layer does not tell
		return
	}
	if path == "" {
		n.all = n.all || flags&content.Opaque != 0
		return
	}
	dir := n
	for rest := path; ; {
		name, deeper, more := strings.Cut(rest, "/")
		if !more {
			dir.put(name, kind == content.Dir && flags&content.Opaque == 0)
			return
		}
		if dir = dir.put(name, true); dir.all {
			return
		}
		rest = deeper
	}
}

// put notes a name, and returns what is known of it then. plain: it is a directory over what lies below it.
func (n *names) put(name string, plain bool) *names {
	old := n.below[name]
	switch {
	case old != nil && (old.all || plain):
		return old
	case n.below == nil:
		n.below = map[string]*names{}
	}
	is := everything
	if plain {
		is = &names{}
	}
	n.below[name] = is
	return is
}

// addUpper notes what an upper directory holds.
func (n *names) addUpper(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return n.addDir(root, ".")
}

func (n *names) addDir(root *os.Root, path string) error {
	dir, err := root.Open(path)
	if err != nil {
		return gone(err)
	}
	defer dir.Close()
	switch mark, err := overlayMarks(dir); {
	case err != nil:
		return err
	case mark.redirected:
		return fmt.Errorf("dedup-diff does not compare directories that an overlay renamed (%q): %w",
			path, errdefs.ErrNotImplemented)
	case mark.opaque:
		n.all = true
	}
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return gone(err)
	}
	for _, e := range entries {
		below := n.put(e.Name(), e.IsDir())
		if !e.IsDir() {
			continue
		}
		if below == everything { // a layer below the directory says more of the name
			below = &names{all: true}
		}
		if err := below.addDir(root, path+"/"+e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// gone leaves out what a running container removes meanwhile.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

type marks struct{ opaque, redirected bool }

// overlayMarks reads what overlayfs notes at a directory.
func overlayMarks(dir *os.File) (m marks, err error) {
	var value [256]byte
	for name, note := range map[string]func([]byte){
		"trusted.overlay.opaque":   func(v []byte) { m.opaque = string(v) == "y" },
		"trusted.overlay.redirect": func([]byte) { m.redirected = true },
	} {
		size, err := unix.Fgetxattr(int(dir.Fd()), name, value[:])
		switch {
		case err == nil:
			note(value[:size])
		case errors.Is(err, unix.ERANGE):
			note(nil)
		case !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP):
			return m, fmt.Errorf("read %s of %q: %w", name, dir.Name(), err)
		}
	}
	return m, nil
}
