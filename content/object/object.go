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
//
// With Options.Verity each object gets fs-verity before Put returns, and one that was written without gets it when Digest
// asks for it, after its bytes have been compared with its name.
package object

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

const fanout = 256

// stagedPrefix stands before the name of a file that is about to replace a bad object.
const stagedPrefix = "new-"

// Options configure a Store.
type Options struct {
	// Verity gives objects fs-verity. The file system must have it (verity.Probe).
	Verity bool
}

// Store is the objects directory. Safe for concurrent use.
type Store struct {
	dir    string
	opts   Options
	shards [fanout]shard
	// aside: the file system keeps what fs-verity stores among its metadata, not in the files' own blocks.
	aside bool
	// bytes and inodes are what all objects occupy, dirs are the bytes of the directories that hold them.
	bytes, inodes, dirs atomic.Int64
	// freedBytes and freed are what Unref has removed.
	freedBytes, freed atomic.Int64
}

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
	// bad are those of refs that are missing or have other bytes.
	bad map[content.ObjectID]struct{}
}

// Open opens or creates the objects directory.
func Open(dir string, opts Options) (*Store, error) {
	s := &Store{dir: dir, opts: opts}
	for i := range s.shards {
		s.shards[i] = shard{fd: -1, refs: map[content.ObjectID]uint32{}, busy: map[content.ObjectID]chan struct{}{}, bad: map[content.ObjectID]struct{}{}}
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
	var st unix.Statfs_t
	s.aside = unix.Fstatfs(s.shards[0].fd, &st) == nil && st.Type == unix.BTRFS_SUPER_MAGIC
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

// Put takes one reference to an object, and writes it when it is the first, or when the object is known to be
// bad. It reports how many bytes it added to the disk, 0 when the object was there.
func (s *Store) Put(id content.ObjectID, data []byte) (added int64, err error) {
	return s.put(id, int64(len(data)), func(sh *shard, replace bool) error {
		if replace {
			return s.replace(sh, id, data)
		}
		return s.write(sh, name(id), data)
	})
}

// PutFile is Put for a payload that lies in a file of the same file system. The
// file is renamed, or left alone when the object was known.
func (s *Store) PutFile(id content.ObjectID, path string, size int64) (added int64, err error) {
	return s.put(id, size, func(sh *shard, _ bool) error {
		if s.opts.Verity {
			if err := verity.EnablePath(path); err != nil {
				return fmt.Errorf("object %s: %w", id, err)
			}
		}
		if err := unix.Renameat(unix.AT_FDCWD, path, sh.fd, name(id)); err != nil {
			return fmt.Errorf("rename staged object %s: %w", id, err)
		}
		return nil
	})
}

func (s *Store) put(id content.ObjectID, size int64, create func(sh *shard, replace bool) error) (int64, error) {
	sh := s.shard(id)
	sh.mu.Lock()
	sh.await(id)
	_, bad := sh.bad[id]
	if sh.refs[id] > 0 && !bad {
		sh.refs[id]++
		sh.mu.Unlock()
		return 0, nil
	}
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()

	var old int64
	var was bool
	if bad {
		_, old, was = s.size(sh, name(id))
	}
	err := create(sh, bad)

	sh.mu.Lock()
	defer sh.mu.Unlock()
	delete(sh.busy, id)
	close(done)
	if err != nil {
		return 0, err
	}
	sh.refs[id]++
	delete(sh.bad, id)
	s.bytes.Add(s.Occupies(size) - old)
	if !was {
		s.inodes.Add(1)
	}
	return size, nil
}

// await waits until nobody is busy with an object. Under mu, which it gives up meanwhile.
func (sh *shard) await(id content.ObjectID) {
	for {
		done, busy := sh.busy[id]
		if !busy {
			return
		}
		sh.mu.Unlock()
		<-done
		sh.mu.Lock()
	}
}

// size is that of an object's file, if there is one, and what it occupies.
func (s *Store) size(sh *shard, file string) (size, occupies int64, ok bool) {
	var st unix.Statx_t
	if err := unix.Statx(sh.fd, file, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_SIZE, &st); err != nil {
		return 0, 0, false
	}
	return int64(st.Size), s.occupies(int64(st.Size), st.Attributes&unix.STATX_ATTR_VERITY != 0), true
}

// Occupies returns what an object of this size takes of the disk when it is put.
func (s *Store) Occupies(size int64) int64 { return s.occupies(size, s.opts.Verity) }

func (s *Store) occupies(size int64, hashed bool) int64 {
	if hashed && !s.aside {
		return content.Blocks(size) + verity.Space(size)
	}
	return content.Blocks(size)
}

// write creates an object under its final name: a crash leaves at worst a file that
// no layer names. A file that lies there already is such a leftover.
func (s *Store) write(sh *shard, file string, data []byte) error {
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_CLOEXEC
	fd, err := unix.Openat(sh.fd, file, flags, 0o400)
	if errors.Is(err, unix.EEXIST) {
		if err := unix.Unlinkat(sh.fd, file, 0); err != nil {
			return fmt.Errorf("remove leftover of object %s: %w", file, err)
		}
		fd, err = unix.Openat(sh.fd, file, flags, 0o400)
	}
	if err != nil {
		return fmt.Errorf("create object %s: %w", file, err)
	}
	err = writeAll(fd, data)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil && s.opts.Verity {
		err = sh.enable(file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write object %s: %w", file, err), unix.Unlinkat(sh.fd, file, 0))
	}
	return nil
}

// replace writes a bad object anew. Containers may have the old file open.
func (s *Store) replace(sh *shard, id content.ObjectID, data []byte) error {
	staged := stagedPrefix + name(id)
	if err := s.write(sh, staged, data); err != nil {
		return err
	}
	if err := unix.Renameat(sh.fd, staged, sh.fd, name(id)); err != nil {
		return errors.Join(fmt.Errorf("replace object %s: %w", id, err), unix.Unlinkat(sh.fd, staged, 0))
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
	sh.await(id) // somebody may be replacing it
	if have := sh.refs[id]; have > n {
		sh.refs[id] = have - n
		sh.mu.Unlock()
		return nil
	}
	delete(sh.refs, id)
	delete(sh.bad, id)
	done := make(chan struct{})
	sh.busy[id] = done
	sh.mu.Unlock()

	_, was, ok := s.size(sh, name(id))
	err := sh.unlink(name(id))
	if err == nil && ok {
		s.bytes.Add(-was)
		s.inodes.Add(-1)
		s.freedBytes.Add(was)
		s.freed.Add(1)
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

// unlink removes a file, if it is there.
func (sh *shard) unlink(file string) error {
	err := unix.Unlinkat(sh.fd, file, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// Read returns an object's bytes. The caller holds a reference to it. One that is found to be damaged is bad from then on.
func (s *Store) Read(id content.ObjectID) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, id.Path()))
	if err == nil && sha256.Sum256(b) != id.Sum {
		err = ErrDamaged
	}
	if errors.Is(err, ErrDamaged) || errors.Is(err, fs.ErrNotExist) {
		s.SetBad(id)
	}
	if err != nil {
		return nil, fmt.Errorf("read object %s: %w", id, err)
	}
	return b, nil
}

// Head returns the first n bytes of an object that is longer. They are not compared with its name.
func (s *Store) Head(id content.ObjectID, n int) ([]byte, error) {
	f, err := os.Open(filepath.Join(s.dir, id.Path()))
	if err != nil {
		return nil, fmt.Errorf("read object %s: %w", id, err)
	}
	defer f.Close()
	head := make([]byte, n)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, fmt.Errorf("read object %s: %w: %w", id, ErrDamaged, err)
	}
	return head, nil
}
