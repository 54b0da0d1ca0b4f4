package object

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// Read returns an object's bytes. The caller holds a reference to it. One that is found to be damaged is bad from then
// on.
func (s *Store) Read(id content.ObjectID) ([]byte, error) {
	var b []byte
	err := s.at(id, func(p *pack, x extent) error {
		b = make([]byte, x.size)
		if _, err := p.file.ReadAt(b, x.offset); err != nil {
			return err
		}
		if sha256.Sum256(b) != id.Sum {
			return ErrDamaged
		}
		return nil
	})
	if isDamage(err) {
		s.SetBad(id)
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read object %s: %w", id, err)
	}
	return b, nil
}

// Head returns the first n bytes of an object that is longer. They are not compared with its name.
func (s *Store) Head(id content.ObjectID, n int) (head []byte, err error) {
	err = s.at(id, func(p *pack, x extent) error {
		head = make([]byte, min(int64(n), x.size))
		_, err := p.file.ReadAt(head, x.offset)
		return err
	})
	if isDamage(err) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read object %s: %w", id, err)
	}
	return head, nil
}

// ReadAt fills b with bytes of an object, from off on. They are not compared with its name.
func (s *Store) ReadAt(id content.ObjectID, b []byte, off int64) error {
	if s.IsBad(id) {
		return fmt.Errorf("read object %s: %w", id, ErrDamaged)
	}
	err := s.at(id, func(p *pack, x extent) error {
		if off < 0 || off+int64(len(b)) > x.size {
			return fmt.Errorf("%d bytes at %d of %d: %w", len(b), off, x.size, io.ErrUnexpectedEOF)
		}
		_, err := p.file.ReadAt(b, x.offset+off)
		return err
	})
	if isDamage(err) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return fmt.Errorf("read object %s: %w", id, err)
	}
	return nil
}

func isDamage(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, unix.EIO) || errors.Is(err, fs.ErrNotExist)
}

// at calls fn with an object's place, and again where the object has moved meanwhile.
func (s *Store) at(id content.ObjectID, fn func(*pack, extent) error) error {
	for {
		s.mu.Lock()
		r := s.refs[id]
		s.mu.Unlock()
		if r.pack == nil || r.count == 0 {
			return fmt.Errorf("%w: no pack has it", ErrDamaged)
		}
		err := fn(r.pack, r.pack.slots[r.n])
		if !errors.Is(err, os.ErrClosed) {
			return err
		}
		s.mu.Lock()
		same := s.refs[id].pack == r.pack
		s.mu.Unlock()
		if same {
			return err // the store is closed
		}
	}
}

// Where describes an object's place for a message: the file, and what is wrong with it as far as a look at the file
// tells.
func (s *Store) Where(id content.ObjectID) (path, problem string) {
	place, ok := s.Place(id)
	if !ok {
		return s.packs.dir, "object " + id.Hex() + " is missing: no pack has it"
	}
	path = s.packs.Path(place.Pack)
	if fi, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return path, "the pack is missing"
	} else if err == nil && !fi.Mode().IsRegular() {
		return path, "it is no regular file"
	}
	return path, fmt.Sprintf("object %s at byte %d cannot be read, or has another sha256 than its name says",
		id.Hex(), place.Offset)
}

// VerifyBuffer is what Verify reads into. One serves one caller at a time.
type VerifyBuffer struct{ b []byte }

// directAlign is more than any disk wants buffers and offsets to be aligned to.
const directAlign = 4096

// NewVerifyBuffer returns a buffer for Verify.
func NewVerifyBuffer() *VerifyBuffer {
	const size = 1 << 20
	b := make([]byte, size+directAlign)
	skip := (directAlign - int(uintptr(unsafe.Pointer(&b[0]))%directAlign)) % directAlign
	return &VerifyBuffer{b[skip : skip+size]}
}

