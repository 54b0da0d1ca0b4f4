package object

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// corrupt changes a byte of an object on the disk.
func corrupt(t testing.TB, s *Store, id content.ObjectID, at int64) {
	t.Helper()
	place, _ := s.Place(id)
	if err := os.Chmod(s.packs.Path(place.Pack), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(s.packs.Path(place.Pack), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, place.Offset+at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, place.Offset+at); err != nil {
		t.Fatal(err)
	}
}

// Verify reads payloads that begin anywhere, and none of their neighbours'.
func TestVerifyFindsEachByte(t *testing.T) { forBothKinds(t, testVerifyFindsEachByte) }

func testVerifyFindsEachByte(t *testing.T, d disk) {
	const buffer = 1 << 20
	s := d.open(t)
	w := s.Begin()
	var ids []content.ObjectID
	var sizes []int64
	for i, size := range []int64{1, 511, 512, 513, 4095, 4096, 4097, 3585, buffer - 512, buffer, buffer + 1, 700,
		3*buffer + 777, buffer - 4096, 1, 5000, 1} {
		data := bytes.Repeat([]byte{byte('a' + i)}, int(size))
		if _, err := w.Put(idOf(data), data); err != nil {
			t.Fatal(err)
		}
		ids, sizes = append(ids, idOf(data)), append(sizes, size)
	}
	if _, err := w.Seal(); err != nil {
		t.Fatal(err)
	}
	if err := w.End(ids); err != nil {
		t.Fatal(err)
	}
	buf := NewVerifyBuffer()
	verify := func(bad int) {
		t.Helper()
		for i, id := range ids {
			n, err := s.Verify(t.Context(), id, buf)
			wrong := (err != nil) != (i == bad) || err != nil && !errors.Is(err, ErrDamaged)
			if wrong || n != sizes[i] || s.IsBad(id) != (i == bad) {
				t.Errorf("payload %d of %d bytes, read %d, want %d to be bad: %v", i, sizes[i], n, bad, err)
			}
		}
	}
	verify(-1)
	for i, id := range ids {
		for _, at := range []int64{0, sizes[i] / 2, sizes[i] - 1} {
			corrupt(t, s, id, at)
			verify(i)
			corrupt(t, s, id, at) // and whole again
			if _, err := s.Verify(t.Context(), id, buf); err != nil {
				t.Error(err)
			}
		}
	}
	verify(-1)
}

// A payload may end with its file, and a file before its payload.
func TestHashAtEndOfFile(t *testing.T) {
	const begin = content.BlockSize + 3*erofs.DenseBlock
	const buffer = 1 << 20
	for _, size := range []int64{1, 511, 512, 2560, 2561, buffer - begin%content.BlockSize, buffer, buffer + 1,
		2*buffer + 5} {
		data := bytes.Repeat([]byte("0123456"), int(size/7+1))[:size]
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, append(make([]byte, begin), data...), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, direct := range []int{0, unix.O_DIRECT} {
			fd, err := unix.Open(path, unix.O_RDWR|direct, 0)
			if errors.Is(err, unix.EINVAL) {
				t.Skip("no O_DIRECT here")
			}
			if err != nil {
				t.Fatal(err)
			}
			buf := NewVerifyBuffer()
			if n, err := hashAt(t.Context(), idOf(data), fd, extent{begin, size}, buf); err != nil || n != size {
				t.Errorf("%d bytes: read %d, %v", size, n, err)
			}
			n, err := hashAt(t.Context(), idOf(data), fd, extent{begin, size + 1}, buf)
			if !errors.Is(err, ErrDamaged) || n != size {
				t.Errorf("%d bytes and one more: read %d, %v", size, n, err)
			}
			_ = unix.Close(fd)
		}
	}
}
