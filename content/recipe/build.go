package recipe

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// chunk is how much of a payload is in memory at a time.
const chunk = 256 << 10

// Check tells why a recipe cannot be followed here, without following it: ErrOtherEncoder, say.
func (h Header) Check() error {
	_, err := h.encoder()
	return err
}

func (h Header) encoder() (Encoder, error) {
	e, ok := encoderNamed(h.Encoder)
	if !ok {
		return e, fmt.Errorf("%w: this program has no encoder %q", ErrOtherEncoder, h.Encoder)
	}
	sum, err := e.Fingerprint()
	if err == nil && sum != h.Fingerprint {
		err = fmt.Errorf("%w: %s", ErrOtherEncoder, h.Encoder)
	}
	return e, err
}

// Build makes the blob and writes it to w. It fails where the layer lacks a payload, and where the blob turns out to be
// another one, which is known only at the end: what has been written then is worth nothing. A recipe is followed once.
func (r *Recipe) Build(ctx context.Context, w io.Writer, l Layer) error {
	e, err := r.encoder()
	if err != nil {
		return err
	}
	if l.ID != r.Header.Layer {
		return damaged("it is of layer %s", r.Header.Layer)
	}
	out := &blobWriter{w: w, sum: sha256.New(), left: r.Size, skip: e.skip()}
	if _, err := out.add(r.Head); err != nil {
		return err
	}
	z, err := e.Open(out)
	if err != nil {
		return err
	}
	err = r.tar(ctx, z, l)
	err = errors.Join(err, z.Close())
	if err == nil && (out.left != 0 || content.Sum(out.sum.Sum(nil)) != r.Blob) {
		err = ErrOtherBytes
	}
	if err != nil {
		return fmt.Errorf("make blob %s of layer %s: %w", r.Blob.Digest(), l.ID, err)
	}
	return nil
}

// tar writes the tar.
func (r *Recipe) tar(ctx context.Context, w io.Writer, l Layer) error {
	payloads := l.payloads()
	left := r.TarSize
	buf := make([]byte, chunk)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s, err := r.next()
		if err != nil {
			return err
		}
		var e *content.Entry
		size := s.n
		switch s.kind {
		case stepEnd:
			if left != 0 {
				return damaged("its tar is %d bytes too short", left)
			}
			return nil
		case stepPayload, stepStamped:
			if s.n < 0 || s.n >= int64(len(payloads)) {
				return damaged("payload %d of %d", s.n, len(payloads))
			}
			e = payloads[s.n]
			if size = e.Size; s.kind == stepStamped && size < content.PycHeaderLen {
				return damaged("payload %d is no bytecode", s.n)
			}
		}
		if left -= size; left < 0 {
			return damaged("its tar is longer than %d bytes", r.TarSize)
		}
		if e == nil {
			err = r.literal(w, buf[:size])
		} else {
			err = payload(ctx, w, l, e, s, buf)
		}
		if err != nil {
			return err
		}
	}
}

func (r *Recipe) literal(w io.Writer, buf []byte) error {
	if _, err := io.ReadFull(r.in, buf); err != nil {
		return damaged("a literal: %w", err)
	}
	_, err := w.Write(buf)
	return err
}

func payload(ctx context.Context, w io.Writer, l Layer, e *content.Entry, s step, buf []byte) error {
	for off := int64(0); off < e.Size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := buf[:min(e.Size-off, int64(len(buf)))]
		if err := l.readAt(e, part, off); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		if s.kind == stepStamped && off == 0 {
			copy(part[8:12], s.stamp[:])
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		off += int64(len(part))
	}
	return nil
}

// blobWriter passes a blob on, without the encoder's own gzip header, and no more of it than there may be.
type blobWriter struct {
	w   io.Writer
	sum interface {
		io.Writer
		Sum([]byte) []byte
	}
	left int64
	skip int
}

func (b *blobWriter) Write(p []byte) (int, error) {
	skipped := min(b.skip, len(p))
	b.skip -= skipped
	n, err := b.add(p[skipped:])
	return skipped + n, err
}

func (b *blobWriter) add(p []byte) (int, error) {
	if b.left -= int64(len(p)); b.left < 0 {
		return 0, ErrOtherBytes
	}
	b.sum.Write(p)
	return b.w.Write(p)
}
