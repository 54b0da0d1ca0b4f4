package archive

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// maxZstdWindow bounds what one zstd frame makes the decoder allocate: containerd's bound, which is the default of its
// library (zstd.MaxWindowSize).
const maxZstdWindow = 512 << 20

// freeZstdWindow is a window that memory is not asked for: what `zstd -19` and most builders write.
const freeZstdWindow = 8 << 20

// windows stands between a zstd blob and its decoder. It follows the blob from frame to frame, and asks memory for a
// large window before the decoder sees the header that wants it. What is malformed it lets through, for the decoder
// to say so.
type windows struct {
	r      io.Reader
	memory Memory
	had    int64 // the largest window that memory was asked for
	skip   int64 // bytes up to the next header
	in     part
	sum    bool   // the frame ends with a checksum
	head   []byte // what there is of the next header
}

// part is what comes next in a zstd stream.
type part int

const (
	frameHeader part = iota
	blockHeader
	lost // something that is no zstd
)

const (
	blockHeaderLen = 3
	checksumLen    = 4
)

func (w *windows) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if merr := w.follow(p[:n]); merr != nil {
		return 0, merr
	}
	return n, err
}

// follow looks at the next bytes of the stream.
func (w *windows) follow(b []byte) error {
	for len(b) > 0 && w.in != lost {
		if w.skip > 0 {
			n := min(w.skip, int64(len(b)))
			w.skip -= n
			b = b[n:]
			continue
		}
		w.head = append(w.head, b[0])
		b = b[1:]
		if err := w.header(); err != nil {
			return err
		}
	}
	return nil
}

// header acts on head, once it is complete.
func (w *windows) header() error {
	if w.in == blockHeader {
		w.block()
		return nil
	}
	var h zstd.Header
	switch err := h.Decode(w.head); {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil // more of it is to come
	case err != nil:
		w.in = lost
		return nil
	case h.Skippable:
		w.next(frameHeader, int64(h.SkippableSize))
		return nil
	}
	w.sum = h.HasCheckSum
	w.next(blockHeader, 0)
	return w.ask(h)
}

// block acts on a block's header (RFC 8878, 3.1.1.2).
func (w *windows) block() {
	if len(w.head) < blockHeaderLen {
		return
	}
	const rle = 1
	v := uint32(w.head[0]) | uint32(w.head[1])<<8 | uint32(w.head[2])<<16
	last, kind, size := v&1 == 1, v>>1&3, int64(v>>3)
	if kind == rle {
		size = 1
	}
	in := blockHeader
	if last {
		in = frameHeader
		if w.sum {
			size += checksumLen
		}
	}
	w.next(in, size)
}

func (w *windows) next(in part, skip int64) { w.in, w.skip, w.head = in, skip, w.head[:0] }

// ask asks memory for a frame's window. One that the decoder refuses costs nothing.
func (w *windows) ask(h zstd.Header) error {
	window := h.WindowSize
	if h.SingleSegment {
		window = h.FrameContentSize
	}
	if w.memory == nil || window > maxZstdWindow {
		return nil
	}
	want := int64(window)
	if h.HasFCS {
		want = int64(min(window, h.FrameContentSize)) // the rest of the window is never touched
	}
	if want <= max(w.had, freeZstdWindow) {
		return nil
	}
	if err := w.memory(want - w.had); err != nil {
		return fmt.Errorf("a zstd window of %d MiB: %w", window>>20, err)
	}
	w.had = want
	return nil
}
