package powercut

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	served "github.com/dedup-snapshotter/dedup-snapshotter/integration/disk"
)

// op is a write, or a flush where data is nil.
type op struct {
	off  int64
	data []byte
}

// disk is a file that remembers how it was written: what a loop device needs, no more.
type disk struct {
	file *os.File

	mu  sync.Mutex // guards log, and keeps it in the order of the file's writes
	log []op
}

// length is how many operations there have been.
func (d *disk) length() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

// recorded is the log up to now. The caller does not change it.
func (d *disk) recorded() []op {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.log[:len(d.log):len(d.log)]
}

// The methods of served.Disk.

func (d *disk) ReadAt(p []byte, off int64) (int, error) { return d.file.ReadAt(p, off) }

func (d *disk) WriteAt(data []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, op{off, append(make([]byte, 0, len(data)), data...)})
	return d.file.WriteAt(data, off)
}

func (d *disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, op{})
	return nil
}

func (d *disk) Size() (int64, error) {
	fi, err := d.file.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// attach mounts the file system on d at the directory at. The loop device's file is served by this process: only
// others may use what is mounted, since a page fault here could wait for itself.
func (d *disk) attach(t *testing.T, fstype, at string) {
	t.Helper()
	path, stop, err := served.Serve(t.TempDir(), d)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	m := mount.Mount{Type: fstype, Source: path, Options: []string{"loop"}}
	if err := m.Mount(at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(at, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
}

// fileSystem is one that a store may lie on.
type fileSystem struct {
	name, packages string
	size           int64
	mkfs           []string
	mount          []string // options
}

var (
	ext4 = fileSystem{"ext4", "e2fsprogs", 256 << 20, []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-E",
		"lazy_itable_init=0,lazy_journal_init=0,nodiscard"}, nil}
	// mkfs.xfs makes none smaller than 300 MiB. Images of one disk have one uuid.
	xfs = fileSystem{"xfs", "xfsprogs", 300 << 20, []string{"mkfs.xfs", "-q", "-f", "-K"}, []string{"nouuid"}}
)

// memory is a directory in memory, so that nothing here waits for a real disk.
func memory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// copySparse makes to a copy of from with holes wherever from holds zeros.
func copySparse(to, from *os.File) error {
	fi, err := from.Stat()
	if err != nil {
		return err
	}
	if err := errors.Join(to.Truncate(0), to.Truncate(fi.Size())); err != nil {
		return err
	}
	buf, zeros := make([]byte, 1<<20), make([]byte, pageSize)
	for start := int64(0); ; {
		start, err = from.Seek(start, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for data: %w", err)
		}
		n, err := from.ReadAt(buf, start)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err := writePages(to, buf[:n], start, func(page []byte) bool {
			return string(page) != string(zeros[:len(page)])
		}); err != nil {
			return err
		}
		start += int64(n)
	}
}

// pageSize is what a disk writes whole or not at all; it divides all offsets that matter here.
const pageSize = 4096

// writePages writes the pages of data that are wanted. Pages are aligned in the file.
func writePages(to *os.File, data []byte, off int64, want func([]byte) bool) error {
	var run []byte // wanted pages that follow each other, up to off
	flush := func() error {
		if len(run) == 0 {
			return nil
		}
		_, err := to.WriteAt(run, off-int64(len(run)))
		run = nil
		return err
	}
	for len(data) > 0 {
		n := min(len(data), pageSize-int(off%pageSize))
		if !want(data[:n]) {
			if err := flush(); err != nil {
				return err
			}
		} else if run == nil {
			run = data[:n]
		} else {
			run = run[:len(run)+n] // of the same array
		}
		off += int64(n)
		data = data[n:]
	}
	return flush()
}
