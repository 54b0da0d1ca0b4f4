// Package encoders finds out which compressor made a layer's blob, so that the blob could be made again from the tar,
// byte for byte, and what a recipe for the tar itself costs.
//
// A blob's gzip header is left out of the comparison: a recipe has room for those few bytes. All else counts.
package encoders

import (
	"bufio"
	"bytes"
	"compress/flate"
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

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

// Encoder compresses a tar the way one library or program does it.
type Encoder struct {
	Name string
	// run compresses from r to w. It returns when w has refused a write, at the latest.
	run func(ctx context.Context, r io.Reader, w io.Writer) error
}

// writer makes an Encoder of a Go package.
func writer(name string, open func(io.Writer) (io.WriteCloser, error)) Encoder {
	return Encoder{name, func(_ context.Context, r io.Reader, w io.Writer) error {
		c, err := open(w)
		if err != nil {
			return err
		}
		// By Write, as a tar.Writer does: some have another way to read all, with other results.
		_, err = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{r})
		return errors.Join(err, c.Close())
	}}
}

// command makes an Encoder of a program that filters its standard input.
func command(name string, args ...string) Encoder {
	return Encoder{name, func(ctx context.Context, r io.Reader, w io.Writer) error {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin, cmd.Stdout = r, w
		return cmd.Run()
	}}
}

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
func Gzip(ctx context.Context, dir string, say func(string)) (list []Encoder) {
	for _, version := range toolchains {
		list = append(list, goEncoders(ctx, dir, version, say)...)
	}
	list = append(list, kinds()...)
	for level := 1; level <= 9; level++ {
		text := strconv.Itoa(level)
		list = appendFound(list, "gzip "+text, "gzip", "-n", "-"+text, "-c")
		list = appendFound(list, "pigz "+text, "pigz", "-n", "-"+text, "-c")
		list = appendFound(list, "zlib "+text, "python3", "-c", zlibScript, text, "8")
		list = appendFound(list, "zlib "+text+", memLevel 9", "python3", "-c", zlibScript, text, "9")
	}
	for level := range 4 {
		list = appendFound(list, fmt.Sprint("igzip ", level), "igzip", "-n", fmt.Sprint("-", level), "-c")
	}
	return list
}

// kinds are the encoders of klauspost/compress and pgzip.
func kinds() (list []Encoder) {
	for _, level := range []int{-1, 1, 2, 3, 4, 5, 6, 7, 8, 9} {
		list = append(list, writer(fmt.Sprint("klauspost gzip ", level), func(w io.Writer) (io.WriteCloser, error) {
			return kgzip.NewWriterLevel(w, level)
		}))
		for _, block := range []int{1 << 20, 256 << 10} {
			name := fmt.Sprintf("pgzip %d, blocks of %d KiB", level, block>>10)
			list = append(list, writer(name, func(w io.Writer) (io.WriteCloser, error) {
				p, err := pgzip.NewWriterLevel(w, level)
				if err != nil {
					return nil, err
				}
				return p, p.SetConcurrency(block, runtime.GOMAXPROCS(0))
			}))
		}
	}
	return list
}

// Zstd returns the encoders of zstd.
func Zstd() (list []Encoder) {
	levels := []zstd.EncoderLevel{
		zstd.SpeedDefault, zstd.SpeedFastest, zstd.SpeedBetterCompression, zstd.SpeedBestCompression,
	}
	for _, level := range levels {
		list = append(list, writer("klauspost zstd "+level.String(), func(w io.Writer) (io.WriteCloser, error) {
			return zstd.NewWriter(w, zstd.WithEncoderLevel(level))
		}))
	}
	for level := 1; level <= 19; level++ {
		list = appendFound(list, fmt.Sprint("zstd ", level), "zstd", fmt.Sprint("-", level), "-c", "-q")
		all := fmt.Sprint("zstd ", level, ", all threads")
		list = appendFound(list, all, "zstd", fmt.Sprint("-", level), "-T0", "-c", "-q")
	}
	return list
}

func appendFound(list []Encoder, name string, args ...string) []Encoder {
	if _, err := exec.LookPath(args[0]); err != nil {
		return list
	}
	return append(list, command(name, args...))
}

