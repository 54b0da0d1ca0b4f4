package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

const (
	// From these parts on, the alerts of deploy/ warn too.
	fullBytes  = 0.85
	fullInodes = 0.90
)

// lookAtDisk looks at the file system of the root.
func (n *node) lookAtDisk(context.Context) {
	var st unix.Statfs_t
	if err := unix.Statfs(n.place(), &st); err != nil {
		n.failed("disk.type", err)
		return
	}
	switch name := fileSystem(int64(st.Type)); name {
	case "ext4", "xfs":
		n.ok("disk.type", "root %s is on %s", n.Settings.Root, name)
	case "btrfs":
		n.add(Info, "disk.type", "",
			"root %s is on btrfs: images and containers are tested on it, power cuts on ext4 and XFS only", n.Settings.Root)
	default:
		n.add(Warning, "disk.type", "ext4 and XFS are what is tested", "root %s is on %s", n.Settings.Root, name)
	}
	n.lookAtSpace(st)
	n.lookAtInodes(st)
	lookAtQuota(n)
	dir, release, err := lower.ProbeDir(n.place(), lower.ProbePrefix+"disk-")
	if err != nil {
		n.add(Problem, "disk.writable", "mount it read-write, free space, or set another root",
			"root %s cannot be written to: %v", n.Settings.Root, err)
		return
	}
	defer release()
	defer os.RemoveAll(dir)
	n.lookAtTypes(dir)
	n.lookAtReflink(dir)
}

func (n *node) lookAtSpace(st unix.Statfs_t) {
	// As status has it: without what is reserved for root.
	free, total := float64(st.Bavail)*float64(st.Frsize), float64(st.Blocks-st.Bfree+st.Bavail)*float64(st.Frsize)
	used := 1 - free/total
	const remedy = "dedupctl images tells what removing each image frees; or grow the file system"
	switch text := fmt.Sprintf("%.0f %% of %.1f GB are used, %.1f GB are free", 100*used, total/1e9, free/1e9); {
	case used >= 0.98:
		n.add(Problem, "disk.space", remedy, "%s: pulls will fail", text)
	case used >= fullBytes:
		n.add(Warning, "disk.space", remedy, "%s", text)
	default:
		n.ok("disk.space", "%s", text)
	}
}

// lookAtInodes: the store needs few, but each file that a container writes takes one.
func (n *node) lookAtInodes(st unix.Statfs_t) {
	if st.Files == 0 {
		n.ok("disk.inodes", "the file system has no fixed number of inodes")
		return
	}
	used := 1 - float64(st.Ffree)/float64(st.Files)
	const remedy = "remove containers that wrote many files (the store itself needs few); or give root a new file " +
		"system: XFS has no fixed number"
	switch text := fmt.Sprintf("%.0f %% of %d inodes are used, %d are free", 100*used, st.Files, st.Ffree); {
	case used >= 0.99:
		n.add(Problem, "disk.inodes", remedy, "%s: pulls will fail", text)
	case used >= fullInodes:
		n.add(Warning, "disk.inodes", remedy, "%s", text)
	default:
		n.ok("disk.inodes", "%s", text)
	}
}

// lookAtQuota: what a client asks for with a label, the kernel has to keep.
func lookAtQuota(n *node) {
	if err := quota.Probe(n.place()); err != nil {
		n.add(Info, "disk.quota", "only if containers are to be limited: "+quota.Remedy+", then restart the daemon",
			"the label %s is ignored: %v", snapshots.LabelSnapshotMaxSize, err)
		return
	}
	n.ok("disk.quota", "the label %s limits containers: the file system enforces project quotas",
		snapshots.LabelSnapshotMaxSize)
}

// lookAtTypes: overlayfs needs readdir to tell what an entry is.
func (n *node) lookAtTypes(dir string) {
	const offsetOfType = 18 // of d_type in struct linux_dirent64
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		n.failed("disk.d_type", err)
		return
	}
	f, err := os.Open(dir)
	if err != nil {
		n.failed("disk.d_type", err)
		return
	}
	defer f.Close()
	buf := make([]byte, 4096)
	size, err := unix.Getdents(int(f.Fd()), buf)
	if err != nil || size <= offsetOfType {
		n.failed("disk.d_type", errors.Join(err, errors.New("read a directory")))
		return
	}
	if buf[offsetOfType] == unix.DT_UNKNOWN {
		n.add(Problem, "disk.d_type", "XFS: mkfs.xfs -n ftype=1; other file systems: ext4",
			"directories do not tell the types of their entries, which overlayfs needs")
		return
	}
	n.ok("disk.d_type", "directories tell the types of their entries")
}

func (n *node) lookAtReflink(dir string) {
	from, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		n.failed("disk.reflink", err)
		return
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(dir, "clone"))
	if err != nil {
		n.failed("disk.reflink", err)
		return
	}
	defer to.Close()
	if err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd())); err != nil {
		n.add(Info, "disk.reflink", "XFS has them, if a container's changes to large files matter",
			"no reflinks (%v): a container that changes a file gets a copy of all of it", err)
		return
	}
	n.ok("disk.reflink", "reflinks: a container that changes a file shares what it leaves alone")
}
