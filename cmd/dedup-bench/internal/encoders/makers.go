package encoders

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Input is what every tool makes a layer of: a directory, and a tar of it.
type Input struct{ Dir, Tar string }

// Maker is a tool that makes layers.
type Maker struct {
	Name string
	// Make returns the path of a blob below dir.
	Make func(ctx context.Context, in Input, dir string) (string, error)
}

// javaSource compresses as Jib does, with the JDK's zlib.
const javaSource = `
import java.util.zip.GZIPOutputStream;
class Compress {
    public static void main(String[] args) throws Exception {
        try (GZIPOutputStream out = new GZIPOutputStream(System.out)) { System.in.transferTo(out); }
    }
}
`

// pythonScript compresses as tarfile and the image rules of Bazel and Nix do.
const pythonScript = `
import gzip, shutil, sys
with gzip.GzipFile(fileobj=sys.stdout.buffer, mode="wb", mtime=0) as out:
    shutil.copyfileobj(sys.stdin.buffer, out)
`

// Makers are the tools that can be had here. What is not installed says so when it is asked.
func Makers(say func(string)) []Maker {
	list := []Maker{
		{"buildah", buildah("gzip")}, {"buildah, zstd", buildah("zstd")}, {"umoci", umoci},
		{"BuildKit", buildKit(say, "gzip")}, {"BuildKit, zstd", buildKit(say, "zstd")},
		{"crane append", crane(say)}, {"ko and kaniko (go-containerregistry's tarball)", ggcr},
		{"Java's GZIPOutputStream, as Jib", java}, {"Python's gzip, as Bazel and Nix", filter("python3", "-c", pythonScript)},
	}
	for _, args := range [][]string{
		{"gzip", "-n"}, {"gzip", "-9n"}, {"pigz", "-n"}, {"pigz", "-9n"}, {"zstd", "-c"}, {"zstd", "-19", "-T0", "-c"},
	} {
		list = append(list, Maker{"tar and " + strings.Join(args, " "), filter(args...)})
	}
	return list
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// filter compresses the tar with a program.
func filter(args ...string) func(context.Context, Input, string) (string, error) {
	return func(ctx context.Context, in Input, dir string) (path string, err error) {
		r, err := os.Open(in.Tar)
		if err != nil {
			return "", err
		}
		defer r.Close()
		w, err := os.Create(filepath.Join(dir, "blob"))
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin, cmd.Stdout = r, w
		return w.Name(), cmd.Run()
	}
}

func java(ctx context.Context, in Input, dir string) (string, error) {
	src := filepath.Join(dir, "Compress.java")
	if err := os.WriteFile(src, []byte(javaSource), 0o600); err != nil {
		return "", err
	}
	return filter("java", src)(ctx, in, dir)
}

func buildah(compression string) func(context.Context, Input, string) (string, error) {
	return func(ctx context.Context, in Input, dir string) (string, error) {
		do := func(args ...string) error {
			all := append([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs"}, args...)
			return run(ctx, "buildah", all...)
		}
		layout := filepath.Join(dir, "layout")
		for _, args := range [][]string{
			{"from", "--name", "work", "scratch"}, {"add", "work", in.Dir, "/"}, {"commit", "work", "made"},
			{"push", "--compression-format", compression, "made", "oci:" + layout + ":made"},
		} {
			if err := do(args...); err != nil {
				return "", err
			}
		}
		return largest(layout)
	}
}

func umoci(ctx context.Context, in Input, dir string) (string, error) {
	layout := filepath.Join(dir, "layout")
	for _, args := range [][]string{
		{"init", "--layout", layout}, {"new", "--image", layout + ":made"},
		{"insert", "--image", layout + ":made", in.Dir, "/"},
	} {
		if err := run(ctx, "umoci", args...); err != nil {
			return "", err
		}
	}
	return largest(layout)
}

func buildKit(say func(string), compression string) func(context.Context, Input, string) (string, error) {
	return func(ctx context.Context, in Input, dir string) (path string, err error) {
		n, err := node.Start(ctx, node.Options{NoDedup: true, Say: say})
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, n.Close()) }()
		b, err := node.StartBuildKit(ctx, n, "overlayfs")
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, b.Close()) }()
		dockerfile := filepath.Join(in.Dir, "Dockerfile")
		if err := os.WriteFile(dockerfile, []byte("FROM scratch\nCOPY . /\n"), 0o600); err != nil {
			return "", err
		}
		defer os.Remove(dockerfile)
		out := filepath.Join(dir, "out.tar")
		output := "type=oci,dest=" + out + ",force-compression=true,compression=" + compression
		progress, err := b.Build(ctx, in.Dir, "--output", output)
		if err != nil {
			return "", fmt.Errorf("%w: %s", err, progress)
		}
		return unpacked(ctx, out, dir)
	}
}

func crane(say func(string)) func(context.Context, Input, string) (string, error) {
	return func(ctx context.Context, in Input, dir string) (string, error) {
		bin, err := node.BuildCrane(ctx, say)
		if err != nil {
			return "", err
		}
		if fi, err := os.Stat(bin); err == nil && fi.IsDir() {
			bin = filepath.Join(bin, "crane")
		}
		out := filepath.Join(dir, "out.tar")
		if err := run(ctx, bin, "append", "--new_layer", in.Tar, "--output", out, "--new_tag", "made:1"); err != nil {
			return "", err
		}
		return unpacked(ctx, out, dir)
	}
}

// ggcr is the library by which ko and kaniko make a layer of a tar.
func ggcr(_ context.Context, in Input, dir string) (path string, err error) {
	l, err := tarball.LayerFromFile(in.Tar)
	if err != nil {
		return "", err
	}
	r, err := l.Compressed()
	if err != nil {
		return "", err
	}
	defer r.Close()
	w, err := os.Create(filepath.Join(dir, "blob"))
	if err != nil {
		return "", err
	}
	_, err = w.ReadFrom(r)
	return w.Name(), errors.Join(err, w.Close())
}

func unpacked(ctx context.Context, tar, dir string) (string, error) {
	to := filepath.Join(dir, "unpacked")
	if err := errors.Join(os.Mkdir(to, 0o700), run(ctx, "tar", "-xf", tar, "-C", to)); err != nil {
		return "", err
	}
	return largest(to)
}

// largest returns the largest file below a directory: in an image of one layer, the layer.
func largest(dir string) (path string, err error) {
	var size int64
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if fi, err := d.Info(); err == nil && fi.Mode().IsRegular() && fi.Size() > size {
			path, size = p, fi.Size()
		}
		return nil
	})
	if err == nil && path == "" {
		err = fmt.Errorf("no blob below %s", dir)
	}
	return path, err
}
