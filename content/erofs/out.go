package erofs

import (
	"fmt"
	"io"
	"slices"
)

// outChunk is about how much of an image is held at a time while it is written.
const outChunk = 256 << 10

// out takes the bytes of an image from front to back and hands them on in large pieces. Block 0 has checksums over
// all that follows it. So where it cannot be written last, an image is made twice: the first time to learn head, the
// second time with it.
type out struct {
	w    io.Writer
	head []byte // block 0 as it is to be written; nil: as it comes, and kept here
	buf  []byte // what w has not got yet
	base int64  // where in the image buf begins
	err  error  // the first of w's
}

// at returns the n bytes of the image at an offset, zero if nobody has written there. They are good until the next
// call, whose offset must not be smaller.
func (o *out) at(offset, n int64) []byte {
	if offset-o.base >= outChunk {
		o.flush(offset)
	}
	o.grow(offset + n)
	return o.buf[offset-o.base : offset-o.base+n]
}

// grow makes buf reach up to an offset.
func (o *out) grow(to int64) {
	have, want := len(o.buf), int(to-o.base)
	if want > have {
		o.buf = slices.Grow(o.buf, want-have)[:want]
		clear(o.buf[have:])
	}
}

// flush hands on everything before an offset. The first call has an offset behind block 0.
func (o *out) flush(to int64) {
	o.grow(to)
	done := o.buf[:to-o.base]
	if o.base == 0 {
		if o.head == nil {
			o.head = slices.Clone(done[:blockSize])
		}
		copy(done, o.head)
	}
	if o.err == nil {
		_, o.err = o.w.Write(done)
	}
	o.buf = o.buf[:copy(o.buf, o.buf[len(done):])]
	o.base = to
}

// finish hands on the rest of an image of this length.
func (o *out) finish(length int64) error {
	o.flush(length)
	if o.err != nil {
		return fmt.Errorf("write chain image: %w", o.err)
	}
	return nil
}
