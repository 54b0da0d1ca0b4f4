package archive

import (
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// needRoot skips what only root can set up.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes devices, trusted attributes or mounts")
	}
}

// must stops a test whose setup does not work.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stamp gives everything below root a known mtime, children first.
func stamp(t *testing.T, root string) {
	t.Helper()
	var paths []string
	must(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		paths = append([]string{p}, paths...)
		return err
	}))
	at := unix.Timespec{Sec: -5, Nsec: 42}
	for _, p := range paths {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

func readDir(t *testing.T, upper, view string) []string {
	t.Helper()
	entries, err := ReadDir(t.Context(), upper, view, hashing{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkEntries(t, entries)
	var out []string
	for _, e := range entries {
		out = append(out, describe(e))
	}
	return out
}

func TestReadDir(t *testing.T) {
	needRoot(t)
	// The suite's own temp directory, but short: a socket's path has 107 bytes.
	up, err := os.MkdirTemp("", "upper")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(up) })
	p := func(name string) string { return filepath.Join(up, name) }
	must(t, os.Chmod(up, 0o2751))
	must(t, os.Chown(up, 12, 34))
	must(t, os.Chmod(up, 0o751))

	must(t, os.MkdirAll(p("d/e"), 0o755))
	must(t, unix.Setxattr(p("d"), "trusted.overlay.opaque", []byte("y"), 0))
	must(t, unix.Setxattr(p("d"), "trusted.overlay.impure", []byte("y"), 0))
	must(t, unix.Setxattr(p("d"), "trusted.mine", []byte("1"), 0))
	must(t, unix.Setxattr(p("d/e"), "trusted.overlay.opaque", []byte("x"), 0))
	must(t, unix.Setxattr(p("d/e"), "user.overlay.opaque", []byte("y"), 0))
	must(t, os.WriteFile(p("d/e/gone"), nil, 0o644))
	must(t, unix.Setxattr(p("d/e/gone"), "trusted.overlay.whiteout", []byte("y"), 0))
	must(t, os.WriteFile(p("f"), []byte("x"), 0o600))
	must(t, unix.Setxattr(p("f"), "user.long", []byte(strings.Repeat("v", 1000)), 0))
	must(t, unix.Setxattr(p("f"), "security.capability", []byte(netRaw), 0))
	must(t, unix.Setxattr(p("f"), "trusted.overlay.origin", []byte("z"), 0))
	must(t, os.WriteFile(p("empty"), nil, 0o4755))
	must(t, os.Chmod(p("empty"), 0o755|os.ModeSetuid))
	must(t, os.Link(p("f"), p("d/link")))
	must(t, os.Link(p("f"), p("z")))
	must(t, os.Symlink("/etc/\xff", p("s")))
	must(t, unix.Lsetxattr(p("s"), "security.foo", []byte("1"), 0))
	must(t, os.Link(p("s"), p("s2")))
	must(t, unix.Mknod(p("c"), unix.S_IFCHR|0o666, int(unix.Mkdev(4095, 1048575))))
	must(t, unix.Mknod(p("b"), unix.S_IFBLK|0o660, int(unix.Mkdev(0, 0))))
	must(t, unix.Mknod(p("white"), unix.S_IFCHR, 0))
	must(t, os.Link(p("white"), p("white2")))
	must(t, unix.Mkfifo(p("p"), 0o600))
	l, err := net.Listen("unix", p("sock"))
	must(t, err)
	defer l.Close()
	must(t, os.Chmod(p("sock"), 0o700))
	must(t, os.Chmod(p("p"), 0o600))
	must(t, os.Chmod(p("c"), 0o666))
	must(t, os.Chmod(p("b"), 0o660))
	stamp(t, up)

	const at = " 0:0 -5.000000042"
	want := []string{
		`"" dir 0751 12:34 -5.000000042`,
		`"b" block 0660` + at + ` 0:0`,
		`"c" char 0666` + at + ` 4095:1048575`,
		`"d" dir 0755` + at + ` opaque`,
		`"d/e" dir 0755` + at + ` user.overlay.opaque=79`,
		`"d/e/gone" whiteout`,
		`"d/link" file 0600` + at + ` 1 bytes ` + sum8("x") + ` security.capability=` + hexOf(netRaw) + ` user.long=` +
			strings.Repeat("76", 1000),
		`"empty" file 4755` + at + ` 0 bytes`,
		`"f" hardlink -> "d/link"`,
		`"p" fifo 0600` + at,
		`"s" symlink 0777` + at + ` -> "/etc/\xff" security.foo=31`,
		`"s2" hardlink -> "s"`,
		`"sock" socket 0700` + at,
		`"white" whiteout`,
		`"white2" whiteout`,
		`"z" hardlink -> "d/link"`,
	}
	if diff := cmp.Diff(want, readDir(t, up, "")); diff != "" {
		t.Errorf("want (-), got (+):\n%s", diff)
	}
}

// overlay mounts an overlay of a lower directory that fill makes, and returns its
// upper directory and the mount.
func overlay(t *testing.T, options string, fill func(lower string)) (upper, merged string) {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	dirs := map[string]string{}
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		dirs[d] = filepath.Join(root, d)
		must(t, os.Mkdir(dirs[d], 0o755))
	}
	fill(dirs["lower"])
	data := "lowerdir=" + dirs["lower"] + ",upperdir=" + dirs["upper"] + ",workdir=" + dirs["work"] + options
	if err := unix.Mount("overlay", dirs["merged"], "overlay", 0, data); err != nil {
		t.Skipf("mount overlay%s: %v", options, err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dirs["merged"], 0)) })
	return dirs["upper"], dirs["merged"]
}

