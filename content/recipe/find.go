package recipe

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
)

// Opener opens a blob to read it from its beginning.
type Opener func() (io.ReadCloser, error)

const (
	// probeTar is how much of a tar each encoder is tried on first: nearly all differ within the first block.
	probeTar = 1 << 20
	// maxBegin is for how much of its input an encoder does what its begins does: the smallest block of pgzip.
	maxBegin = 256 << 10
	// zstdMagic begins a zstd frame.
	zstdMagic = "\x28\xb5\x2f\xfd"
)

// found is an encoder that makes a blob, as far as that was looked at.
type found struct {
	Encoder
	head []byte // the blob's gzip header
}

// Find looks for the encoder of a blob: see find.
func Find(ctx context.Context, open Opener, memory archive.Memory) (Encoder, error) {
	f, err := find(ctx, open, memory)
	return f.Encoder, err
}

// find looks for the encoder of a blob. It compares what each makes of the beginning of the tar, and all of the blob
// only where more than one is left. The error wraps ErrNoEncoder when there is none.
func find(ctx context.Context, open Opener, memory archive.Memory) (f found, err error) {
	blob, err := open()
	if err != nil {
		return f, err
	}
	defer blob.Close()
	raw := bufio.NewReaderSize(blob, 64<<10)
	start, err := raw.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return f, fmt.Errorf("read blob: %w", err)
	}
	format := Plain
	switch {
	case bytes.HasPrefix(start, []byte{0x1f, 0x8b}):
		format = Gzip
		if f.head, err = readGzipHeader(raw); err != nil {
			return f, err
		}
	case bytes.HasPrefix(start, []byte(zstdMagic)):
		format = Zstd
	}
	list := Encoders(format)
	if format == Plain {
		f.Encoder = list[0]
		return f, nil
	}
	// An encoder makes a little more than its input, at most.
	body, err := io.ReadAll(io.LimitReader(raw, probeTar+probeTar/16))
	if err != nil {
		return f, fmt.Errorf("read blob: %w", err)
	}
	tar, whole, err := beginning(open, memory)
	if err != nil {
		return f, err
	}
	var left []Encoder
	for _, e := range list {
		if err := ctx.Err(); err != nil {
			return f, context.Cause(ctx)
		}
		if e.maybe(tar, whole, body) {
			left = append(left, e)
		}
	}
	for _, e := range left {
		f.Encoder = e
		if len(left) == 1 {
			return f, nil // whoever makes the blob finds out whether it is
		}
		same, err := e.Makes(ctx, open, memory)
		if err != nil || same {
			return f, err
		}
	}
	return f, fmt.Errorf("%w: %d were tried", ErrNoEncoder, len(list))
}

// beginning returns the first bytes of the tar; whole tells that there are no more.
func beginning(open Opener, memory archive.Memory) (tar []byte, whole bool, err error) {
	plain, closeAll, err := decompressed(open, memory)
	if err != nil {
		return nil, false, err
	}
	defer closeAll()
	tar, err = io.ReadAll(io.LimitReader(plain, probeTar))
	return tar, len(tar) < probeTar, err
}

// decompressed opens the tar of a blob.
func decompressed(open Opener, memory archive.Memory) (tar io.Reader, closeAll func(), err error) {
	blob, err := open()
	if err != nil {
		return nil, nil, err
	}
	plain, err := archive.Decompress(blob, memory)
	if err != nil {
		return nil, nil, errors.Join(err, blob.Close())
	}
	return plain, func() { plain.Close(); blob.Close() }, nil
}

// maybe reports whether what an encoder makes of the beginning of a tar is the beginning of a blob's body. Only what it
// gives out by itself counts: what it does at the end is another thing for a part than for the whole.
func (e Encoder) maybe(tar []byte, whole bool, body []byte) bool {
	open := e.Open
	if e.begins != nil {
		open, whole = e.begins, false
		tar = tar[:min(len(tar), maxBegin)]
	}
	c := &comparer{want: bytes.NewReader(body), partial: true, skip: e.skip()}
	w, err := open(c)
	if err != nil {
		return false
	}
	_, err = w.Write(tar)
	if whole && err == nil {
		c.partial = false
		err = w.Close()
		return err == nil && c.ended()
	}
	if z, ok := w.(interface{ Reset(io.Writer) }); ok {
		z.Reset(io.Discard) // it ends without what it would write at the end
	}
	return err == nil && c.err == nil
}

