// Package object keeps the payloads of regular files, each stored once and named
// by its sha256.
//
// # On disk
//
//	objects/<2 hex>/<62 hex>   mode 0400, written once, never changed
//
// # References
//
// The store counts references to each object, in memory only: every layer that
// names an object holds one, and so does every ingest that has put it and is
// not finished. The counts are loaded from the trees at start (Load). An object is
// written when its count leaves 0 and unlinked when it returns there, so
// that looking one up costs no system call, and removing layers costs only what they held.
//
// Put returns when the bytes are written, not when they are durable: the owner
// of a layer syncs the file system once before the layer becomes visible. After
// an unclean stop, Sweep removes what no durable layer names before anything
// is served, so that a half-written object is never used again.
package object

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const fanout = 256

// Store is the objects directory. Safe for concurrent use.
type Store struct {
	dir    string
	shards [fanout]shard
	// bytes and inodes are what all objects occupy, dirs are the bytes of the directories that hold them.
	bytes, inodes, dirs atomic.Int64
	// freedBytes and freed are what Unref has removed.
	freedBytes, freed atomic.Int64
}

// blockSize is what a payload's size is rounded up to, to tell what it occupies.
const blockSize = 4096

func blocks(size int64) int64 { return (size + blockSize - 1) &^ (blockSize - 1) }

// Used returns what the objects occupy: bytes, rounded up to blocks, and inodes.
func (s *Store) Used() (bytes, inodes int64) { return s.bytes.Load(), s.inodes.Load() }

// Freed returns what Unref has removed since Open: bytes, rounded up to blocks, and objects.
func (s *Store) Freed() (bytes, objects int64) { return s.freedBytes.Load(), s.freed.Load() }

// Directories returns what the directories of the objects occupy, as of the last MeasureDirectories.
func (s *Store) Directories() (bytes, inodes int64) { return s.dirs.Load(), fanout + 1 }

// MeasureDirectories looks at the directories, which takes well below a millisecond. They grow with the
// number of objects.
func (s *Store) MeasureDirectories() {
	var total int64
	for i := range s.shards {
		var st unix.Stat_t
		if unix.Fstat(s.shards[i].fd, &st) == nil {
			total += st.Blocks * 512
		}
	}
	s.dirs.Store(total)
}

// SetUsed restores what Used said when the last process stopped cleanly.
func (s *Store) SetUsed(bytes, inodes int64) {
	s.bytes.Store(bytes)
	s.inodes.Store(inodes)
}

// shard holds the objects whose ids start with one byte.
type shard struct {
	fd int // of the directory

	mu   sync.Mutex // guards what follows
	refs map[content.ObjectID]uint32
	// busy objects are being written or unlinked right now; the channel is closed after.
	busy map[content.ObjectID]chan struct{}
}

// Open opens or creates the objects directory.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	for i := range s.shards {
		s.shards[i] = shard{fd: -1, refs: map[content.ObjectID]uint32{}, busy: map[content.ObjectID]chan struct{}{}}
	}
	for i := range s.shards {
		sub := filepath.Join(dir, fmt.Sprintf("%02x", i))
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("create objects directory: %w", err), s.Close())
		}
		fd, err := unix.Open(sub, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open objects directory %s: %w", sub, err), s.Close())
		}
		s.shards[i].fd = fd
	}
	s.MeasureDirectories()
	return s, nil
}

