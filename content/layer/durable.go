package layer

import (
	"fmt"
	"sync"
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
	wg     sync.WaitGroup
}

// makeDurable syncs the file system, unless that may wait.
func (s *Store) makeDurable() error {
	if s.opts.Durability == Deferred {
		return nil
	}
	if err := unix.Syncfs(s.rootFd); err != nil {
		return fmt.Errorf("sync %s: %w", s.root, err)
	}
	return nil
}

// noteWritten notes that a layer came in: the mark moves on, now or once it is on the disk.
func (s *Store) noteWritten() {
	if s.opts.Durability == Strict {
		s.touch(time.Now())
		return
	}
	w := &s.written
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil && !w.closed {
		w.timer = time.AfterFunc(deferral, s.writeOut)
	}
}

// writeOut puts what was deferred on the disk.
func (s *Store) writeOut() {
	w := &s.written
	w.mu.Lock()
	w.timer = nil
	if w.closed {
		w.mu.Unlock()
		return
	}
	w.wg.Add(1)
	w.mu.Unlock()
	defer w.wg.Done()
	now := time.Now()
	if err := unix.Syncfs(s.rootFd); err != nil {
		log.L.WithError(err).Errorf("sync %s: what came in lately would not survive a power cut", s.root)
		return
	}
	s.touch(now)
}

// touch moves the mark. An older one that a power cut brings back makes the next Open look at more than it
// needs to.
func (s *Store) touch(t time.Time) {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(s.rootFd, fileRunning, []unix.Timespec{ts, ts}, 0); err != nil {
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
