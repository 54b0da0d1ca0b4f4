package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// shortage is one resource that runs out.
type shortage struct {
	name string
	// inodes of the disk; 0 for as many as mkfs gives.
	inodes int
	// take takes the resource away, and give back. The pull comes between take and rest, which leaves nothing at all.
	take, rest, give func(w *world, t *testing.T)
	// says is what every error of a client says, one of them.
	says []string
	// fails are the operations that cannot work without the resource. What is not listed works, or fails with the same
	// words.
	fails []string
	// silent operations are not tried: nobody would answer.
	silent []string
	// reboot: the kernel gives the file system back only after it was unmounted.
	reboot bool
	// dead: nothing can be read. How long a container goes on is up to the page cache, which fsck and gc leave emptier.
	dead bool
}

const (
	opPull   = "pull"
	opStart  = "start a container whose chain image is gone"
	opKnown  = "start a container of an image that runs"
	opCommit = "commit a container"
	opRemove = "remove an image"
	opGC     = "gc"
	opRepair = "fsck --repair"
)

var shortages = []shortage{
	{
		name: "blocks", take: func(w *world, t *testing.T) {
			w.fill(t, 3<<20)
		}, rest: func(w *world, t *testing.T) { w.fill(t, 0) }, give: (*world).empty,
		// what the pull leaves for a moment may make room for the others
		says: []string{"no space left on device (free space or inodes on the file system of "}, fails: []string{opPull},
	},
	{
		name: "inodes", inodes: 3000, take: func(w *world, t *testing.T) {
			w.fillInodes(t, 1)
		}, rest: func(w *world, t *testing.T) { w.fillInodes(t, 0) }, give: (*world).empty,
		// what the pull leaves for a moment may make room for the others
		says: []string{"no space left on device (free space or inodes on the file system of "}, fails: []string{opPull},
	},
	{
		name: "inodes of the run directory", take: (*world).fillRun, give: func(w *world, t *testing.T) {
			must(t, os.RemoveAll(filepath.Join(w.run, "fillers")))
		},
		says: []string{"no space left on device (free space or inodes on the file system of /"}, fails: []string{opStart},
	},
	{
		name: "open files", take: func(w *world, t *testing.T) {
			w.limitFiles(t, 3)
		}, rest: func(w *world, t *testing.T) { w.limitFiles(t, 0) },
		give: func(w *world, t *testing.T) { w.limitFiles(t, 1<<16) },
		says: []string{"too many open files (the daemon for "}, fails: []string{opStart}, silent: []string{opGC, opRepair},
	},
	{
		name: "read-only", take: (*world).breakFileSystem, give: func(*world, *testing.T) {}, reboot: true,
		says: []string{"read-only file system (the file system of "}, fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "writes fail", take: func(w *world, _ *testing.T) {
			w.disk.failWrites.Store(true)
		}, give: func(w *world, _ *testing.T) { w.disk.heal() }, reboot: true,
		says:  []string{"input/output error (the disk under ", "read-only file system (the file system of "},
		fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "flushes fail", take: func(w *world, _ *testing.T) {
			w.disk.failSyncs.Store(true)
		}, give: func(w *world, _ *testing.T) { w.disk.heal() }, reboot: true,
		says:  []string{"input/output error (the disk under ", "read-only file system (the file system of "},
		fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "the disk is gone", take: func(w *world,
			_ *testing.T) {
			w.disk.failWrites.Store(true)
			w.disk.failReads.Store(true)
		},
		give: func(w *world, _ *testing.T) { w.disk.heal() }, reboot: true, dead: true,
		says:  []string{"input/output error (the disk under ", "read-only file system (the file system of "},
		fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "some data cannot be written", take: func(w *world, _ *testing.T) {
			w.disk.failMarked.Store(true)
		}, give: func(w *world, _ *testing.T) { w.disk.heal() },
		says: []string{"input/output error (the disk under "}, fails: []string{opPull},
	},
}

// Whatever runs out: clients are told what, and what to do; nothing is left half done; the running container goes on;
// and when it is there again, everything works, without a restart where the kernel lets it.
func TestExhaustion(t *testing.T) {
	for _, s := range shortages {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, s)
			ops := w.operations(t)
			s.take(w, t)
			failed := map[string]bool{}
			try := func(name string, op operation) {
				for _, silent := range s.silent {
					if silent == name {
						failed[name] = true
						return
					}
				}
				out, err := op.do()
				t.Logf("%s: %v %s", name, err, strings.TrimSpace(out))
				if failed[name] = err != nil; err == nil {
					return
				}
				text := out + err.Error()
				for _, want := range s.says {
					if strings.Contains(text, want) {
						return
					}
				}
				t.Errorf("%s: the error does not say what to do: %v %s", name, err, out)
			}
			try(opPull, ops[0])
			if s.rest != nil {
				s.rest(w, t)
			}
			for _, op := range ops[1:] {
				try(op.name, op)
			}
			for _, name := range s.fails {
				if !failed[name] {
					t.Errorf("%s works without: nothing was tried", name)
				}
			}
			if !s.dead {
				w.goesOn(t, false)
			}
			s.give(w, t)
			if s.reboot {
				w.reboot(t)
			} else {
				w.goesOn(t, true)
			}
			for _, op := range ops {
				if !failed[op.name] {
					continue
				}
				if out, err := op.do(); err != nil {
					t.Errorf("%s, when it is back: %v %s", op.name, err, out)
				}
			}
			w.check(t)
		})
	}
}