// Close closes the store; objects stay as they are.
func (s *Store) Close() error {
	var errs []error
	for i := range s.shards {
		if fd := s.shards[i].fd; fd >= 0 {
			s.shards[i].fd = -1
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// Dir returns the objects directory.
func (s *Store) Dir() string { return s.dir }

func (s *Store) shard(id content.ObjectID) *shard { return &s.shards[id.Sum[0]] }

func name(id content.ObjectID) string { return id.Hex()[2:] }

// Load adds references to objects of a durable layer, without looking at the disk.
func (s *Store) Load(ids []content.ObjectID) {
	for _, id := range ids {
		sh := s.shard(id)
		sh.mu.Lock()
		sh.refs[id]++
		sh.mu.Unlock()
	}
}

// Len returns how many objects there are.
func (s *Store) Len() int {
	n := 0
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		n += len(sh.refs)
		sh.mu.Unlock()
	}
	return n
}

// Put takes one reference to an object, and writes it when it is the first. It
// reports how many bytes it added to the disk, 0 when the object was known.
func (s *Store) Put(id content.ObjectID, data []byte) (added int64, err error) {
	return s.put(id, int64(len(data)), func(sh *shard) error { return sh.write(id, data) })
}

// PutFile is Put for a payload that lies in a file of the same file system. The
// file is renamed, or left alone when the object was known.
func (s *Store) PutFile(id content.ObjectID, path string, size int64) (added int64, err error) {
	return s.put(id, size, func(sh *shard) error {
		if err := unix.Renameat(unix.AT_FDCWD, path, sh.fd, name(id)); err != nil {
			return fmt.Errorf("rename staged object %s: %w", id, err)
		}
		return nil
	})
}

func (s *Store) put(id content.ObjectID, size int64, create func(*shard) error) (int64, error) {
	sh := s.shard(id)
	sh.mu.Lock()
	for {
		done, busy := sh.busy[id]
		if !busy {
			break
		}
		sh.mu.Unlock()
		<-done
		sh.mu.Lock()
	}
	if sh.refs[id] > 0 {
		sh.refs[id]++
		sh.mu.Unlock()
		return 0, nil
	}
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()

	err := create(sh)

	sh.mu.Lock()
	defer sh.mu.Unlock()
	delete(sh.busy, id)
	close(done)
	if err != nil {
		return 0, err
	}
	sh.refs[id] = 1
	s.bytes.Add(blocks(size))
	s.inodes.Add(1)
	return size, nil
}

// write creates the object under its final name: a crash leaves at worst a file that
// no layer names. A file that lies there already is such a leftover.
func (sh *shard) write(id content.ObjectID, data []byte) error {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC
	fd, err := unix.Openat(sh.fd, name(id), flags, 0o400)
	if errors.Is(err, unix.EEXIST) {
		if err := unix.Unlinkat(sh.fd, name(id), 0); err != nil {
			return fmt.Errorf("remove leftover of object %s: %w", id, err)
		}
		fd, err = unix.Openat(sh.fd, name(id), flags, 0o400)
	}
	if err != nil {
		return fmt.Errorf("create object %s: %w", id, err)
	}
	err = writeAll(fd, data)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write object %s: %w", id, err), unix.Unlinkat(sh.fd, name(id), 0))
	}
	return nil
}

func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// Unref gives back n references to an object and unlinks it when none is left.
func (s *Store) Unref(id content.ObjectID, n uint32) error {
	sh := s.shard(id)
	sh.mu.Lock()
	if have := sh.refs[id]; have > n {
		sh.refs[id] = have - n
		sh.mu.Unlock()
		return nil
	}
	delete(sh.refs, id)
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()

	var st unix.Stat_t
	err := unix.Fstatat(sh.fd, name(id), &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		err = unix.Unlinkat(sh.fd, name(id), 0)
	}
	switch {
	case err == nil:
		s.bytes.Add(-blocks(st.Size))
		s.inodes.Add(-1)
		s.freedBytes.Add(blocks(st.Size))
		s.freed.Add(1)
	case errors.Is(err, unix.ENOENT):
		err = nil
	}

	sh.mu.Lock()
	delete(sh.busy, id)
	close(done)
	sh.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove object %s: %w", id, err)
	}
	return nil
}

// Sweep removes every file that is no referenced object and returns how many it
// removed. It finds out what the others occupy. Nothing may be put while it runs.
func (s *Store) Sweep() (removed int, err error) {
	s.SetUsed(0, 0)
	for i := range s.shards {
		n, err := s.sweepShard(i)
		removed += n
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

func (s *Store) sweepShard(i int) (removed int, err error) {
	sub := filepath.Join(s.dir, fmt.Sprintf("%02x", i))
	d, err := os.Open(sub)
	if err != nil {
		return 0, fmt.Errorf("sweep objects: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return 0, fmt.Errorf("sweep objects in %s: %w", sub, err)
	}
	for _, file := range names {
		sum, err := content.ParseSum(fmt.Sprintf("%02x", i) + file)
		if err == nil && s.shards[i].refs[content.ObjectID{Sum: sum}] > 0 {
			var st unix.Stat_t
			if err := unix.Fstatat(s.shards[i].fd, file, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return removed, fmt.Errorf("sweep objects: %s/%s: %w", sub, file, err)
			}
			s.bytes.Add(blocks(st.Size))
			s.inodes.Add(1)
			continue
		}
		if err := os.RemoveAll(filepath.Join(sub, file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("sweep objects: %w", err)
		}
		removed++
	}
	return removed, nil
}

// Read returns an object's bytes. The caller holds a reference to it.
func (s *Store) Read(id content.ObjectID) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, id.Path()))
	if err != nil {
		return nil, fmt.Errorf("read object: %w", err)
	}
	return b, nil
}
