package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

func owner(fi os.FileInfo) int {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// place is the root, or what is there of the way to it.
func (n *node) place() string {
	for dir := n.Settings.Root; ; dir = filepath.Dir(dir) {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() || dir == filepath.Dir(dir) {
			return dir
		}
	}
}

// MapsIDs tells why the owners of files in root cannot be mapped for user namespaces here; nil when they can. It needs
// root.
func MapsIDs(root string) error {
	n := node{}
	n.Settings.Root = root
	f, err := lower.Examine(n.place())
	return errors.Join(err, f.Erofs, f.Upper, f.IDMapped)
}

// lookAtKernel tries out mounts as the daemon makes them.
func (n *node) lookAtKernel(context.Context) {
	f, err := lower.Examine(n.place())
	if err != nil {
		n.add(Problem, "kernel.probe", "the message names what is missing", "mounts could not be tried out in %s: %v",
			n.place(), err)
		return
	}
	n.sayKernel(f)
	if n.Self != nil && f.Erofs == nil && f.Upper == nil {
		sayUserNamespace(n, f.UserNamespace(n.place(), n.Self))
	}
	sayMode(n, f)
}

// sayUserNamespace says whether programs in containers that make user namespaces can mount overlays. No mode follows:
// containerd mounts containers' own overlays outside of their user namespaces.
func sayUserNamespace(n *node, err error) {
	if err != nil {
		n.add(Info, "kernel.user-namespaces", "Linux 5.11 or newer, and the sysctl user.max_user_namespaces not at 0",
			"programs in a user namespace cannot mount overlays (%s): rootless builders in containers (BuildKit, Podman) copy "+
				"files instead, or need fuse-overlayfs", strings.TrimPrefix(err.Error(), "dedupctl: "))
		return
	}
	n.ok("kernel.user-namespaces", "programs in a user namespace can mount overlays over a container's files (rootless "+
		"BuildKit and Podman)")
}

// sayKernel says what a kernel with these features can do.
func (n *node) sayKernel(f lower.Features) {
	switch {
	case f.Erofs != nil:
		n.add(Problem, "kernel.erofs",
			"modprobe erofs; else a kernel with CONFIG_EROFS_FS. Before Linux 6.12 loop devices are needed too (modprobe loop)",
			"EROFS images over packs cannot be mounted (Linux 5.16 or newer has them): %v", f.Erofs)
	case f.Counted != nil:
		n.add(Info, "kernel.erofs", "a kernel that does not count them (most do not)", "EROFS is mounted from loop devices, "+
			"one for each image that runs: this kernel counts an EROFS file as a stacked file system, and a container could "+
			"mount no overlay (%v)", f.Counted)
	case f.Loop:
		n.add(Info, "kernel.erofs", "Linux 6.12 or newer needs none (where root is not on tmpfs or overlayfs)",
			"EROFS is mounted from loop devices, one for each image that runs, and for each of its packs")
	default:
		n.ok("kernel.erofs", "EROFS is mounted straight from its files")
	}
	if f.Upper != nil {
		n.add(Problem, "kernel.upper", "put root on ext4, or on XFS with ftype=1; not on overlayfs, NFS or FUSE",
			"%s cannot hold what containers write: %v", n.place(), f.Upper)
	} else {
		n.ok("kernel.upper", "overlayfs can write to the file system of root")
	}
	switch {
	case f.Erofs != nil || f.Upper != nil:
	case f.Dense != nil:
		n.add(Info, "kernel.dense-packs", "Linux 6.4 or newer, or 6.1 from 6.1.115 on", "packs have blocks of 4 KiB, since "+
			"this kernel does not mount smaller ones (%v): packs take about a tenth more of the disk. Dense packs that came "+
			"from another kernel are copied", f.Dense)
	default:
		n.ok("kernel.dense-packs", "packs have blocks of 512 bytes: what small files take of the disk is rounded up to these")
	}
	switch {
	case f.Erofs != nil || f.Upper != nil:
	case f.DataOnly != nil:
		n.add(Info, "kernel.data-only", "a kernel of Linux 6.5 or newer (Debian 13, Ubuntu 24.04 and later have one)",
			"overlayfs does not serve data-only lower layers (%v): page_cache is private, and only containers of one image "+
				"share memory", f.DataOnly)
	case f.Metacopy:
		n.add(Info, "kernel.data-only", "Linux 6.16 or newer does without",
			"overlayfs serves data-only lower layers, with metacopy=on")
	default:
		n.ok("kernel.data-only", "overlayfs serves data-only lower layers, without metacopy")
	}
	switch {
	case f.Erofs != nil || f.Upper != nil:
	case f.Nested != nil:
		n.add(Warning, "kernel.nested", "root on a file system that is not itself stacked; or another kernel",
			"containers cannot mount overlays over their own files (Docker in Docker, kind): %v", f.Nested)
	default:
		n.ok("kernel.nested", "containers can mount overlays over their own files (Docker in Docker, kind)")
	}
	if f.Erofs == nil {
		if f.IDMapped != nil {
			n.add(Info, "kernel.id-mapped", "Linux 5.19 or newer",
				"overlays over ID-mapped chain images do not work (%v): containerd copies all files for each container "+
					"in a user namespace", f.IDMapped)
		} else {
			n.ok("kernel.id-mapped", "overlays over ID-mapped chain images work: user namespaces need no copies")
		}
	}
	lookAtSELinux(n)
	n.idMapped = f.Erofs == nil && f.Upper == nil && f.IDMapped == nil
	lookAtVerity(n, f.Verity)
	if f.Punch != nil {
		n.add(Info, "kernel.hole-punching", "", "the file system of root makes no holes in files (%v): room that an "+
			"ingest reserved in vain in a pack comes back when packs are merged", f.Punch)
	} else {
		n.ok("kernel.hole-punching", "the file system of root makes holes in files")
	}
}

// sayMode says what follows from what was found, and what a newer kernel would add.
func sayMode(n *node, f lower.Features) {
	if f.Erofs != nil || f.Upper != nil {
		n.add(Problem, "kernel.mode", "fix the other problems first", "no mode: this node cannot serve images")
		return
	}
	var newer []string
	if f.Dense != nil {
		newer = append(newer, "6.4: denser packs")
	}
	if f.DataOnly != nil {
		newer = append(newer, "6.5: memory shared among images")
	}
	if f.Loop && f.Counted == nil {
		newer = append(newer, "6.12: no loop devices")
	}
	if f.DataOnly == nil && f.Metacopy {
		newer = append(newer, "6.16: data-only lower layers without metacopy")
	}
	if len(newer) == 0 {
		n.ok("kernel.mode", "mode: %s. A newer kernel would add nothing", f.Mode())
		return
	}
	n.add(Info, "kernel.mode", "", "mode: %s (unless page_cache says otherwise). A newer kernel would add, with Linux %s",
		f.Mode(), strings.Join(newer, "; with Linux "))
}

func lookAtVerity(n *node, missing error) {
	if missing != nil {
		n.add(Info, "kernel.fs-verity", "",
			"no fs-verity here (%v): what the disk damages is found by dedupctl fsck, not by the read that meets it", missing)
		return
	}
	n.ok("kernel.fs-verity", "the file system has fs-verity")
}

func fileSystem(magic int64) string {
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC:           "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse",
		0x2fc12fc1:            "zfs",
		unix.F2FS_SUPER_MAGIC: "f2fs", 0xca451a4e: "bcachefs",
	}
	if name := names[magic]; name != "" {
		return name
	}
	return fmt.Sprintf("a file system of type %#x", magic)
}
