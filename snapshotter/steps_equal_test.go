package snapshotter

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// treeOf describes all that a container sees of its files.
func treeOf(root string) (lines []string, err error) {
	first := map[[2]uint64]string{} // of hard links
	err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		line := fmt.Sprintf("%s mode %o of %d:%d", name, st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", data)
			inode := [2]uint64{st.Dev, st.Ino} // its count of links is that of the layer that it comes from
			if other := first[inode]; other != "" {
				line += " as " + other
			}
			first[inode] = name
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + to
		default:
			line += fmt.Sprintf(" device %x", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || name != "/" {
			line += fmt.Sprintf(" at %d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		names := make([]byte, 64<<10)
		n, err := unix.Llistxattr(path, names)
		if err != nil {
			return err
		}
		attrs := splitNul(names[:n])
		slices.Sort(attrs)
		for _, attr := range attrs {
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, attr, value)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", attr, path, err)
			}
			line += fmt.Sprintf(" %s=%q", attr, value[:n])
		}
		lines = append(lines, line)
		return nil
	})
	return lines, err
}

// stepChanges are what steps do, one after another.
var stepChanges = [][]string{
	{"mkdir:a", "file:a/one", "mkdir:a/b", "file:a/b/two", "file:c", "link:c:a/c", "mkdir:gone", "file:gone/x"},
	{"file:etc/base", "chmod:c", "link:a/one:a/b/one", "fifo:fifo", "socket:socket", "device:a/null", "symlink:a/sym"},
	{"remove:gone", "remove:a/b", "mkdir:a/b", "file:a/b/new", "xattr:a", "xattr:", "own:a/one", "setuid:c"},
	{"file:gone", "rename:etc/base:etc/moved", "link:etc/moved:etc/hard", "remove:a/sym", "acl:a", "acl:", "chmod:"},
	{"remove:gone", "mkdir:gone", "mkdir:gone/deep", "file:gone/deep/x", "rename:gone/deep:gone/deeper", "xattr:gone"},
	{"remove:etc", "mkdir:etc", "file:etc/base", "remove:a/c", "file:a/c", "remove:fifo", "mkdir:fifo", "own:"},
	{"remove:fifo", "symlink:fifo", "truncate:a/one", "xattr:a/b/new", "remove:a/null", "file:a/null", "setuid:a/null"},
	{"touch:a", "touch:c", "chmod:a/b", "own:gone/deeper", "xattr:gone/deeper/x", "remove:socket"},
	{},
	{"remove:a", "remove:c", "mkdir:a"},
}

// change does one thing.
func change(root, text string) error {
	f := strings.Split(text, ":")
	at := filepath.Join(root, f[1])
	switch f[0] {
	case "mkdir":
		return os.Mkdir(at, 0o750)
	case "file":
		return os.WriteFile(at, []byte(strings.Repeat(text, 400)), 0o640)
	case "link":
		return os.Link(at, filepath.Join(root, f[2]))
	case "rename":
		return os.Rename(at, filepath.Join(root, f[2]))
	case "remove":
		return os.RemoveAll(at)
	case "chmod":
		return os.Chmod(at, 0o705)
	case "setuid":
		return unix.Chmod(at, 0o6755)
	case "own":
		return os.Lchown(at, 1234, 5678)
	case "xattr":
		return errors.Join(unix.Lsetxattr(at, "user.text", []byte(text), 0),
			unix.Lsetxattr(at, "security.mine", []byte(text), 0))
	case "acl":
		acl := []byte{2, 0, 0, 0}
		for _, e := range [][3]byte{{1, 7}, {2, 4, 9}, {4, 5}, {16, 5}, {32, 4}} {
			id := [4]byte{255, 255, 255, 255}
			if e[2] != 0 {
				id = [4]byte{e[2]}
			}
			acl = append(append(acl, e[0], 0, e[1], 0), id[:]...)
		}
		return errors.Join(unix.Setxattr(at, "system.posix_acl_access", acl, 0),
			unix.Setxattr(at, "system.posix_acl_default", acl, 0))
	case "fifo":
		return unix.Mkfifo(at, 0o600)
	case "socket":
		return unix.Mknod(at, unix.S_IFSOCK|0o600, 0)
	case "device":
		return unix.Mknod(at, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	case "symlink":
		return os.Symlink("c", at)
	case "truncate":
		return os.Truncate(at, 5)
	case "touch":
		times := []unix.Timespec{{Sec: 1e9, Nsec: 7}, {Sec: 1e9, Nsec: 123456789}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, at, times, unix.AT_SYMLINK_NOFOLLOW)
	}
	return fmt.Errorf("what is %q", text)
}

// Who looks through the directories of steps, in a view or a container, sees what the last step left, and so does who
// looks at their layers.
func TestStepsShowWhatWasWritten(t *testing.T) {
	s, ctx := openSteps(t, t.TempDir()), ns(t, "steps")
	names := []string{stepBase(t, s, ctx)}
	var left [][]string // by a step, as it saw it itself
	for i, do := range stepChanges {
		names = append(names, addStep(t, s, ctx, names[i], fmt.Sprint("step ", i), func(root string) error {
			for _, text := range do {
				if err := change(root, text); err != nil {
					return fmt.Errorf("%s: %w", text, err)
				}
			}
			lines, err := treeOf(root)
			left = append(left, lines)
			return err
		}))
	}
	looks := func(when string) {
		for i, name := range names[1:] {
			view, err := s.View(ctx, "view", name)
			must(t, err)
			active, err := s.Prepare(ctx, "active", name)
			must(t, err)
			for how, mounts := range map[string][]mount.Mount{"view": view, "container": active} {
				must(t, mount.WithTempMount(ctx, mounts, func(root string) error {
					got, err := treeOf(root)
					if d := cmp.Diff(left[i], got); d != "" {
						t.Errorf("%s: %s of step %d:\n%s", when, how, i, d)
					}
					return err
				}))
			}
			must(t, errors.Join(s.Remove(ctx, "view"), s.Remove(ctx, "active")))
		}
	}
	if n := len(pendingOf(t, s)); n != len(stepChanges) {
		t.Errorf("%d steps wait", n)
	}
	looks("over directories")
	_, err := s.Check(ctx, CheckOptions{}) // ingests them all
	must(t, err)
	looks("over layers")
}
