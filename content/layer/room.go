package layer

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// roomBytes and roomInodes are how much an ingest writes between two looks at what is free.
	roomBytes  = 8 << 20
	roomInodes = 512
	// pressureEvery is the least time between two calls of Pressure.
	pressureEvery = 5 * time.Second
)

// Reserve is what ingests leave free on the file system.
type Reserve struct{ Space, Inodes Amount }

// Amount is a number of bytes or inodes, and a part of all there are; the larger of both counts.
type Amount struct {
	Fixed   int64
	Percent float64
}

func (a Amount) of(total int64) int64 { return max(a.Fixed, int64(a.Percent/100*float64(total))) }

// room guards the reserve.
type room struct {
	mu   sync.Mutex
	last time.Time // of the last call of Pressure
}

// checkRoom refuses a payload of this many bytes that cannot fit, before any of it is written, or, with 0, to write on
// when the reserve is reached.
func (d *directory) checkRoom(ctx context.Context, size int64) error {
	err := d.hasRoom(size)
	if err == nil || d.opts.Pressure == nil {
		return err
	}
	d.MakeRoom(ctx)
	return d.hasRoom(size)
}

// MakeRoom frees what can be freed, and reports whether it did: it does so only every few seconds. The caller must not
// be busy with a chain image: who frees others may wait for that.
func (d *directory) MakeRoom(ctx context.Context) bool {
	d.room.mu.Lock()
	defer d.room.mu.Unlock()
	if d.opts.Pressure == nil || time.Since(d.room.last) <= pressureEvery {
		return false
	}
	d.opts.Pressure(ctx)
	d.room.last = time.Now()
	return true
}

// Room tells why new layers are refused, nil when they are not.
func (d *directory) Room() error { return d.hasRoom(0) }

// spare is what merging may use of what is free: half of what is above the reserve, since pulls go on.
func (d *directory) spare() int64 {
	var st unix.Statfs_t
	if unix.Fstatfs(d.rootFd, &st) != nil {
		return 0
	}
	return max(0, int64(st.Bavail)*st.Bsize-d.opts.Reserve.Space.of(int64(st.Blocks)*st.Bsize)) / 2
}

func (d *directory) hasRoom(size int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(d.rootFd, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", d.root, err)
	}
	free := int64(st.Bavail) * st.Bsize
	space, inodes := d.opts.Reserve.Space.of(int64(st.Blocks)*st.Bsize), d.opts.Reserve.Inodes.of(int64(st.Files))
	switch {
	case size > free-space && size > 0:
		return fmt.Errorf("a file of %d bytes, and %s has %d bytes free, %d of them in reserve: %w", size, d.root, free,
			space, unix.ENOSPC)
	case free < space:
		return fmt.Errorf("%s has %d bytes free, and reserve_space keeps %d: %w", d.root, free, space, unix.ENOSPC)
	// A file system without a fixed number of inodes says 0 of 0, or as many as fit into its free space.
	case st.Files > 0 && int64(st.Ffree) < inodes:
		return fmt.Errorf("%s has %d inodes free, and reserve_inodes keeps %d: %w", d.root, st.Ffree, inodes, unix.ENOSPC)
	}
	return nil
}
