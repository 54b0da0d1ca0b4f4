package integration

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

// A container that ctr runs with a maximum size stops at it, after a restart of the daemon and in a new task too; one
// beside it does not; and when it is gone, nothing is limited and nothing charged.
func TestMaxSize(t *testing.T) {
	for fs, args := range map[string][]string{
		"xfs": {"-q"}, "ext4": {"-q", "-F", "-O", "project,quota", "-E", "quotatype=prjquota"},
	} {
		t.Run(fs, func(t *testing.T) {
			n := startNode(t, exact)
			mountFileSystem(t, n.DedupRoot(), fs, args, "prjquota")
			if err := quota.Probe(n.DedupRoot()); err != nil {
				t.Skipf("this kernel has no project quotas of %s: %v", fs, err)
			}
			ctx := testContext(t)
			must(t, n.StartDaemon(ctx))
			r := startRegistry(t)
			ref := push(t, r, "app:1", busybox(t), layer(t, payload("max size", "file", 100_000)))
			pull(t, n, node.Snapshotter, ref)
			const fill = "dd if=/dev/zero of=/one bs=64k count=160 2>&1; cat /file > /two; df -k / | tail -1; wc -c < /one"
			flags := []string{"--snapshotter-label", "containerd.io/snapshot/max-size=4194304"}
			out, err := n.RunWith(ctx, node.Snapshotter, flags, ref, "sh", "-c", fill)
			t.Logf("limited: %q", out)
			if err != nil || !strings.Contains(out, "No space left") && !strings.Contains(out, "quota exceeded") ||
				!strings.Contains(out, " 4096 ") {
				t.Errorf("limited: %v", err)
			}
			if out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", fill); err != nil ||
				!strings.HasSuffix(out, fmt.Sprintln(160*64<<10)) {
				t.Errorf("beside it: %q, %v", out, err)
			}
			args := append([]string{"run", "--detach", "--snapshotter", node.Snapshotter, "--runc-root", n.Dir() + "/runc"},
				flags...)
			_, err = n.Ctr(ctx, append(args, ref, "stays", "sleep", "1000")...)
			must(t, err)
			must(t, errors.Join(n.StopDaemon(), n.StartDaemon(ctx)))
			if out, err := n.Exec(ctx, "stays", "sh", "-c", fill); err != nil || strings.HasSuffix(out,
				fmt.Sprintln(160*64<<10)) {
				t.Errorf("after a restart of the daemon: %q, %v", out, err)
			}
			must(t, n.RemoveContainer(ctx, "stays"))
			_, err = n.RunWith(ctx, node.Snapshotter, []string{"--snapshotter-label", "containerd.io/snapshot/max-size=4M"}, ref,
				"true")
			if err == nil || !strings.Contains(err.Error(), `label containerd.io/snapshot/max-size = "4M": want a number`) {
				t.Errorf("a label that is no number: %v", err)
			}
			_, err = n.Ctr(ctx, "image", "rm", "--sync", ref)
			must(t, err)
			waitForNothing(t, n)
		})
	}
}
