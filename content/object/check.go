package object

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrDamaged is wrapped by what Verify returns for an object that is not what its name says.
var ErrDamaged = errors.New("damaged")

// IDs returns the objects whose ids start with this byte, in no order.
func (s *Store) IDs(first byte) []content.ObjectID {
	sh := &s.shards[first]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	ids := make([]content.ObjectID, 0, len(sh.refs))
	for id := range sh.refs {
		ids = append(ids, id)
	}
	return ids
}

// SetBad notes that objects are bad, for as long as something names them and nobody puts the right bytes.
func (s *Store) SetBad(ids ...content.ObjectID) {
	for _, id := range ids {
		sh := s.shard(id)
		sh.mu.Lock()
		if sh.refs[id] > 0 {
			sh.bad[id] = struct{}{}
		}
		sh.mu.Unlock()
	}
}

// IsBad reports whether an object is known to be bad.
func (s *Store) IsBad(id content.ObjectID) bool {
	sh := s.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	_, bad := sh.bad[id]
	return bad
}

// Has reports whether anything names an object.
func (s *Store) Has(id content.ObjectID) bool {
	sh := s.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.refs[id] > 0
}

// Bad returns the objects that are known to be bad.
func (s *Store) Bad() (ids []content.ObjectID) {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		for id := range sh.bad {
			ids = append(ids, id)
		}
		sh.mu.Unlock()
	}
	return ids
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
	sh := s.shard(id)
	size, err = s.verify(ctx, id, buf)
	if ctx.Err() != nil {
		return size, context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, ErrDamaged) {
		return size, err
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.await(id)
	if _, bad := sh.bad[id]; bad == (err != nil) {
		return size, err
	}
	// It may have been removed, or written again, since it was read.
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()
	size, err = s.verify(ctx, id, buf)
	sh.mu.Lock()
	delete(sh.busy, id)
	close(done)
	switch {
	case ctx.Err() != nil:
		return size, context.Cause(ctx)
	case sh.refs[id] == 0:
		return size, nil
	case err == nil:
		delete(sh.bad, id)
	case errors.Is(err, ErrDamaged):
		sh.bad[id] = struct{}{}
	}
	return size, err
}

// verify is Verify that notes nothing. An object that is whole and should have fs-verity gets it: chain images refer to
// its digest.
func (s *Store) verify(ctx context.Context, id content.ObjectID, buf *VerifyBuffer) (int64, error) {
	sh := s.shard(id)
	fd, err := sh.open(id, unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) {
		fd, err = sh.open(id, 0)
	}
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE, &st); err != nil {
		return 0, fmt.Errorf("object %s: %w", id, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, fmt.Errorf("object %s is %w: it is no regular file", id, ErrDamaged)
	}
	hashed := st.Attributes&unix.STATX_ATTR_VERITY != 0
	if hashed {
		// It is never read past the page cache.
		_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	}
	size, err := hashFile(ctx, id, fd, buf)
	if err == nil && s.opts.Verity && !hashed && ctx.Err() == nil {
		// Where it cannot, on a full disk for instance, whoever needs it says so.
		if _, perr := s.protect(id, fd); errors.Is(perr, ErrDamaged) {
			err = perr
		}
	}
	return size, err
}

// open opens an object's file. One that cannot be opened is damaged, unless it is this process that lacks something.
func (sh *shard) open(id content.ObjectID, flags int) (fd int, err error) {
	fd, err = unix.Openat(sh.fd, name(id), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return -1, fmt.Errorf("read object %s: %w", id, err)
	}
	return -1, fmt.Errorf("object %s is %w: %w", id, ErrDamaged, err)
}

// hashFile reads an open file to its end and compares it with an object's name.
func hashFile(ctx context.Context, id content.ObjectID, fd int, buf *VerifyBuffer) (size int64, err error) {
	h := sha256.New()
	for err == nil && ctx.Err() == nil {
		var n int
		n, err = unix.Read(fd, buf.b)
		switch {
		case errors.Is(err, unix.EINTR):
			err = nil
		case err == nil && n == 0:
			err = io.EOF
		case n > 0:
			h.Write(buf.b[:n])
			size += int64(n)
		}
	}
	if ctx.Err() != nil {
		return size, context.Cause(ctx)
	}
	if err != io.EOF {
		return size, fmt.Errorf("object %s is %w: read: %w", id, ErrDamaged, err)
	}
	if sum := content.Sum(h.Sum(nil)); sum != id.Sum {
		return size, fmt.Errorf("object %s is %w: its %d bytes have sha256 %s", id, ErrDamaged, size, sum.Hex())
	}
	return size, nil
}

