package layer

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
)

// Outcome is how an ingest came to its layer.
type Outcome int

const (
	// Known: the blob was ingested before, and was not opened.
	Known Outcome = iota
	// Same: the blob or directory was read, and the store had its layer already.
	Same
	// New: the layer is new to the store.
	New
)

// Stats count what a store has done since it was opened.
type Stats struct {
	Blobs, Dirs Ingests
	// Failed ingests by the kind of what went wrong; every kind is there.
	Failed map[Failure]int64
	// Removed is what went because nothing named it any more: layers, and packs. Swept are files that an unclean stop had
	// left, and Open removed.
	Removed       Usage // of packs
	RemovedLayers int64
	RemoveErrors  int64
	Swept         int64
	// Damaged are layers that are out of service now.
	Damaged int64
	// Packs are the files that hold payloads.
	Packs object.Stats
	// Running are the ingests at this moment.
	Running Running
}

// Running is work that is being done.
type Running struct {
	Count int
	// Oldest is when the one that runs longest began; zero when none runs.
	Oldest time.Time
	// Bytes are payloads in memory, on their way to the disk.
	Bytes int64
}

// Ingests are those of one kind of source that came to an end.
type Ingests struct {
	New, Same int64
	// Bytes that were read: of tars, or of a directory's regular files.
	Bytes int64
	// Added is what they added to the disk.
	Added Usage
	// Stages are the times that their parts took. Ingests run side by side, so the times of
	// different ones overlap.
	Stages map[string]time.Duration
}

// Failure is a kind of error.
type Failure string

// The kinds of errors that end an ingest.
const (
	FailedInvalid  Failure = "invalid"  // the archive is damaged or hostile
	FailedSpace    Failure = "space"    // no space, inodes or quota left
	FailedIO       Failure = "io"       // the disk does not work, or is read-only
	FailedResource Failure = "resource" // no memory (max_memory too) or file descriptors left
	FailedCanceled Failure = "canceled" // nobody waits for it any more
	FailedOther    Failure = "other"
)

// kindOf returns what kind of error ended an ingest.
func kindOf(err error) Failure {
	for _, k := range []struct {
		kind Failure
		errs []error
	}{
		{FailedSpace, []error{unix.ENOSPC, unix.EDQUOT}},
		{FailedIO, []error{unix.EIO, unix.EROFS}},
		{FailedResource, []error{archive.ErrMemory, unix.ENOMEM, unix.EMFILE, unix.ENFILE}},
		{FailedInvalid, []error{archive.ErrInvalid}},
		{FailedCanceled, []error{context.Canceled, context.DeadlineExceeded}},
	} {
		for _, e := range k.errs {
			if errors.Is(err, e) {
				return k.kind
			}
		}
	}
	return FailedOther
}

// counters are the Stats of a Store while they change.
type counters struct {
	mu sync.Mutex // guards what follows
	s  Stats
	// running is when each running ingest began.
	running map[*stages]time.Time
}

// begin notes an ingest, until end is called.
func (c *counters) begin() (clock *stages, end func()) {
	clock = &stages{last: time.Now()}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running[clock] = clock.last
	return clock, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.running, clock)
	}
}

func (c *counters) init() {
	c.running = map[*stages]time.Time{}
	c.s.Failed = map[Failure]int64{}
	for _, k := range []Failure{FailedInvalid, FailedSpace, FailedIO, FailedResource, FailedCanceled, FailedOther} {
		c.s.Failed[k] = 0
	}
	for _, in := range []*Ingests{&c.s.Blobs, &c.s.Dirs} {
		in.Stages = map[string]time.Duration{stageRead: 0, stageEncode: 0, stageTree: 0, stageSync: 0}
	}
}

func (c *counters) change(fn func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(&c.s)
}

// ingested counts one ingest; which is its source in s.
func (c *counters) ingested(which func(*Stats) *Ingests, in Ingested, bytes int64, clock *stages) {
	c.change(func(s *Stats) {
		n := which(s)
		if in.Outcome == New {
			n.New++
		} else {
			n.Same++
		}
		n.Bytes += bytes
		n.Added.Bytes += in.Added.Bytes
		n.Added.Inodes += in.Added.Inodes
		for i, name := range clock.names {
			n.Stages[name] += clock.took[i]
		}
	})
}

func ofBlobs(s *Stats) *Ingests { return &s.Blobs }
func ofDirs(s *Stats) *Ingests  { return &s.Dirs }

func (c *counters) failed(err error) error {
	c.change(func(s *Stats) { s.Failed[kindOf(err)]++ })
	return err
}

// Stats returns the counts at this moment.
func (s *Store) Stats() (out Stats) {
	s.counters.change(func(have *Stats) {
		out = *have
		out.Failed = maps.Clone(have.Failed)
		out.Running.Count = len(s.counters.running)
		for _, began := range s.counters.running {
			if out.Running.Oldest.IsZero() || began.Before(out.Running.Oldest) {
				out.Running.Oldest = began
			}
		}
		out.Blobs.Stages, out.Dirs.Stages = maps.Clone(have.Blobs.Stages), maps.Clone(have.Dirs.Stages)
	})
	out.Running.Bytes = s.buffers.bytes()
	out.Removed.Bytes, out.Removed.Inodes = s.objects.Packs().Freed()
	out.Packs = s.objects.Packs().Stats()
	s.mu.RLock()
	out.Damaged = int64(s.damaged)
	s.mu.RUnlock()
	return out
}
