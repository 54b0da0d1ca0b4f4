package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// A part of the disk cannot be read for a while: whoever reads it is told, fsck names the image, the others go on. When
// it can be read again, the image is served without more ado, whether the daemon was started anew meanwhile or not, and
// whether the blob is at hand or not.
func TestReadErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t, shortage{name: "reads"})
	n := w.n
	pull(t, n, node.Snapshotter, w.refs["next"])
	want := dump(t, n, node.Snapshotter, w.refs["next"])
	forget(t, n, w.ctx, w.layers)
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			pack := payloadOf(t, n, w.marked).path
			dropCache(t, n)
			w.disk.failMarked.Store(true)
			out, err := n.Run(w.ctx, node.Snapshotter, w.refs["next"], "sh", "-c", "md5sum /marked 2>&1")
			if err == nil || !strings.Contains(err.Error(), "nput/output error") {
				t.Errorf("reading what cannot be read: %q, %v", out, err)
			}
			r := fsck(t, n, 3, "--repair", "--no-fetch")
			if got := r.images(); len(got) != 1 || got[0] != w.refs["next"] || !strings.Contains(fmt.Sprint(r.Findings), pack) {
				t.Errorf("fsck finds %+v", r)
			}
			if restart {
				must(t, n.StopDaemon())
				must(t, n.StartDaemon(w.ctx))
			}
			if out, err := n.Run(w.ctx, node.Snapshotter, w.refs["next"], "true"); err == nil ||
				!strings.Contains(err.Error(), "is missing or has other bytes") {
				t.Errorf("a container of the damaged image: %q, %v", out, err)
			}
			if out, err := n.Run(w.ctx, node.Snapshotter, w.refs["start"], "sh", "-c", readsStart); err != nil {
				t.Errorf("a container of another image: %q, %v", out, err)
			}
			w.goesOn(t, true)
			w.disk.heal()
			if out, err := n.Run(w.ctx, node.Snapshotter, w.refs["next"], "true"); err != nil {
				t.Errorf("when it can be read again: %q, %v", out, err)
			}
			equal(t, want, dump(t, n, node.Snapshotter, w.refs["next"]), rootfs.DiffOptions{})
			if r := fsck(t, n, 0); len(r.Findings) > 0 {
				t.Errorf("not whole: %+v", r.Findings)
			}
		})
	}
}

// The kernel kills the daemon in the middle of a pull, for want of memory. The running container does not notice; with
// a new daemon that has more, the store is whole and the pull goes through.
func TestNoMemory(t *testing.T) {
	t.Parallel()
	w := newWorld(t, shortage{name: "memory"})
	var layers []*image.Layer
	for i := range 4 {
		layers = append(layers, layer(t, payload("memory", fmt.Sprint("big-", i), 12<<20)))
	}
	reg := startRegistry(t)
	w.refs["next"] = push(t, reg, "big:1", append([]*image.Layer{busybox(t)}, layers...)...)
	group, err := memoryGroup(t)
	must(t, err)
	pids := w.n.Pids()
	daemon := pids[len(pids)-1]
	must(t, os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Append(nil, daemon), 0o600))
	err = w.n.Pull(w.ctx, node.Snapshotter, w.refs["next"])
	t.Logf("pull: %v", err)
	for tries := 0; err != nil && len(w.n.Pids()) != 1 && tries < 1200; tries++ { // containerd hears of it first
		time.Sleep(50 * time.Millisecond)
	}
	if err == nil || len(w.n.Pids()) != 1 {
		t.Fatalf("the daemon has done with less memory than it needs: %v, %v", err, w.n.Pids())
	}
	w.goesOn(t, true)
	must(t, w.n.StartDaemon(w.ctx))
	if r := fsck(t, w.n, 0); len(r.Findings) > 0 {
		t.Errorf("not whole: %+v", r.Findings)
	}
	pull(t, w.n, node.Snapshotter, w.refs["next"])
	w.check(t)
}

// memoryGroup is a cgroup in which a daemon does not get far.
func memoryGroup(t *testing.T) (dir string, err error) {
	t.Helper()
	const limit = 12 << 20
	name := node.NewID("dedup-memory")
	for _, try := range []struct{ parent, file string }{
		{"/sys/fs/cgroup", "memory.max"},
		{"/sys/fs/cgroup/memory", "memory.limit_in_bytes"},
	} {
		dir = filepath.Join(try.parent, name)
		if err = os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		remove := func() error {
			var err error
			for range 1200 { // a process that was killed leaves it a moment later
				if err = os.Remove(dir); err == nil {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			return err
		}
		if _, err = os.Stat(filepath.Join(dir, try.file)); err == nil {
			if err = os.WriteFile(filepath.Join(dir, try.file), fmt.Append(nil, limit), 0o600); err == nil {
				t.Cleanup(func() {
					if err := remove(); err != nil {
						t.Error(err)
					}
				})
				return dir, nil
			}
		}
		err = errors.Join(err, remove())
	}
	return "", fmt.Errorf("%w: a cgroup that limits memory: %w", node.ErrMissing, err)
}