// operation is something that a client does.
type operation struct {
	name string
	do   func() (string, error)
}

// operations are ready to be done; the pull is first. Each can be done again after it failed.
func (w *world) operations(t *testing.T) []operation {
	t.Helper()
	n, ctx := w.n, w.ctx
	// What the container has written, before the shortage.
	sn := n.Client().SnapshotService(node.Snapshotter)
	ctx, done, err := n.Client().WithLease(ctx)
	must(t, err)
	t.Cleanup(func() { _ = done(context.WithoutCancel(ctx)) })
	chain, err := n.ChainID(ctx, w.refs["known"])
	must(t, err)
	mounts, err := sn.Prepare(ctx, "to-commit", chain)
	must(t, err)
	written := payload("commit", "written", 300_000)
	must(t, n.WithMounts(mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, written.Name), []byte(written.Content), 0o600)
	}))
	for range 1200 { // chain images are built in the background
		if found, _ := filepath.Glob(filepath.Join(n.DedupRoot(), "chains/*.erofs")); len(found) == 4 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if out, err := dedupctl(t, n, "gc", "--chain-images"); err != nil {
		t.Fatal(err, out)
	}
	payloadOf(t, w.n, w.damaged).flip(t)
	fsck(t, n, 3)
	view := 0
	return []operation{
		{opPull, func() (string, error) { return "", n.Pull(ctx, node.Snapshotter, w.refs["next"]) }},
		{opStart, func() (string, error) {
			return n.Run(ctx, node.Snapshotter, w.refs["start"], "sh", "-c", readsStart)
		}},
		{opKnown, func() (string, error) {
			return n.Run(ctx, node.Snapshotter, w.refs["known"], "sh", "-c", `test "$(wc -c < /data/a)" = 9000`)
		}},
		{opCommit, func() (string, error) {
			if _, err := sn.Stat(ctx, "committed"); err != nil {
				if err := sn.Commit(ctx, "committed", "to-commit"); err != nil {
					return "", err
				}
			}
			view++
			key := fmt.Sprint("view-", view)
			mounts, err := sn.View(ctx, key, "committed")
			if err != nil {
				return "", err
			}
			err = n.WithMounts(mounts, func(root string) error {
				b, err := os.ReadFile(filepath.Join(root, written.Name))
				if err == nil && string(b) != written.Content {
					t.Error("what was committed has other bytes")
				}
				return err
			})
			return "", errors.Join(err, sn.Remove(ctx, key))
		}},
		{opRemove, func() (string, error) { return n.Ctr(ctx, "image", "rm", "--sync", w.refs["remove"]) }},
		{opGC, func() (string, error) { return dedupctl(t, n, "gc") }},
		{opRepair, func() (string, error) {
			return dedupctl(t, n, "fsck", "--repair", "--containerd-address", n.Address(), "--hosts-dir", "", "--plain-http")
		}},
	}
}

// check looks at everything when the resource is there again, and all has been done.
func (w *world) check(t *testing.T) {
	t.Helper()
	if out, err := dedupctl(t, w.n, "gc"); err != nil {
		t.Error(err, out)
	}
	if r := fsck(t, w.n, 0); len(r.Findings) > 0 {
		t.Errorf("not whole: %+v", r.Findings)
	}
	sn := w.n.Client().SnapshotService(node.Snapshotter)
	must(t, sn.Walk(w.ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.Contains(info.Name, "extract-") {
			t.Errorf("snapshot %s is left", info.Name)
		}
		return nil
	}))
	delete(w.refs, "remove")
	pullOf := w.refs["next"]
	for name, ref := range w.refs {
		want, ok := w.want[name]
		if !ok {
			pull(t, w.n, "overlayfs", pullOf)
			want = dump(t, w.n, "overlayfs", ref)
		}
		equal(t, want, dump(t, w.n, node.Snapshotter, ref), rootfs.DiffOptions{RootTime: true})
		if _, err := w.n.Run(w.ctx, node.Snapshotter, ref, "true"); err != nil {
			t.Errorf("run %s: %v", name, err)
		}
	}
	objectsUntouched(t, w.n)
}
