// Package disk serves a file by FUSE, so that a test sees what a loop device over it reads, writes and flushes, and may
// refuse it.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Disk is what stands behind the file. Its methods are called concurrently; an error of any kind becomes EIO.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	Size() (int64, error)
}

// ErrMissing is wrapped when FUSE cannot be used here.
var ErrMissing = errors.New("needs FUSE")

const name = "disk"

// Serve mounts a directory that holds the file, and returns its path. The kernel caches nothing of it. This process
// serves it: who maps a file into memory that lies on such a disk has to be another one, since a page fault could wait
// for itself.
func Serve(dir string, d Disk) (path string, stop func() error, err error) {
	server, err := fs.Mount(dir, &root{disk: d}, &fs.Options{MountOptions: fuse.MountOptions{
		FsName: "test-disk", Name: "test-disk", DirectMount: true, MaxWrite: 1 << 20, DisableXAttrs: true,
	}})
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	return filepath.Join(dir, name), func() error {
		var err error
		for range 2400 { // a loop device lets go of its file after the last unmount, in whatever namespace
			if err = server.Unmount(); err == nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
		return fmt.Errorf("unmount the disk's file: %w", err)
	}, nil
}

type root struct {
	fs.Inode
	disk Disk
}

func (r *root) OnAdd(ctx context.Context) {
	r.AddChild(name, r.NewPersistentInode(ctx, &file{disk: r.disk}, fs.StableAttr{Mode: fuse.S_IFREG}), false)
}

type file struct {
	fs.Inode
	disk Disk
}

var (
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
)

// Open says that the kernel must not cache: every write of the loop device comes here before it is answered.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	size, err := f.disk.Size()
	if err != nil {
		return syscall.EIO
	}
	out.Mode, out.Size = 0o600, uint64(size)
	return 0
}

func (f *file) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := f.disk.ReadAt(dest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if _, err := f.disk.WriteAt(data, off); err != nil {
		return 0, syscall.EIO
	}
	return uint32(len(data)), 0
}

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	if f.disk.Sync() != nil {
		return syscall.EIO
	}
	return 0
}
