package doctor

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// storeType is what deploy/selinux/label.sh has root labelled with: files that all containers may read.
const storeType = "container_ro_file_t"

// lookAtSELinux: the label of a mounted image is the daemon's to give, that of the files in root the policy's.
func lookAtSELinux(n *node) {
	context := lower.MountContext()
	enforce, err := os.ReadFile("/sys/fs/selinux/enforce")
	switch {
	case context == "" && err != nil:
		n.ok("kernel.selinux", "SELinux is off")
		return
	case context == "":
		n.add(Warning, "kernel.selinux", "install the policy for containers (Fedora: container-selinux; Debian: "+
			"selinux-policy-default)", "SELinux is on, and its policy does not know the type container_file_t: images are "+
			"mounted without a label, and confined containers cannot read them")
		return
	}
	mode := "permissive"
	if strings.TrimSpace(string(enforce)) == "1" {
		mode = "enforcing"
	}
	for _, dir := range []string{n.place(), filepath.Join(n.place(), "packs"), filepath.Join(n.place(), "chains")} {
		value := make([]byte, 4096)
		size, err := unix.Getxattr(dir, "security.selinux", value)
		if err != nil {
			continue // not there yet
		}
		if label := strings.TrimRight(string(value[:size]), "\x00"); typeOf(label) != storeType {
			n.add(Warning, "kernel.selinux", "deploy/selinux/label.sh, then restart the daemon (docs/selinux.md)",
				"SELinux is %s, and %s has the label %s, not of type %s: confined containers cannot read images where EROFS is "+
					"mounted from files", mode, dir, label, storeType)
			return
		}
	}
	n.ok("kernel.selinux", "SELinux is %s: images are mounted as %s, and root is labelled", mode, context)
}

// typeOf returns the type of a label, user:role:type:level.
func typeOf(label string) string {
	if parts := strings.SplitN(label, ":", 4); len(parts) > 2 {
		return parts[2]
	}
	return ""
}
