package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Names of the directories that a benchmark makes, and that sweep removes.
const (
	diskPattern  = "dedup-bench-disk-"
	stagePattern = "dedup-bench-stage-"
)

// diskSize is that of a trial's file system up to scale 12, in bytes; its file is sparse.
const diskSize = 24 << 30

// WithDisk calls fn with a directory on an ext4 of its own. Every trial has to start on
// a fresh one: ext4 does not hand out an inode again for a minute or more after
// it was freed, and looks over all freed ones to find another, so that whoever comes after a large
// removal pays ten times as much for each file (recently_deleted in fs/ext4/ialloc.c).
func WithDisk(ctx context.Context, parent string, fn func(dir string) error) error {
	return withDisk(ctx, parent, diskSize, fn)
}

func withDisk(ctx context.Context, parent string, size int64, fn func(dir string) error) (err error) {
	sweep(parent)
	dir, release, err := newOwned(parent, diskPattern)
	if err != nil {
		return fmt.Errorf("make a disk: %w", err)
	}
	defer release()
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	image, target := filepath.Join(dir, "image"), filepath.Join(dir, "fs")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size), os.Mkdir(target, 0o700)); err != nil {
		return fmt.Errorf("make a disk: %w", err)
	}
	out, err := exec.CommandContext(ctx, "/sbin/mkfs.ext4", "-q", "-F", "-E",
		"lazy_itable_init=0,lazy_journal_init=0,nodiscard", image).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make a disk: mkfs.ext4 (package e2fsprogs): %w: %s", err, out)
	}
	m := mount.Mount{Type: "ext4", Source: image, Options: []string{"loop", "direct-io"}}
	if err := m.Mount(target); err != nil {
		return fmt.Errorf("make a disk: mount: %w", err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(target, 0)) }()
	return fn(target)
}

// newOwned makes a directory that sweep leaves alone until release, or until this process has ended.
func newOwned(parent, pattern string) (dir string, release func(), err error) {
	if dir, err = os.MkdirTemp(parent, pattern); err != nil {
		return "", nil, err
	}
	if release, err = own(dir); err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, release, nil
}

// own marks a directory as in use. The mark gets its name when it is locked: sweep takes one without a lock for that of
// a process that has ended, and other benchmarks may sweep at any moment.
func own(dir string) (release func(), err error) {
	f, err := os.Create(filepath.Join(dir, "owner.new"))
	if err != nil {
		return nil, fmt.Errorf("own %s: %w", dir, err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, "owner"))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("own %s: %w", dir, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// sweep removes what killed benchmarks left below parent: processes, mounts (and with
// them the loop devices) and files.
func sweep(parent string) {
	disks, _ := filepath.Glob(filepath.Join(parent, diskPattern+"*"))
	stages, _ := filepath.Glob(filepath.Join(parent, stagePattern+"*"))
	for _, dir := range append(disks, stages...) {
		f, err := os.Open(filepath.Join(dir, "owner"))
		if err != nil {
			continue // about to be made, or not ours
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			node.Sweep(filepath.Join(dir, "fs"))
			if node.UnmountBelow(dir) == nil {
				_ = os.RemoveAll(dir)
			}
		}
		_ = f.Close()
	}
}
