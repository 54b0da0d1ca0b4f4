package blobs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// watchEvery is how often readers looks at what has happened. The kernel merges equal events until then, so a
	// blob that is read at full speed costs next to nothing.
	watchEvery = 250 * time.Millisecond
	// forgetAfter is longer than any use of a blob counts.
	forgetAfter = 2 * quietLong
	// watchMask is what a reader of a file cannot avoid. It covers the files of a directory, without those below.
	watchMask = unix.FAN_OPEN | unix.FAN_ACCESS | unix.FAN_CLOSE_NOWRITE | unix.FAN_EVENT_ON_CHILD
)

// errUnseen is wrapped where nobody can tell who reads blobs.
var errUnseen = errors.New("who reads the content store cannot be seen")

// readers knows when a process other than this one last read a blob.
//
// containerd has no lock that could be asked instead: a push or an export takes no lease on what it reads, and a
// client that reads through the socket has the file open for the length of one request (contentserver.Read). But all
// of them open the manifest first and its layers later, and the kernel tells of each open before it returns.
//
// What happened before since is not known: then a blob counts as read at since. Safe for concurrent use.
type readers struct {
	root func(context.Context) string // the content store as a directory

	mu     sync.Mutex // guards what follows
	fd     int        // of fanotify; -1 while nothing is watched
	dirs   map[string]uint64
	since  time.Time
	used   map[digest.Digest]time.Time
	forgot time.Time
}

func newReaders(root func(context.Context) string) *readers {
	return &readers{root: root, fd: -1}
}

// run looks until ctx ends.
func (r *readers) run(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var told string
	for n := 0; ; n++ {
		if r.watching() || n%4 == 0 { // containerd may start later, and makes its directories with the first blob
			err := r.look(ctx)
			if err != nil && err.Error() != told && ctx.Err() == nil {
				told = err.Error()
				log.G(ctx).WithError(err).Debug("watch who reads blobs")
			}
		}
		select {
		case <-ctx.Done():
			r.close()
			return
		case <-tick.C:
		}
	}
}

func (r *readers) watching() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fd >= 0
}

func (r *readers) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stop()
}

func (r *readers) stop() {
	if r.fd >= 0 {
		unix.Close(r.fd)
	}
	r.fd, r.dirs = -1, nil
}

// look takes in all that happened before the call.
func (r *readers) look(ctx context.Context) error {
	root := r.root(ctx)
	if root == "" {
		return fmt.Errorf("%w: containerd does not say where it lies", errUnseen)
	}
	dirs, err := algorithms(filepath.Join(root, "blobs"))
	if err != nil {
		return fmt.Errorf("%w from here: %w", errUnseen, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 || !maps.Equal(dirs, r.dirs) {
		if err := r.start(dirs); err != nil {
			return fmt.Errorf("%w: %w", errUnseen, err)
		}
	}
	if err := r.drain(); err != nil {
		r.stop()
		return fmt.Errorf("%w: %w", errUnseen, err)
	}
	return nil
}

// algorithms returns the directories of blobs, with their inodes: after somebody replaced one, it is another.
func algorithms(blobs string) (map[string]uint64, error) {
	entries, err := os.ReadDir(blobs)
	if err != nil {
		return nil, err
	}
	found := map[string]uint64{}
	for _, e := range entries {
		var st unix.Stat_t
		dir := filepath.Join(blobs, e.Name())
		if err := unix.Lstat(dir, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			found[dir] = st.Ino
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no blobs in %s", blobs)
	}
	return found, nil
}

func (r *readers) start(dirs map[string]uint64) error {
	r.stop()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK,
		unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return fmt.Errorf("fanotify: %w", err)
	}
	for dir := range dirs {
		if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_ONLYDIR, watchMask, unix.AT_FDCWD, dir); err != nil {
			unix.Close(fd)
			return fmt.Errorf("watch %s: %w", dir, err)
		}
	}
	r.fd, r.dirs, r.since, r.used = fd, dirs, time.Now(), map[digest.Digest]time.Time{}
	return nil
}

// drain reads the events that wait. Each carries an open file, whose name tells the blob.
func (r *readers) drain() error {
	const header = int(unsafe.Sizeof(unix.FanotifyEventMetadata{}))
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(r.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			r.forget()
			return nil
		}
		if err != nil {
			return fmt.Errorf("fanotify: %w", err)
		}
		for at := buf[:n]; len(at) >= header; {
			length := int(binary.NativeEndian.Uint32(at))
			if length < header || length > len(at) {
				return errors.New("fanotify: an event that makes no sense")
			}
			var e unix.FanotifyEventMetadata
			if _, err := binary.Decode(at[:header], binary.NativeEndian, &e); err != nil {
				return fmt.Errorf("fanotify: %w", err)
			}
			r.take(e)
			at = at[length:]
		}
	}
}

func (r *readers) take(e unix.FanotifyEventMetadata) {
	if e.Mask&unix.FAN_Q_OVERFLOW != 0 {
		r.since = time.Now() // some were lost
	}
	if e.Fd < 0 {
		return
	}
	defer unix.Close(int(e.Fd))
	if int(e.Pid) == os.Getpid() {
		return // an ingest or a check of ours
	}
	path, err := os.Readlink(fmt.Sprint("/proc/self/fd/", e.Fd))
	if err != nil {
		r.since = time.Now()
		return
	}
	dir, name := filepath.Split(path)
	r.used[digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(dir)), name)] = time.Now()
}

// forget leaves out now and then what counts no more.
func (r *readers) forget() {
	if time.Since(r.forgot) < forgetAfter {
		return
	}
	r.forgot = time.Now()
	maps.DeleteFunc(r.used, func(_ digest.Digest, at time.Time) bool { return time.Since(at) > forgetAfter })
}

// last returns when a blob that came at created was last read, as far as that may still count; zero for never.
func (r *readers) last(d digest.Digest, created time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, ok := r.used[d]
	if !created.IsZero() && created.Before(r.since) && (!ok || at.Before(r.since)) {
		return r.since
	}
	return at
}