// goEncoders are compress/gzip of one release of Go.
func goEncoders(ctx context.Context, dir, version string, say func(string)) (list []Encoder) {
	levels := []int{flate.DefaultCompression, 1, 2, 3, 4, 5, 7, 8, 9}
	if runtime.Version() == version {
		for _, level := range levels {
			list = append(list, writer(fmt.Sprint(version, " ", level), func(w io.Writer) (io.WriteCloser, error) {
				return stdgzip.NewWriterLevel(w, level)
			}))
		}
		return list
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
	for _, level := range levels {
		list = append(list, command(fmt.Sprint(version, " ", level), bin, strconv.Itoa(level)))
	}
	return list
}

// Match is what made a blob.
type Match struct {
	Encoder string // "" where none of those tried did
	Time    time.Duration
	Tried   int
}

// Find tries encoders until one makes blob of the tar.
func Find(ctx context.Context, blob, tar []byte, list []Encoder) (m Match, err error) {
	want, err := body(blob)
	if err != nil {
		return m, err
	}
	for _, e := range list {
		m.Tried++
		start := time.Now()
		c := &comparer{want: want}
		err := e.run(ctx, bytes.NewReader(tar), c)
		if ctx.Err() != nil {
			return m, context.Cause(ctx)
		}
		if err == nil && c.same() {
			m.Encoder, m.Time = e.Name, time.Since(start)
			return m, nil
		}
	}
	return m, nil
}

// body is a blob without its gzip header.
func body(blob []byte) ([]byte, error) {
	if !bytes.HasPrefix(blob, []byte{0x1f, 0x8b}) {
		return blob, nil
	}
	r := bufio.NewReader(bytes.NewReader(blob))
	n, err := header(r)
	if err != nil {
		return nil, fmt.Errorf("gzip header: %w", err)
	}
	return blob[n:], nil
}

// header reads a gzip header (RFC 1952), and returns its length.
func header(r *bufio.Reader) (n int, err error) {
	var fixed [10]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return 0, err
	}
	n = len(fixed)
	flags := fixed[3]
	if flags&4 != 0 { // extra
		var size [2]byte
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return 0, err
		}
		extra := int(size[0]) | int(size[1])<<8
		if _, err := r.Discard(extra); err != nil {
			return 0, err
		}
		n += 2 + extra
	}
	for _, text := range []byte{8, 16} { // name, comment
		if flags&text != 0 {
			s, err := r.ReadString(0)
			if err != nil {
				return 0, err
			}
			n += len(s)
		}
	}
	if flags&2 != 0 {
		n += 2
	}
	return n, nil
}

var errDiffers = errors.New("it differs")

// comparer takes what an encoder writes, and refuses it as soon as it differs.
type comparer struct {
	want    []byte
	head    []byte // until its gzip header is whole
	started bool
}

func (c *comparer) Write(p []byte) (int, error) {
	n := len(p)
	if !c.started {
		c.head = append(c.head, p...)
		if len(c.head) < 64 { // our encoders write no longer header
			return n, nil
		}
		return n, c.start()
	}
	return n, c.take(p)
}

func (c *comparer) start() error {
	c.started = true
	p, err := body(c.head)
	return errors.Join(err, c.take(p))
}

func (c *comparer) take(p []byte) error {
	if !bytes.HasPrefix(c.want, p) {
		c.want = []byte{0} // nothing is the same any more
		return errDiffers
	}
	c.want = c.want[len(p):]
	return nil
}

func (c *comparer) same() bool {
	if !c.started {
		if err := c.start(); err != nil {
			return false
		}
	}
	return len(c.want) == 0
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

// Recipe is what it takes to make a tar again from the files of a store.
type Recipe struct {
	Files, Pycs int
	Bytes       int64 // of the recipe, compressed
	Same        bool  // the tar was made again from it
}

// MakeRecipe keeps everything of a tar that is no file's content: headers and padding.
func MakeRecipe(data []byte) (r Recipe, err error) {
	parts, pycs, err := split(data)
	if err != nil {
		return r, err
	}
	var kept bytes.Buffer
	z, err := zstd.NewWriter(&kept, zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return r, err
	}
	var again bytes.Buffer
	for _, p := range parts {
		if _, err := fmt.Fprintf(z, "%d %d\n%s", len(p.meta), len(p.content), p.meta); err != nil {
			return r, err
		}
		again.Write(p.meta)
		again.Write(p.content)
		if len(p.content) > 0 {
			r.Files++
		}
	}
	if err := z.Close(); err != nil {
		return r, err
	}
	r.Pycs, r.Bytes, r.Same = pycs, int64(kept.Len()), bytes.Equal(again.Bytes(), data)
	// A store of fidelity "python" has another time in timestamp pycs: four bytes each.
	r.Bytes += 4 * int64(pycs)
	return r, nil
}
