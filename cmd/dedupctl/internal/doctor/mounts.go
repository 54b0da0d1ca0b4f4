package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// lookAtMounts looks for mounts that a crash has left.
func (n *node) lookAtMounts(context.Context) {
	table := "/proc/self/mountinfo"
	if n.daemon.Pid != 0 {
		table = fmt.Sprintf("/proc/%d/mountinfo", n.daemon.Pid)
	}
	f, err := os.Open(table)
	if err != nil {
		n.failed("mounts.leaked", err)
		return
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		n.failed("mounts.leaked", err)
		return
	}
	leaked, chains := n.leaks(mounts)
	for _, l := range leaked {
		n.add(Warning, "mounts.leaked", "umount -l "+l.point, "%s: %s", l.point, l.why)
	}
	if n.self != nil {
		for _, point := range n.self.IdleMounts {
			n.add(Info, "mounts.idle", "dedupctl gc unmounts it now; otherwise it is unmounted with its image",
				"%s: a chain image that no container uses is still mounted", point)
		}
	}
	if len(leaked) == 0 {
		n.ok("mounts.leaked", "%d chain images are mounted, and nothing was left behind", chains)
	}
}

type leak struct{ point, why string }

// leaks finds the mounts that nothing needs, and counts those of chain images.
func (n *node) leaks(mounts []*mountinfo.Info) (leaked []leak, chains int) {
	root, run := filepath.Clean(n.Settings.Root), filepath.Clean(n.Settings.RunDir)
	seen := map[string]bool{}
	for _, m := range mounts {
		name := filepath.Base(m.Mountpoint)
		switch {
		case strings.HasPrefix(m.Mountpoint, root+"/probe-"), strings.HasPrefix(m.Mountpoint, run+"/view-"):
			leaked = append(leaked, leak{m.Mountpoint,
				"left by a process that was killed; the daemon's next start takes it away"})
		case filepath.Dir(m.Mountpoint) == run+"/chains" && m.FSType == "erofs":
			chains++
			if seen[m.Mountpoint] {
				leaked = append(leaked, leak{m.Mountpoint, "a chain image is mounted twice at one place"})
			} else if !exists(filepath.Join(root, "chains", name+".erofs")) {
				leaked = append(leaked, leak{m.Mountpoint, "a chain image is mounted that is no more"})
			}
			seen[m.Mountpoint] = true
		case filepath.Dir(m.Mountpoint) == run+"/p" && m.FSType == "erofs":
			if seen[m.Mountpoint] {
				leaked = append(leaked, leak{m.Mountpoint, "a pack is mounted twice at one place"})
			} else if !exists(filepath.Join(root, "packs", name+".erofs")) {
				leaked = append(leaked, leak{m.Mountpoint, "a pack is mounted that is no more"})
			}
			seen[m.Mountpoint] = true
		case m.FSType == "overlay":
			upper := optionOf(m.VFSOptions, "upperdir")
			if filepath.Dir(filepath.Dir(upper)) == root+"/snapshots" && !exists(upper) {
				leaked = append(leaked, leak{m.Mountpoint, "the files of a container are mounted whose snapshot was removed"})
			}
		}
	}
	return leaked, chains
}

// optionOf returns the value of a mount option.
func optionOf(options, name string) string {
	for o := range strings.SplitSeq(options, ",") {
		if value, ok := strings.CutPrefix(o, name+"="); ok {
			return value
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