// Verify reads an object from the disk, past the page cache where the file system can, and compares it with its
// name. What it finds damaged or cannot read is bad from then on; the error tells what is wrong. size is what was
// read. An object that nobody names any more is fine.
func (s *Store) Verify(ctx context.Context, id content.ObjectID, buf *VerifyBuffer) (size int64, err error) {
	for {
		s.mu.Lock()
		r, named := s.refs[id]
		s.mu.Unlock()
		if !named {
			return 0, nil
		}
		if r.pack == nil {
			s.SetBad(id)
			return 0, fmt.Errorf("object %s is %w: no pack has it", id, ErrDamaged)
		}
		size, err = r.pack.verify(ctx, id, r.pack.slots[r.n], buf)
		if ctx.Err() != nil {
			return size, context.Cause(ctx)
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			return size, err
		}
		s.mu.Lock()
		now, named := s.refs[id]
		if named && now.pack == r.pack && now.n == r.n {
			if err != nil {
				s.bad[id] = struct{}{}
			} else {
				delete(s.bad, id)
			}
			s.mu.Unlock()
			return size, err
		}
		s.mu.Unlock() // it has moved, or is gone
	}
}

// verify is Verify of one place, that notes nothing.
func (p *pack) verify(ctx context.Context, id content.ObjectID, x extent, buf *VerifyBuffer) (size int64, err error) {
	flags := unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK
	direct := unix.O_DIRECT
	if !p.plain {
		direct = 0 // what has fs-verity is never read past the page cache
	}
	fd, err := unix.Open(p.file.Name(), flags|direct, 0)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.Open(p.file.Name(), flags, 0)
	}
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return 0, fmt.Errorf("read object %s: %w", id, err)
	case err != nil:
		return 0, fmt.Errorf("object %s is %w: %w", id, ErrDamaged, err)
	}
	defer unix.Close(fd)
	if !p.plain {
		pages := x.aligned() // the kernel keeps those of which it is to forget a part
		_ = unix.Fadvise(fd, pages.offset, pages.size, unix.FADV_DONTNEED)
	}
	return hashAt(ctx, id, fd, x, buf)
}

// hashAt reads one payload of an open file and compares it with an object's name.
func hashAt(ctx context.Context, id content.ObjectID, fd int, x extent, buf *VerifyBuffer) (size int64, err error) {
	h := sha256.New()
	at := x.aligned().offset // reads past the page cache begin and end at whole blocks
	skip := x.offset - at
	for size < x.size && ctx.Err() == nil {
		want := min(int64(len(buf.b)), content.Blocks(skip+x.size-size))
		n, err := unix.Pread(fd, buf.b[:want], at)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return size, fmt.Errorf("object %s is %w: read: %w", id, ErrDamaged, err)
		case int64(n) <= skip:
			return size, fmt.Errorf("object %s is %w: the file ends after %d of its %d bytes", id, ErrDamaged, size, x.size)
		}
		got := min(int64(n)-skip, x.size-size)
		h.Write(buf.b[skip : skip+got])
		size, at, skip = size+got, at+int64(n), 0
	}
	if ctx.Err() != nil {
		return size, context.Cause(ctx)
	}
	if sum := content.Sum(h.Sum(nil)); sum != id.Sum {
		return size, fmt.Errorf("object %s is %w: its %d bytes have sha256 %s", id, ErrDamaged, size, sum.Hex())
	}
	return size, nil
}

// Distrust notes that a pack is damaged, so that Compact copies what is whole in it, and returns the objects that lie
// there.
func (s *Store) Distrust(id content.PackID, why error) (ids []content.ObjectID) {
	s.lock()
	defer s.unlock()
	p := s.packs.all[id]
	if p == nil {
		return nil
	}
	p.damaged = why
	for id, r := range s.refs {
		if r.pack == p {
			ids = append(ids, id)
		}
	}
	return ids
}

// DamagedPack is a pack of which not all is what it was that its trailer vouches for. Compact copies what is whole in
// it.
type DamagedPack struct {
	Path string
	Err  error
}

// check reads again what the pack's file says of itself.
func (p *pack) check() error {
	dropCache(p.file, 0)
	again, read, err := openPack(p.file.Name(), p.id)
	if err != nil {
		return err
	}
	defer again.file.Close()
	if again.tag != p.tag || len(read.Slots) != len(p.slots) {
		return fmt.Errorf("%w: it is another pack", erofs.ErrDamaged)
	}
	return nil
}
