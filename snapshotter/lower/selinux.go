package lower

import (
	"sync"

	"golang.org/x/sys/unix"
)

// A container's processes read an image's files in three ways, each with a label:
//
//   - A container's own overlay. containerd mounts it with the container's label (context=): it counts for all in it.
//   - A mounted image by itself: views and image volumes are bind mounts, for which containerd names no label. So the
//     mount of the image gets one. The files' own do not count: an image's builder has no say.
//   - The image's file, and the packs: where the kernel mounts EROFS from files, who reads a file of an image must
//     be allowed to read these (seen on Linux 6.12). They have the label of their directory, so root has to have one
//     (docs/selinux.md).

// fileLabels are those that engines mount containers' file systems with, as reference policy and container-selinux
// have them: of no container (no categories), so that all may read. There is a type for read-only files, too; Debian's
// policy does not let an engine mount with it, or remount. For policies without levels there is one without.
var fileLabels = []string{"system_u:object_r:container_file_t:s0", "system_u:object_r:container_file_t"}

// MountContext is the SELinux label of mounted images. "" where SELinux is off, or its policy knows of no containers.
var MountContext = sync.OnceValue(func() string {
	for _, label := range fileLabels {
		if takes(label) {
			return label
		}
	}
	return ""
})

// takes tells whether the daemon may mount with a label. It is tried with a tmpfs that is mounted nowhere: a policy may
// keep a daemon that it confines from asking (selinuxfs).
func takes(label string) bool {
	fd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.FsconfigSetString(fd, "context", label) == nil && unix.FsconfigCreate(fd) == nil
}

// labelled adds the label to the options of a mount, quoted as containerd has it: levels may have commas.
func labelled(options []string) []string {
	if label := MountContext(); label != "" {
		return append(options[:len(options):len(options)], `context="`+label+`"`)
	}
	return options
}
