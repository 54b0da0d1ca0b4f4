// Package encoders finds out which compressor made a layer's blob, so that the blob could be made again from the tar,
// byte for byte, and what a recipe for the tar itself costs.
//
// The product's own are in package recipe. This adds programs and other releases of Go, to know what it misses.
package encoders

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// command makes an encoder of a program that filters its standard input.
func command(format recipe.Format, name string, args ...string) recipe.Encoder {
	return recipe.Encoder{Name: name, Format: format, Open: func(w io.Writer) (io.WriteCloser, error) {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdout = w
		in, err := cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		return &program{in, cmd}, cmd.Start()
	}}
}

// program is one that runs.
type program struct {
	io.WriteCloser
	cmd *exec.Cmd
}

// Close ends its input, and waits for it.
func (p *program) Close() error { return errors.Join(p.WriteCloser.Close(), p.cmd.Wait()) }

// zlibScript is zlib by way of Python, with the header that gzip wants.
const zlibScript = `
import sys, zlib
c = zlib.compressobj(int(sys.argv[1]), zlib.DEFLATED, 31, int(sys.argv[2]))
while b := sys.stdin.buffer.read(1 << 20):
    sys.stdout.buffer.write(c.compress(b))
sys.stdout.buffer.write(c.flush())
`

// otherGo is the source of an encoder that another release of Go compiles.
const otherGo = `package main

import ("compress/gzip"; "io"; "os"; "strconv")

func main() {
	level, _ := strconv.Atoi(os.Args[1])
	w, err := gzip.NewWriterLevel(os.Stdout, level)
	if err != nil { panic(err) }
	if _, err := io.Copy(w, os.Stdin); err != nil { os.Exit(1) }
	if err := w.Close(); err != nil { os.Exit(1) }
}
`

// Toolchains are releases of Go whose compress/flate differ; one is what this program was built with, most likely.
var toolchains = []string{"go1.26.8", "go1.27.0"}

// Gzip returns the encoders of gzip that can be had here, the likely ones first. dir is for programs that are built.
func Gzip(ctx context.Context, dir string, say func(string)) (list []recipe.Encoder) {
	list = recipe.Encoders(recipe.Gzip)
	for _, version := range toolchains {
		list = append(list, goEncoders(ctx, dir, version, say)...)
	}
	for level := 1; level <= 9; level++ {
		text := strconv.Itoa(level)
		list = appendFound(list, recipe.Gzip, "gzip "+text, "gzip", "-n", "-"+text, "-c")
		list = appendFound(list, recipe.Gzip, "pigz "+text, "pigz", "-n", "-"+text, "-c")
		list = appendFound(list, recipe.Gzip, "zlib "+text, "python3", "-c", zlibScript, text, "8")
		list = appendFound(list, recipe.Gzip, "zlib "+text+", memLevel 9", "python3", "-c", zlibScript, text, "9")
	}
	for level := range 4 {
		list = appendFound(list, recipe.Gzip, fmt.Sprint("igzip ", level), "igzip", "-n", fmt.Sprint("-", level), "-c")
	}
	return list
}

// Zstd returns the encoders of zstd.
func Zstd() []recipe.Encoder {
	list := recipe.Encoders(recipe.Zstd)
	for level := 1; level <= 19; level++ {
		list = appendFound(list, recipe.Zstd, fmt.Sprint("zstd ", level), "zstd", fmt.Sprint("-", level), "-c", "-q")
		all := fmt.Sprint("zstd ", level, ", all threads")
		list = appendFound(list, recipe.Zstd, all, "zstd", fmt.Sprint("-", level), "-T0", "-c", "-q")
	}
	return list
}

func appendFound(list []recipe.Encoder, format recipe.Format, name string, args ...string) []recipe.Encoder {
	if _, err := exec.LookPath(args[0]); err != nil {
		return list
	}
	return append(list, command(format, name, args...))
}

// goEncoders are compress/gzip of one release of Go, where this program was not built with it.
func goEncoders(ctx context.Context, dir, version string, say func(string)) (list []recipe.Encoder) {
	if runtime.Version() == version {
		return nil // among recipe.Encoders
	}
	bin, src := filepath.Join(dir, version), filepath.Join(dir, version+".go")
	if err := os.WriteFile(src, []byte(otherGo), 0o600); err != nil {
		say(err.Error())
		return nil
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin, src)
	cmd.Dir = dir // apart from any module
	cmd.Env = append(os.Environ(), "GOTOOLCHAIN="+version, "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		say(fmt.Sprintf("%s is left out: %v: %s", version, err, out))
		return nil
	}
	for level := 1; level <= 9; level++ {
		list = append(list, command(recipe.Gzip, fmt.Sprint(version, " ", level), bin, strconv.Itoa(level)))
	}
	return list
}

// Match is what made a blob.
type Match struct {
	Encoder string // "" where none of those tried did
	Time    time.Duration
	Tried   int
}

// Find tries encoders until one makes the blob in a file.
func Find(ctx context.Context, path string, list []recipe.Encoder) (m Match, err error) {
	for _, e := range list {
		m.Tried++
		start := time.Now()
		same, err := e.Makes(ctx, func() (io.ReadCloser, error) { return os.Open(path) }, nil)
		if ctx.Err() != nil {
			return m, context.Cause(ctx)
		}
		if err == nil && same {
			m.Encoder, m.Time = e.Name, time.Since(start)
			return m, nil
		}
	}
	return m, nil
}

// Known reports whether a blob is compressed in a way that this package has encoders for, and decompresses it.
func Known(blob []byte) (tar []byte, isZstd bool, err error) {
	if bytes.HasPrefix(blob, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		r, err := zstd.NewReader(bytes.NewReader(blob))
		if err != nil {
			return nil, true, err
		}
		defer r.Close()
		tar, err = io.ReadAll(r)
		return tar, true, err
	}
	r, err := stdgzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		return nil, false, fmt.Errorf("neither gzip nor zstd: %w", err)
	}
	tar, err = io.ReadAll(r)
	return tar, false, err
}
