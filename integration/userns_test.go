package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A container in a user namespace sees the owners that it sees with overlayfs. The daemon does not map
// ids itself, so containerd changes the owner of each file in a snapshot of its own for the mapping; the
// store and containers without one keep the image's owners.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	for _, dir := range []string{n.Dir(), filepath.Join(n.Dir(), "s")} { // root of the namespace has to get to its root file system
		must(t, os.Chmod(dir, 0o711))
	}
	owned := image.File("app/owned", "owned")
	owned.UID, owned.GID = 7, 8
	ref := push(t, r, "userns:1", busybox(t), layer(t, image.Dir("app"), owned, payload("userns", "app/file", 9000)))
	see := func(snapshotter string, flags ...string) string {
		pull(t, n, snapshotter, ref)
		args := append([]string{"run", "--rm", "--snapshotter", snapshotter, "--runc-root", n.Dir() + "/runc"}, flags...)
		out, err := n.Ctr(ctx, append(args, ref, node.NewID("userns"), "sh", "-c",
			"cat /proc/self/uid_map | tr -s ' '; ls -ln /app; cat /app/file | sha256sum; echo new > /app/owned; cat /app/owned")...)
		must(t, err)
		return out
	}
	mapped := []string{"--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"}
	want := see("overlayfs", mapped...)
	if !strings.Contains(want, "100000") || !strings.Contains(want, " 7 ") {
		t.Fatalf("nothing is mapped here: %s", want)
	}
	if diff := cmp.Diff(want, see(node.Snapshotter, mapped...)); diff != "" {
		t.Errorf("in a user namespace (-overlayfs +dedup):\n%s", diff)
	}
	if diff := cmp.Diff(see("overlayfs"), see(node.Snapshotter)); diff != "" {
		t.Errorf("without one, afterwards (-overlayfs +dedup):\n%s", diff)
	}
	objectsUntouched(t, n)
}
