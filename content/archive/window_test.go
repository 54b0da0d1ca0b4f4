package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"testing"
	"testing/iotest"

	reference "github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/zstd"
)

// withWindow makes the first frame ask for another window, which must be a power of two.
func withWindow(blob []byte, size uint64) []byte {
	blob = bytes.Clone(blob)
	blob[5] = byte(bits.Len64(size)-1-10) << 3
	return blob
}

// withContentSize makes the first frame, one single segment without a dictionary, declare another size.
func withContentSize(blob []byte, size uint32) []byte {
	const fourBytes = 2 << 6
	had := map[byte]int{0: 1, 1: 2, 2: 4, 3: 8}[blob[4]>>6]
	out := append(bytes.Clone(blob[:4]), blob[4]&0x3f|fourBytes)
	out = binary.LittleEndian.AppendUint32(out, size)
	return append(out, blob[5+had:]...)
}

// TestWindowsOfReference: the windows that containerd's decompressor takes and refuses are ours.
func TestWindowsOfReference(t *testing.T) {
	data := noise(300_000)
	blob := zstded(t, data, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false))
	for _, size := range []uint64{128 << 20, 256 << 20, 512 << 20, 1 << 30, 2 << 30} {
		t.Run(fmt.Sprint(size>>20, " MiB"), func(t *testing.T) {
			wide := withWindow(blob, size)
			r, err := reference.DecompressStream(bytes.NewReader(wide))
			must(t, err)
			want, werr := io.ReadAll(r)
			must(t, r.Close())
			got, gerr := decompressBy("", bytes.NewReader(wide))
			if (werr == nil) != (size <= maxZstdWindow) || (gerr == nil) != (werr == nil) || werr == nil &&
				!bytes.Equal(got, want) {
				t.Errorf("containerd: %d bytes, %v; ours: %d bytes, %v", len(want), werr, len(got), gerr)
			}
		})
	}
}

// TestWindowsAreAskedFor: memory is asked for every window that is larger than those before, wherever in the blob it
// stands, before it is allocated.
func TestWindowsAreAskedFor(t *testing.T) {
	data := noise(200_000)
	frame := func(window uint64, opts ...zstd.EOption) []byte {
		opts = append([]zstd.EOption{zstd.WithWindowSize(8 << 20), zstd.WithSingleSegment(false)}, opts...)
		return withWindow(zstded(t, data, opts...), window)
	}
	// blocks of one byte
	zeros := zstded(t, make([]byte, 1<<20), zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false))
	for name, row := range map[string]struct {
		blob []byte
		want []int64
	}{
		"small":      {frame(8 << 20), nil},
		"one":        {frame(64 << 20), []int64{64 << 20}},
		"later":      {slices.Concat(frame(1<<20), skippable("manifest"), frame(64<<20)), []int64{64 << 20}},
		"larger":     {slices.Concat(frame(64<<20), frame(32<<20), frame(512<<20)), []int64{64 << 20, 448 << 20}},
		"no sum":     {slices.Concat(frame(1<<20, zstd.WithEncoderCRC(false)), frame(64<<20)), []int64{64 << 20}},
		"repeated":   {slices.Concat(zeros, frame(64<<20)), []int64{64 << 20}},
		"incomplete": {frame(64 << 20)[:6], []int64{64 << 20}},
		"refused":    {frame(1 << 30), nil},
		"garbage":    {slices.Concat(frame(1<<20), []byte("garbage"), frame(64<<20)), nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, slow := range []bool{false, true} {
				var asked []int64
				src := io.Reader(bytes.NewReader(row.blob))
				if slow {
					src = iotest.OneByteReader(src)
				}
				w := windows{r: src, memory: func(n int64) error { asked = append(asked, n); return nil }}
				got, err := io.ReadAll(&w)
				if err != nil || !bytes.Equal(got, row.blob) || !slices.Equal(asked, row.want) {
					t.Errorf("slow %v: asked for %v, want %v; %v", slow, asked, row.want, err)
				}
			}
		})
	}
}

// TestWindowRefused: what memory says is the error, and the blob is not called invalid.
func TestWindowRefused(t *testing.T) {
	blob := withWindow(zstded(t, noise(200_000), zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false)), 64<<20)
	refused := fmt.Errorf("no room: %w", ErrMemory)
	r, err := Decompress(bytes.NewReader(blob), func(int64) error { return refused })
	must(t, err)
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, refused) || errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

// FuzzWindows: following a blob never changes it, and never panics.
func FuzzWindows(f *testing.F) {
	f.Add(zstded(f, noise(2000)))
	f.Add(append(skippable("x"), zstded(f, make([]byte, 5000))...))
	f.Fuzz(func(t *testing.T, blob []byte) {
		w := windows{r: iotest.HalfReader(bytes.NewReader(blob)), memory: func(n int64) error {
			if n <= 0 || n > maxZstdWindow {
				t.Errorf("asked for %d", n)
			}
			return nil
		}}
		if got, err := io.ReadAll(&w); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("%d of %d bytes, %v", len(got), len(blob), err)
		}
	})
}
