package layer

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// buffersSize bounds the bytes of payloads that wait for hashing and writing, of all ingests together.
	buffersSize = 2 * bufferMax
	// bufferMin is the smallest buffer.
	bufferMin = 4 << 10
)

// buffers hands out memory for payloads on their way to the disk: a buddy allocator over one mapping, which is
// outside of Go's heap, where the collector would let it grow to twice what is in use. Who finds it full waits its
// turn. The mapping is there while anything is in use, and until trim.
type buffers struct {
	mu      sync.Mutex // guards what follows
	slab    []byte
	free    [buddyLevels][]int // offsets of free blocks of bufferMin<<level, sorted
	used    int                // blocks that are handed out
	handed  int                // bytes of these
	waiting []*bufferWait      // first come, first served
	most    int                // bytes that try hands out; 0 for all, other values are for tests
}

// buddyLevels are the sizes of blocks, from bufferMin to buffersSize.
const buddyLevels = 14

type bufferWait struct {
	level int
	given chan int // the offset of a block
}

// buffer is a payload's memory.
type buffer struct {
	data  []byte
	from  *buffers // nil: of Go's heap
	off   int
	level int
}

// levelOf returns which blocks hold n bytes.
func levelOf(n int) int { return bits.Len(uint(max(n-1, 0) / bufferMin)) }

// get returns a buffer of n bytes, at most bufferMax, with whatever is in it.
func (b *buffers) get(ctx context.Context, n int) (buffer, error) {
	level := levelOf(n)
	b.mu.Lock()
	if err := b.open(); err != nil {
		b.mu.Unlock()
		return buffer{}, err
	}
	if off := b.take(level); off >= 0 && len(b.waiting) == 0 {
		defer b.mu.Unlock()
		return b.hand(off, level, n), nil
	} else if off >= 0 {
		b.put(off, level)
	}
	w := &bufferWait{level, make(chan int, 1)}
	b.waiting = append(b.waiting, w)
	b.mu.Unlock()
	select {
	case off := <-w.given:
		return buffer{b.slab[off : off+n], b, off, level}, nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case off := <-w.given:
		b.used, b.handed = b.used-1, b.handed-bufferMin<<level
		b.put(off, level)
	default:
		b.waiting = slices.DeleteFunc(b.waiting, func(o *bufferWait) bool { return o == w })
	}
	b.serve() // who came after may have less to wait for
	return buffer{}, context.Cause(ctx)
}

// try returns a buffer if there is room for it and nobody waits.
func (b *buffers) try(n int) (f buffer, ok bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.open(); err != nil {
		return buffer{}, false, err
	}
	if b.most != 0 && b.handed+bufferMin<<levelOf(n) > b.most || len(b.waiting) > 0 {
		return buffer{}, false, nil
	}
	off := b.take(levelOf(n))
	if off < 0 {
		return buffer{}, false, nil
	}
	return b.hand(off, levelOf(n), n), true, nil
}

// release gives a buffer back. Nobody may look at its data any more.
func (f buffer) release() {
	b := f.from
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used, b.handed = b.used-1, b.handed-bufferMin<<f.level
	b.put(f.off, f.level)
	b.serve()
}

// trim gives the mapping back to the kernel if nothing is in use.
func (b *buffers) trim() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used > 0 || len(b.waiting) > 0 || b.slab == nil {
		return
	}
	_ = unix.Munmap(b.slab) // of what mmap returned
	b.slab = nil
}

// What follows is called under mu.

func (b *buffers) open() error {
	if b.slab != nil {
		return nil
	}
	slab, err := unix.Mmap(-1, 0, buffersSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return fmt.Errorf("map buffers: %w", err)
	}
	b.slab = slab
	for i := range b.free {
		b.free[i] = nil
	}
	b.free[buddyLevels-1] = []int{0}
	return nil
}

func (b *buffers) hand(off, level, n int) buffer {
	b.used, b.handed = b.used+1, b.handed+bufferMin<<level
	return buffer{b.slab[off : off+n], b, off, level}
}

// take returns the lowest block of a level, made from a larger one if there is none, or -1.
func (b *buffers) take(level int) int {
	at := level
	for at < buddyLevels && len(b.free[at]) == 0 {
		at++
	}
	if at == buddyLevels {
		return -1
	}
	off := b.free[at][0]
	b.free[at] = slices.Delete(b.free[at], 0, 1)
	for ; at > level; at-- {
		b.insert(off+bufferMin<<(at-1), at-1)
	}
	return off
}

// put frees a block, with its buddy as far as that is free.
func (b *buffers) put(off, level int) {
	for ; level < buddyLevels-1; level++ {
		i, found := slices.BinarySearch(b.free[level], off^bufferMin<<level)
		if !found {
			break
		}
		b.free[level] = slices.Delete(b.free[level], i, i+1)
		off &^= bufferMin << level
	}
	b.insert(off, level)
}

func (b *buffers) insert(off, level int) {
	i, _ := slices.BinarySearch(b.free[level], off)
	b.free[level] = slices.Insert(b.free[level], i, off)
}

// serve gives blocks to those who wait, in their order.
func (b *buffers) serve() {
	for len(b.waiting) > 0 {
		w := b.waiting[0]
		off := b.take(w.level)
		if off < 0 {
			return
		}
		b.used, b.handed = b.used+1, b.handed+bufferMin<<w.level
		w.given <- off
		b.waiting = b.waiting[1:]
	}
}

// bytes is how much is handed out.
func (b *buffers) bytes() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return int64(b.handed)
}