// skip is how much of what an encoder makes a recipe keeps as it is.
func (e Encoder) skip() int {
	if e.Format == Gzip {
		return gzipHead
	}
	return 0
}

// Makes reports whether an encoder makes a whole blob. It stops where it differs.
func (e Encoder) Makes(ctx context.Context, open Opener, memory archive.Memory) (bool, error) {
	blob, err := open()
	if err != nil {
		return false, err
	}
	defer blob.Close()
	raw := bufio.NewReaderSize(blob, 64<<10)
	if e.Format == Gzip {
		if _, err := readGzipHeader(raw); err != nil {
			return false, err
		}
	}
	tar, closeAll, err := decompressed(open, memory)
	if err != nil {
		return false, err
	}
	defer closeAll()
	c := &comparer{want: raw, skip: e.skip()}
	w, err := e.Open(c)
	if err != nil {
		return false, err
	}
	rerr := copyAll(ctx, w, tar)
	cerr := w.Close()
	var differs *differsError
	if c.err != nil && !errors.As(c.err, &differs) {
		return false, c.err
	}
	if c.err != nil || errors.As(rerr, &differs) {
		return false, nil
	}
	return c.ended(), errors.Join(rerr, cerr)
}

// copyAll copies until r ends, or ctx does. It writes as a tar.Writer does, by Write alone.
func copyAll(ctx context.Context, w io.Writer, r io.Reader) error {
	buf := make([]byte, 256<<10)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// differsError is what a comparer says of other bytes.
type differsError struct{}

func (*differsError) Error() string { return "it differs" }

// comparer takes what an encoder writes, and refuses it as soon as it differs.
type comparer struct {
	want    io.Reader
	partial bool // want may be cut off
	skip    int  // bytes at the beginning that are not compared
	err     error
	buf     []byte
}

func (c *comparer) Write(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	n := len(p)
	skipped := min(c.skip, len(p))
	c.skip, p = c.skip-skipped, p[skipped:]
	if len(c.buf) < len(p) {
		c.buf = make([]byte, len(p))
	}
	have, err := io.ReadFull(c.want, c.buf[:len(p)])
	switch cut := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF); {
	case err != nil && !cut:
		c.err = fmt.Errorf("read blob: %w", err)
	case cut && !c.partial, !bytes.Equal(p[:have], c.buf[:have]):
		c.err = &differsError{}
	}
	if c.err != nil {
		return 0, c.err
	}
	return n, nil
}

// ended reports whether all has been compared, and was the same.
func (c *comparer) ended() bool {
	if c.err != nil || c.skip > 0 {
		return false
	}
	n, err := c.want.Read(make([]byte, 1))
	return n == 0 && errors.Is(err, io.EOF)
}

// readGzipHeader reads a gzip header (RFC 1952, 2.3) and returns it.
func readGzipHeader(r *bufio.Reader) (head []byte, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: gzip header: %w", ErrNoEncoder, err)
		}
	}()
	take := func(n int) error {
		if len(head)+n > maxHead {
			return fmt.Errorf("it has more than %d bytes", maxHead)
		}
		head = append(head, make([]byte, n)...)
		_, err := io.ReadFull(r, head[len(head)-n:])
		return err
	}
	if err := take(gzipHead); err != nil {
		return nil, err
	}
	flags := head[3]
	if flags&4 != 0 { // extra
		if err := take(2); err != nil {
			return nil, err
		}
		if err := take(int(head[len(head)-2]) | int(head[len(head)-1])<<8); err != nil {
			return nil, err
		}
	}
	for _, text := range []byte{8, 16} { // name, comment
		for flags&text != 0 {
			if err := take(1); err != nil {
				return nil, err
			}
			if head[len(head)-1] == 0 {
				break
			}
		}
	}
	if flags&2 != 0 { // checksum of the header
		err = take(2)
	}
	return head, err
}