// TestReadDirOfOverlay has the kernel itself write the upper directory.
func TestReadDirOfOverlay(t *testing.T) {
	upper, merged := overlay(t, ",metacopy=on", func(lower string) {
		must(t, os.MkdirAll(filepath.Join(lower, "dir/sub"), 0o755))
		must(t, os.WriteFile(filepath.Join(lower, "dir/file"), []byte("lower data"), 0o644))
		must(t, os.WriteFile(filepath.Join(lower, "dir/gone"), nil, 0o644))
		must(t, os.MkdirAll(filepath.Join(lower, "again/old"), 0o755))
	})
	must(t, os.Chmod(filepath.Join(merged, "dir/file"), 0o600)) // copied up without data
	must(t, os.Link(filepath.Join(merged, "dir/file"), filepath.Join(merged, "dir/a")))
	must(t, os.Remove(filepath.Join(merged, "dir/gone")))
	must(t, os.RemoveAll(filepath.Join(merged, "again")))
	must(t, os.Mkdir(filepath.Join(merged, "again"), 0o700))
	must(t, unix.Setxattr(filepath.Join(merged, "again"), "trusted.overlay.opaque", []byte("y"), 0))
	stamp(t, upper)

	const at = " 0:0 -5.000000042"
	want := []string{
		`"" dir 0755` + at,
		`"again" dir 0700` + at + ` opaque`,
		`"dir" dir 0755` + at,
		`"dir/a" file 0600` + at + ` 10 bytes ` + sum8("lower data"),
		`"dir/file" hardlink -> "dir/a"`,
		`"dir/gone" whiteout`,
	}
	if diff := cmp.Diff(want, readDir(t, upper, merged)); diff != "" {
		t.Errorf("want (-), got (+):\n%s", diff)
	}
	_, err := ReadDir(t.Context(), upper, "", hashing{}, nil)
	if err == nil || !strings.Contains(err.Error(), "no view") {
		t.Errorf("without a view: %v", err)
	}
}

func TestReadDirRefusesRedirects(t *testing.T) {
	upper, merged := overlay(t, ",redirect_dir=on", func(lower string) {
		must(t, os.Mkdir(filepath.Join(lower, "old"), 0o755))
	})
	must(t, os.Rename(filepath.Join(merged, "old"), filepath.Join(merged, "new")))
	_, err := ReadDir(t.Context(), upper, merged, hashing{}, nil)
	if err == nil || !strings.Contains(err.Error(), `"new"`) || !strings.Contains(err.Error(), "redirect_dir") {
		t.Errorf("got %v", err)
	}
}

// TestSymlinkSwap: a container that swaps directories and files for symlinks
// while they are read never gets a file of the host into its layer.
func TestSymlinkSwap(t *testing.T) {
	outside, upper := t.TempDir(), t.TempDir()
	secret := strings.Repeat("secret", 10)
	must(t, os.WriteFile(filepath.Join(outside, "f"), []byte(secret), 0o644))
	must(t, os.MkdirAll(filepath.Join(upper, "d"), 0o755))
	must(t, os.WriteFile(filepath.Join(upper, "d/f"), []byte("mine"), 0o644))
	must(t, os.WriteFile(filepath.Join(upper, "g"), []byte("mine"), 0o644))

	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		d, g, aside := filepath.Join(upper, "d"), filepath.Join(upper, "g"), filepath.Join(outside, "aside")
		for {
			select {
			case <-stop:
				return
			default:
			}
			os.Rename(d, aside)
			os.Symlink(outside, d)
			os.Remove(d)
			os.Rename(aside, d)
			os.Rename(g, aside)
			os.Symlink(filepath.Join(outside, "f"), g)
			os.Remove(g)
			os.Rename(aside, g)
		}
	}()
	defer func() { close(stop); <-done }()
	bad := content.ObjectID{Sum: sha256.Sum256([]byte(secret))}
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		entries, err := ReadDir(t.Context(), upper, "", hashing{}, nil)
		if err != nil {
			continue // what changed is an error or left out
		}
		for _, e := range entries {
			if e.Object == bad {
				t.Fatalf("read through a symlink: %s", describe(e))
			}
		}
	}
}

func TestReadDirShrinkingFile(t *testing.T) {
	upper := t.TempDir()
	name := filepath.Join(upper, "f")
	must(t, os.WriteFile(name, []byte("12345678"), 0o644))
	_, err := ReadDir(t.Context(), upper, "", putFunc(func(e *content.Entry, r io.Reader) error {
		must(t, os.Truncate(name, 3))
		_, err := io.CopyN(io.Discard, r, e.Size)
		return err
	}), nil)
	if err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("got %v", err)
	}
	refused := errors.New("refused")
	_, err = ReadDir(t.Context(), upper, "", putFunc(func(*content.Entry, io.Reader) error { return refused }), nil)
	if !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
}
