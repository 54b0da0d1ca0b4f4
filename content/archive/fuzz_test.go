package archive

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// bounded is a Payloads that takes anything but a bomb.
type bounded struct{}

var errTooBig = errors.New("too big for a fuzz target")

func (bounded) Put(e *content.Entry, r io.Reader) error {
	if e.Size > 1<<20 {
		return errTooBig
	}
	_, err := io.CopyN(io.Discard, r, e.Size)
	return err
}

func FuzzReadTar(f *testing.F) {
	for _, data := range tortures(f) {
		if len(data) < 20_000 {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		first, err := ReadTar(t.Context(), bytes.NewReader(data), bounded{}, nil)
		if err != nil {
			if first != nil {
				t.Fatal("entries beside an error")
			}
			return
		}
		checkEntries(t, first)
		second, err := ReadTar(t.Context(), bytes.NewReader(data), bounded{}, nil)
		if err != nil || len(first) != len(second) {
			t.Fatalf("%d entries, then %d, %v", len(first), len(second), err)
		}
		for i := range first {
			if a, b := describe(first[i]), describe(second[i]); a != b {
				t.Fatalf("%s, then %s", a, b)
			}
		}
	})
}

func FuzzDecompress(f *testing.F) {
	data := append(noise(2000), make([]byte, 2000)...)
	f.Add(data)
	f.Add(gzipped(f, data))
	f.Add(zstded(f, data))
	f.Add(append(skippable("x"), zstded(f, data)...))
	f.Fuzz(func(t *testing.T, blob []byte) {
		r, err := Decompress(bytes.NewReader(blob), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, io.LimitReader(r, 64<<20))
			if cerr := r.Close(); cerr != nil {
				t.Fatalf("close: %v", cerr)
			}
		}
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("not an ErrInvalid: %v", err)
		}
	})
}
