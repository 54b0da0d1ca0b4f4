package rootfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sample is a tree with one of everything that a test can make without root.
func sample(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(os.Mkdir(filepath.Join(root, "dir"), 0o755))
	ok(os.WriteFile(filepath.Join(root, "dir/file"), []byte("bytes"), 0o644))
	ok(os.Link(filepath.Join(root, "dir/file"), filepath.Join(root, "hard")))
	ok(os.WriteFile(filepath.Join(root, "other"), []byte("other"), 0o644))
	ok(os.Symlink("dir/file", filepath.Join(root, "link")))
	ok(unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	for _, p := range []string{"dir/file", "other", "link", "fifo", "dir", "."} {
		ts := []unix.Timespec{{Sec: 1e9}, {Sec: 1e9, Nsec: 123456789}}
		ok(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(root, p), ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	return root
}

// Every kind of change is seen, named, and blamed on the right path.
func TestDiffSeesEachChange(t *testing.T) {
	want, err := Dump(sample(t))
	if err != nil {
		t.Fatal(err)
	}
	keepTime := func(root, path string, how func(string) error) error {
		p := filepath.Join(root, path)
		if err := how(p); err != nil {
			return err
		}
		ts := []unix.Timespec{{Sec: 1e9}, {Sec: 1e9, Nsec: 123456789}}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Dir(p), ts, unix.AT_SYMLINK_NOFOLLOW)
	}
	for _, tt := range []struct {
		name, want string
		change     func(root string) error
	}{
		{"nothing", "", func(string) error { return nil }},
		{"bytes", "other: sha256 is ", func(r string) error {
			return keepTime(r, "other", func(p string) error { return os.WriteFile(p, []byte("OTHER"), 0o644) })
		}},
		{"size", "other: size is 6, want 5", func(r string) error {
			return keepTime(r, "other", func(p string) error { return os.Truncate(p, 6) })
		}},
		{"mode", "other: mode is 4755, want 0644", func(r string) error {
			return os.Chmod(filepath.Join(r, "other"), 0o755|os.ModeSetuid)
		}},
		{"mtime", "other: mtime is 2001-09-09T01:46:40.123456788Z, want 2001-09-09T01:46:40.123456789Z",
			func(r string) error {
				at := time.Unix(1e9, 123456788)
				return os.Chtimes(filepath.Join(r, "other"), at, at)
			}},
		{"xattr", `other: xattr user.x is "1", want absent`, func(r string) error {
			return unix.Setxattr(filepath.Join(r, "other"), "user.x", []byte("1"), 0)
		}},
		{"target", "link: link target is dir/FILE, want dir/file", func(r string) error {
			return keepTime(r, "link", func(p string) error {
				return firstError(os.Remove(p), os.Symlink("dir/FILE", p))
			})
		}},
		{"type", "fifo: type is dir, want fifo", func(r string) error {
			return keepTime(r, "fifo", func(p string) error {
				return firstError(os.Remove(p), os.Mkdir(p, 0o600), os.Chmod(p, 0o600))
			})
		}},
		{"broken hardlink", "hard: nlink is 1, want 2", func(r string) error {
			return keepTime(r, "hard", func(p string) error {
				return firstError(os.Remove(p), os.WriteFile(p, []byte("bytes"), 0o644))
			})
		}},
		{"other hardlink", "hard: hardlink group is hard, want dir/file", func(r string) error {
			p := filepath.Join(r, "hard")
			return firstError(os.Remove(p), os.Link(filepath.Join(r, "other"), p))
		}},
		{"missing", "fifo: missing, want a fifo", func(r string) error { return os.Remove(filepath.Join(r, "fifo")) }},
		{"unexpected", "new: unexpected file", func(r string) error {
			return os.WriteFile(filepath.Join(r, "new"), nil, 0o644)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := sample(t)
			if err := tt.change(root); err != nil {
				t.Fatal(err)
			}
			got, err := Dump(root)
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Join(Diff(want, got, DiffOptions{}), "\n")
			if tt.want == "" && lines != "" || !strings.Contains(lines, tt.want) {
				t.Errorf("differences:\n%s\nwant one that says %q", lines, tt.want)
			}
		})
	}
}

func TestDiffIgnores(t *testing.T) {
	want := Tree{".": {Type: "dir"}, "a": {Type: "file"}, "b": {Type: "file"}}
	got := Tree{".": {Type: "dir", MTime: time.Unix(1, 0)}, "a": {Type: "file", UID: 1, MTime: time.Unix(1, 0)}}
	opts := DiffOptions{RootTime: true, Times: []string{"a"}, Owners: []string{"?"}, Paths: []string{"b"}}
	if lines := Diff(want, got, opts); len(lines) != 0 {
		t.Errorf("ignored differences are shown: %q", lines)
	}
	if lines := Diff(want, got, DiffOptions{}); len(lines) != 4 {
		t.Errorf("got %q, want 4 differences", lines)
	}
}

func TestUsage(t *testing.T) {
	root := t.TempDir()
	before, err := Usage(root)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, "file")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(make([]byte, 100_000))
	if err := firstError(err, f.Truncate(1<<30), f.Sync(), f.Close(), os.Link(file, file+"-2")); err != nil {
		t.Fatal(err)
	}
	after, err := Usage(root)
	if err != nil {
		t.Fatal(err)
	}
	added := after.Sub(before)
	if added.Inodes != 1 || added.Bytes < 100_000 || added.Bytes > 300_000 {
		t.Errorf("a sparse file with two names costs %+v, want 1 inode and little more than 100,000 bytes", added)
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
