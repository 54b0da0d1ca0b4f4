package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/encoders"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
)

func encodersCommand() *cli.Command {
	return &cli.Command{
		Name:      "encoders",
		Usage:     "find out whether layers' blobs could be made again, byte for byte, from the files of a store",
		ArgsUsage: "[BLOB...]",
		Description: "Without BLOB: has every tool that can be had here make a layer of the same files, and tries which\n" +
			"compressor makes the same blob again. A BLOB is a file: a layer from a registry, say. Prints a table in\n" +
			"Markdown. Needs root, for BuildKit and buildah.",
		Flags: []cli.Flag{
			&cli.Int64Flag{Name: "size", Value: 24, Usage: "`MB` of files to make layers of"},
		},
		Action: runEncoders,
	}
}

func runEncoders(c *cli.Context) (err error) {
	ctx, p := c.Context, newProgress(os.Stderr)
	dir, err := os.MkdirTemp("", "dedup-encoders-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	t := encoderTable{gzip: encoders.Gzip(ctx, dir, p.say), zstd: encoders.Zstd(), w: c.App.Writer}
	fmt.Fprintln(t.w, "| made by | blob, tar | made again by | by the daemon | ms a MB of tar: recipe, blob | "+
		"recipe of the tar |")
	fmt.Fprintln(t.w, "| --- | --- | --- | --- | --- | --- |")
	for _, path := range c.Args().Slice() {
		if err := t.row(ctx, filepath.Base(path), path); err != nil {
			return err
		}
	}
	if c.NArg() == 0 {
		in, err := encoderInput(ctx, dir, c.Int64("size")<<20, p.say)
		if err != nil {
			return err
		}
		for i, m := range encoders.Makers(p.say) {
			p.say(m.Name)
			own := filepath.Join(dir, fmt.Sprint("maker-", i))
			if err := os.Mkdir(own, 0o700); err != nil {
				return err
			}
			path, err := m.Make(ctx, in, own)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				first, _, _ := strings.Cut(err.Error(), "\n")
				fmt.Fprintf(t.w, "| %s | not to be had here: %s | | | | |\n", m.Name, first)
				continue
			}
			if err := t.row(ctx, m.Name, path); err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
		}
	}
	fmt.Fprintf(t.w, "\n%d of %d blobs can be made again, %d of them by the daemon.\n", t.matched, t.rows, t.daemon)
	return nil
}

type encoderTable struct {
	w          io.Writer
	gzip, zstd []recipe.Encoder
	rows       int
	matched    int
	daemon     int // the daemon's own encoders
}

func (t *encoderTable) row(ctx context.Context, name, path string) error {
	blob, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	data, isZstd, err := encoders.Known(blob)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	list := t.gzip
	if isZstd {
		list = t.zstd
	}
	m, err := encoders.Find(ctx, path, list)
	if err != nil {
		return err
	}
	r, err := encoders.MakeRecipe(ctx, path, data)
	if err != nil {
		return err
	}
	t.rows++
	by := fmt.Sprintf("none of %d", m.Tried)
	if m.Encoder != "" {
		t.matched++
		by = m.Encoder
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.0f", d.Seconds()*1000/(float64(len(data))/1e6)) }
	daemon, took := "no", fmt.Sprintf("%d ms in all", r.Looked.Milliseconds())
	if r.Encoder != "" {
		t.daemon++
		daemon, took = "yes", ms(r.Made)+", "+ms(r.Built)
	}
	cost := fmt.Sprintf("%.1f bytes a file", float64(r.Bytes)/float64(max(1, r.Files)))
	_, err = fmt.Fprintf(t.w, "| %s | %.1f MB, %.1f MB | %s | %s | %s | %s |\n",
		name, float64(len(blob))/1e6, float64(len(data))/1e6, by, daemon, took, cost)
	return err
}

// encoderInput is a directory of files from the benchmarks' Debian and pip install, some of each, and a tar of it.
func encoderInput(ctx context.Context, dir string, size int64, say func(string)) (in encoders.Input, err error) {
	set, err := inputs.Open(say)
	if err != nil {
		return in, err
	}
	debian, err := set.Debian(ctx)
	if err != nil {
		return in, err
	}
	app, err := set.App(ctx, 1)
	if err != nil {
		return in, err
	}
	in = encoders.Input{Dir: filepath.Join(dir, "files"), Tar: filepath.Join(dir, "files.tar")}
	if err := os.Mkdir(in.Dir, 0o755); err != nil {
		return in, err
	}
	for _, l := range []*image.Layer{debian, app} {
		if err := someFiles(l, in.Dir, size/2); err != nil {
			return in, err
		}
	}
	cmd := exec.CommandContext(ctx, "tar", "--sort=name", "--numeric-owner", "-cf", in.Tar, "-C", in.Dir, ".")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("tar: %w: %s", err, out)
	}
	return in, err
}

// someFiles writes the first regular files of a layer, and their directories.
func someFiles(l *image.Layer, dir string, size int64) (err error) {
	r, err := l.Uncompressed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for tr := tar.NewReader(r); size > 0; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg || h.Size > 4<<20 {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		path := filepath.Join(dir, filepath.Clean("/"+h.Name))
		err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644),
			os.Chtimes(path, h.ModTime, h.ModTime))
		if err != nil {
			return err
		}
		size -= h.Size
	}
	return nil
}
