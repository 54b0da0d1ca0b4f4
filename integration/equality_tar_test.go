package integration

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// Sparse files in the formats that containerd's applier reads.
func TestEqualitySparse(t *testing.T) {
	t.Parallel()
	src := sparseFiles(t)
	layers := []*image.Layer{busybox(t)}
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		layers = append(layers, tarLayer(t, src, "sparse-"+version, "--format=posix",
			"--sparse", "--hole-detection=seek", "--sparse-version="+version))
	}
	fresh(t, comparison{ignore: noRootTime}, layers...)
}

func sparseFiles(t *testing.T) string {
	t.Helper()
	src := t.TempDir()
	for name, pieces := range map[string]map[int64]string{
		"middle":   {1 << 20: "in the middle"},
		"ends":     {0: "at the start", 3<<20 - 10: "at the end"},
		"hole-end": {4096: "then nothing"},
		"many":     {0: "a", 100 << 10: "b", 200 << 10: "c", 300 << 10: "d", 400 << 10: "e", 500 << 10: "f"},
		"nothing":  {},
	} {
		must(t, writeSparse(filepath.Join(src, name), pieces))
	}
	return src
}

// Everything that GNU tar writes of one directory in each of its formats.
func TestEqualityTarFormats(t *testing.T) {
	t.Parallel()
	src := oddFiles(t)
	layers := []*image.Layer{busybox(t)}
	for _, format := range []string{"v7", "oldgnu", "gnu", "ustar", "posix"} {
		flags := []string{"--format=" + format}
		switch format {
		case "v7": // knows neither devices nor long names
			flags = append(flags, "--exclude=long-*", "--exclude=fifo", "--exclude=device")
		case "ustar":
			flags = append(flags, "--exclude=long-*")
		case "posix":
			flags = append(flags, "--xattrs", "--xattrs-include=*", "--numeric-owner")
		}
		layers = append(layers, tarLayer(t, src, format, flags...))
	}
	fresh(t, comparison{ignore: noRootTime}, layers...)
}

func oddFiles(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes devices")
	}
	src := t.TempDir()
	in := func(name string) string { return filepath.Join(src, name) }
	long := "long-" + strings.Repeat("n", 150)
	must(t, errors.Join(
		os.Chmod(src, 0o755),
		os.Mkdir(in("dir"), 0o750),
		os.WriteFile(in("dir/file"), []byte("bytes"), 0o600),
		os.Link(in("dir/file"), in("hard")),
		os.WriteFile(in("setuid"), []byte("s"), 0o755),
		os.Chown(in("setuid"), 1234, 2345),
		os.Chmod(in("setuid"), 0o755|os.ModeSetuid),
		os.WriteFile(in("latin1-\xe9"), nil, 0o644),
		os.Symlink("dir/file", in("link")),
		os.Mkdir(in(long), 0o755),
		os.WriteFile(in(long+"/"+long), []byte("deep"), 0o644),
		os.Symlink(long+"/"+long, in("long-link")),
		unix.Mkfifo(in("fifo"), 0o600),
		unix.Mknod(in("device"), unix.S_IFCHR|0o620, int(unix.Mkdev(4, 64))),
		os.WriteFile(in("attributes"), []byte("a"), 0o644),
		unix.Setxattr(in("attributes"), "user.text", []byte("x=y\n"), 0),
		unix.Setxattr(in("attributes"), "user.binary", []byte{0, 255, 1}, 0),
	))
	for i, name := range []string{"dir/file", "setuid", "dir"} {
		at := time.Unix(1_200_000_000+int64(i), 123456789)
		must(t, os.Chtimes(in(name), at, at))
	}
	return src
}

// tarLayer is a layer that GNU tar made of a directory, under the name dir.
func tarLayer(t *testing.T, src, dir string, flags ...string) *image.Layer {
	t.Helper()
	l, err := image.NewLayer(t.TempDir(), image.LayerOptions{}, func(w io.Writer) error {
		args := append([]string{"-C", src, "--sort=name",
			"--transform=s,^\\.," + dir + ",", "-cf", "-"}, flags...)
		cmd := exec.Command("tar", append(args, ".")...)
		cmd.Stdout, cmd.Stderr = w, os.Stderr
		return cmd.Run()
	})
	must(t, err)
	return l
}

func writeSparse(path string, pieces map[int64]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(3 << 20); err != nil {
		return err
	}
	for at, text := range pieces {
		if _, err := f.WriteAt([]byte(text), at); err != nil {
			return err
		}
	}
	return f.Sync() // so that the holes are known
}
