package layer

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Durability is when a new layer is on the disk.
type Durability string

const (
	// Strict: a layer is served only after all of it is on the disk.
	Strict Durability = "strict"
	// Deferred: a layer is served at once and written out within deferral. What a power cut catches is found by the
	// next Open, is out of service then, and has to be ingested again.
	Deferred Durability = "deferred"
)

// deferral is how long a layer may wait for the disk under Deferred.
const deferral = 10 * time.Second

// written keeps track of up to when everything is on the disk.
type written struct {
	mu     sync.Mutex
	timer  *time.Timer // running while something waits for the disk
	closed bool
	failed bool // not all that came in is on the disk
	wg     sync.WaitGroup
	// doubt: what an unclean stop may have damaged is not yet verified, so the mark stays where it is.
	doubt atomic.Bool
}

// durable puts what comes in on the disk, and moves the mark up to which all of it is there.
type durable struct {
	*directory
	written written
}

// openRoot returns a file of its own for syncfs: the kernel tells of a write that failed once to each file that was
// open when it did. With one for all, the first ingest to ask would learn it, and the one that wrote would not.
func (d *directory) openRoot() (int, error) {
	fd, err := unix.Openat(d.rootFd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", d.root, err)
	}
	return fd, nil
}

// Sync puts on the disk what is written by now, also by others.
func (d *directory) Sync() error {
	fd, err := d.openRoot()
	if err != nil {
		return err
	}
	return errors.Join(syncfs(fd, d.root), unix.Close(fd))
}

// watch looks for writes that fail from now on: sync is Sync that tells of them, and moves the mark. stop ends it.
func (d *durable) watch() (sync func() error, stop func(), err error) {
	fd, err := d.openRoot()
	if err != nil {
		return nil, nil, err
	}
	sync = func() error {
		now := time.Now()
		if err := syncfs(fd, d.root); err != nil {
			return err
		}
		d.written.mu.Lock()
		defer d.written.mu.Unlock()
		if !d.written.failed {
			d.touch(now)
		}
		return nil
	}
	return sync, func() { _ = unix.Close(fd) }, nil
}

func syncfs(fd int, root string) error {
	if err := unix.Syncfs(fd); err != nil {
		return fmt.Errorf("sync %s: %w", root, err)
	}
	return nil
}

// sync puts on the disk what the session relies on. What failed once has failed.
func (ss *session) sync() error {
	if ss.unsynced == nil {
		ss.unsynced = syncfs(ss.root, ss.s.root)
	}
	return ss.unsynced
}

// makeDurable syncs the file system, unless that may wait.
func (ss *session) makeDurable() error {
	if ss.s.opts.Durability == Deferred {
		return nil
	}
	return ss.sync()
}

// noteWritten notes that a layer came in: the mark moves on, now or once it is on the disk.
func (d *durable) noteWritten() {
	if d.opts.Durability == Strict {
		d.touch(time.Now())
		return
	}
	w := &d.written
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil && !w.closed {
		w.timer = time.AfterFunc(deferral, d.writeOut)
	}
}

// writeOut puts what was deferred on the disk.
func (d *durable) writeOut() {
	w := &d.written
	w.mu.Lock()
	w.timer = nil
	if w.closed || w.failed {
		w.mu.Unlock()
		return
	}
	w.wg.Add(1)
	w.mu.Unlock()
	defer w.wg.Done()
	now := time.Now()
	if err := unix.Syncfs(d.rootFd); err != nil {
		// It tells only once: up to the next start the mark stays where it is.
		w.mu.Lock()
		w.failed = true
		w.mu.Unlock()
		log.L.WithError(d.explain(err)).
			Errorf("sync %s: the newest layers may be damaged: run `dedupctl fsck`", d.root)
		return
	}
	d.touch(now)
}

// touch moves the mark. An older one that a power cut brings back makes the next Open look at more than it
// needs to.
func (d *durable) touch(t time.Time) {
	if d.written.doubt.Load() {
		return
	}
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(d.rootFd, fileRunning, []unix.Timespec{ts, ts}, 0); err != nil {
		log.L.WithError(err).Debug("move the mark of what is on the disk")
	}
}

func (w *written) stop() {
	w.mu.Lock()
	w.closed = true
	if w.timer != nil {
		w.timer.Stop()
	}
	w.mu.Unlock()
	w.wg.Wait()
}

// WriteOut returns once all layers that are visible by now are on the disk. Under Strict they are. It is an error while
// an unclean stop leaves some in doubt, and after a write that failed, until the next start.
func WriteOut(s *Store) error {
	if s.written.doubt.Load() {
		return fmt.Errorf("what an unclean stop may have damaged in %s is not yet verified", s.root)
	}
	if s.opts.Durability == Strict {
		return nil
	}
	s.written.mu.Lock()
	failed := s.written.failed
	s.written.mu.Unlock()
	if failed {
		return fmt.Errorf("a write to %s failed: see `dedupctl fsck`, and restart the daemon", s.root)
	}
	return s.explain(s.Sync())
}