// AnyBad reports whether any object is known to be bad.
func (s *Store) AnyBad() bool {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		n := len(sh.bad)
		sh.mu.Unlock()
		if n > 0 {
			return true
		}
	}
	return false
}

// Sweep removes every file that is no referenced object and returns how many it
// removed. It finds out what the others occupy, and which objects are missing or hold nothing: those are bad
// then. Nothing may be put while it runs.
func (s *Store) Sweep() (removed int, err error) { return s.sweep(true) }

// Survey is Sweep that removes nothing.
func (s *Store) Survey() error {
	_, err := s.sweep(false)
	return err
}

func (s *Store) sweep(remove bool) (removed int, err error) {
	s.SetUsed(0, 0)
	for i := range s.shards {
		n, err := s.sweepShard(i, remove)
		removed += n
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

func (s *Store) sweepShard(i int, remove bool) (removed int, err error) {
	sh := &s.shards[i]
	names, err := s.names(i)
	if err != nil {
		return 0, fmt.Errorf("sweep objects: %w", err)
	}
	seen := 0
	whole := make(map[content.ObjectID]bool, len(sh.refs))
	for _, file := range names {
		id, ok := s.parse(i, file)
		named := ok && sh.refs[id] > 0
		if named || !remove {
			size, occupies, _ := s.size(sh, file)
			s.bytes.Add(occupies)
			s.inodes.Add(1)
			if named && size > 0 {
				whole[id] = true
				seen++
			}
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.sub(i), file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("sweep objects: %w", err)
		}
		removed++
	}
	if seen < len(sh.refs) {
		for id := range sh.refs {
			if !whole[id] {
				sh.bad[id] = struct{}{}
			}
		}
	}
	return removed, nil
}

// OrphanFile is a file that is no object which anything names, and what it occupies.
type OrphanFile struct {
	Path  string
	Bytes int64
}

// Orphans looks for files that are no object which anything names, and removes them if asked to. Others may put and
// take objects meanwhile.
func (s *Store) Orphans(ctx context.Context, remove bool) (found []OrphanFile, err error) {
	for i := range s.shards {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		names, err := s.names(i)
		if err != nil {
			return found, fmt.Errorf("look for orphans: %w", err)
		}
		for _, file := range names {
			size, err := s.orphan(i, file, remove)
			if err != nil {
				return found, fmt.Errorf("remove orphan %s: %w", filepath.Join(s.sub(i), file), err)
			}
			if size >= 0 {
				found = append(found, OrphanFile{filepath.Join(s.sub(i), file), content.Blocks(size)})
			}
		}
	}
	return found, nil
}

// orphan returns the size of a file that is none of ours, -1 for any other.
func (s *Store) orphan(i int, file string, remove bool) (int64, error) {
	sh := &s.shards[i]
	id, ok := s.parse(i, file)
	if !ok {
		// One that is being replaced has its new file beside it.
		if id, ok = s.parse(i, file[min(len(file), len(stagedPrefix)):]); !ok || file[:len(stagedPrefix)] != stagedPrefix {
			return s.removeStranger(i, file, remove)
		}
	}
	sh.mu.Lock()
	_, busy := sh.busy[id]
	if busy || (sh.refs[id] > 0 && file == name(id)) {
		sh.mu.Unlock()
		return -1, nil
	}
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()
	defer func() {
		sh.mu.Lock()
		delete(sh.busy, id)
		close(done)
		sh.mu.Unlock()
	}()
	size, _, ok := s.size(sh, file)
	if !ok {
		return -1, nil // removed meanwhile
	}
	if remove {
		return size, sh.unlink(file)
	}
	return size, nil
}

// removeStranger is orphan for a name that no object has.
func (s *Store) removeStranger(i int, file string, remove bool) (int64, error) {
	path := filepath.Join(s.sub(i), file)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	if err == nil && remove {
		err = os.RemoveAll(path)
	}
	if err != nil {
		return -1, err
	}
	return fi.Size(), nil
}

func (s *Store) sub(i int) string { return filepath.Join(s.dir, fmt.Sprintf("%02x", i)) }

// names lists a shard's directory.
func (s *Store) names(i int) ([]string, error) {
	d, err := os.Open(s.sub(i))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// parse returns the object that a file name stands for.
func (s *Store) parse(i int, file string) (content.ObjectID, bool) {
	sum, err := content.ParseSum(fmt.Sprintf("%02x", i) + file)
	return content.ObjectID{Sum: sum}, err == nil
}
