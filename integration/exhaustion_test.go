package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/disk"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
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
	// fails are the operations that cannot work without the resource. What is not listed works, or fails with the same words.
	fails []string
	// silent operations are not tried: nobody would answer.
	silent []string
	// reboot: the kernel gives the file system back only after it was unmounted.
	reboot bool
}

const (
	opPull   = "pull"
	opStart  = "start a container whose chain image is gone"
	opCommit = "commit a container"
	opRemove = "remove an image"
	opGC     = "gc"
	opRepair = "fsck --repair"
)

var shortages = []shortage{
	{
		name: "blocks", take: func(w *world, t *testing.T) { w.fill(t, 3<<20) }, rest: func(w *world, t *testing.T) { w.fill(t, 0) }, give: (*world).empty,
		says: []string{"no space left on device (free space or inodes on the file system of "}, fails: []string{opPull},
	},
	{
		name: "inodes", inodes: 3000, take: func(w *world, t *testing.T) { w.fillInodes(t, 100) }, rest: func(w *world, t *testing.T) { w.fillInodes(t, 0) }, give: (*world).empty,
		says: []string{"no space left on device (free space or inodes on the file system of "}, fails: []string{opPull, opStart},
	},
	{
		name: "open files", take: func(w *world, t *testing.T) { w.limitFiles(t, 3) }, rest: func(w *world, t *testing.T) { w.limitFiles(t, 0) },
		give: func(w *world, t *testing.T) { w.limitFiles(t, 1<<16) },
		says: []string{"too many open files (the daemon for "}, fails: []string{opPull}, silent: []string{opGC, opRepair},
	},
	{
		name: "read-only", take: (*world).breakFileSystem, give: func(*world, *testing.T) {}, reboot: true,
		says: []string{"read-only file system (the file system of "}, fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "writes fail", take: func(w *world, _ *testing.T) { w.disk.failWrites.Store(true) }, give: func(w *world, _ *testing.T) { w.disk.heal() }, reboot: true,
		says: []string{"input/output error (the disk under ", "read-only file system (the file system of "}, fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "flushes fail", take: func(w *world, _ *testing.T) { w.disk.failSyncs.Store(true) }, give: func(w *world, _ *testing.T) { w.disk.heal() }, reboot: true,
		says: []string{"input/output error (the disk under ", "read-only file system (the file system of "}, fails: []string{opPull, opStart, opCommit, opRepair},
	},
	{
		name: "some data cannot be written", take: func(w *world, _ *testing.T) { w.disk.failMarked.Store(true) }, give: func(w *world, _ *testing.T) { w.disk.heal() },
		says: []string{"input/output error (the disk under "}, fails: []string{opPull},
	},
}

// Whatever runs out: clients are told what, and what to do; nothing is left half done; the running container goes on; and when it is there
// again, everything works, without a restart where the kernel lets it.
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
			w.goesOn(t, false)
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

// world is a node whose store lies on a small disk, with images, a running container, and things that are about to be done.
type world struct {
	n    *node.Node
	ctx  context.Context
	disk *faultyDisk
	path string // of the loop device's file
	refs map[string]string
	want map[string]rootfs.Tree
	// container is the running one; it writes to rounds.
	container, rounds string
	// damaged is the file of a damaged object.
	damaged string
}

const diskSize = 96 << 20

func newWorld(t *testing.T, s shortage) *world {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	w := &world{ctx: ctx, refs: map[string]string{}, want: map[string]rootfs.Tree{}}
	w.makeDisk(t, s.inodes)
	w.n = startNode(t, node.Options{Daemon: map[string]any{"reserve_space": "0", "reserve_inodes": "0"}})
	w.mountDisk(t)
	must(t, w.n.StartDaemon(ctx))

	reg, bb, data := startRegistry(t), busybox(t), dataLayer(t)
	many := []image.Entry{image.Dir("many")}
	for i := range 400 {
		many = append(many, payload(s.name, fmt.Sprint("many/", i), 15_000))
	}
	marked := payload(s.name, "marked", 2<<20)
	marked.Content = strings.Repeat(marked.Content[:4000], 600) + strings.Repeat(diskMark, 1000) + marked.Content
	w.refs["known"] = push(t, reg, "known:1", bb, data)
	w.refs["start"] = push(t, reg, "start:1", bb, layer(t, payload(s.name, "start", 50_000)))
	w.refs["remove"] = push(t, reg, "remove:1", bb, layer(t, payload(s.name, "remove", 50_000)))
	hurt := payload(s.name, "hurt", 50_000)
	w.refs["repair"] = push(t, reg, "repair:1", bb, layer(t, hurt))
	for name, ref := range w.refs {
		pull(t, w.n, node.Snapshotter, ref)
		w.want[name] = dump(t, w.n, node.Snapshotter, ref)
	}
	w.refs["next"] = push(t, reg, "next:1", bb, data, layer(t, many...), layer(t, marked))
	w.damaged = objectOf(w.n, hurt)

	w.rounds = filepath.Join(w.n.Dir(), "tmp/rounds")
	must(t, os.Mkdir(w.rounds, 0o755))
	w.container = node.NewID("reader")
	_, err := w.n.Ctr(ctx, "run", "--detach", "--snapshotter", node.Snapshotter, "--runc-root", filepath.Join(w.n.Dir(), "runc"),
		"--mount", "type=bind,src="+w.rounds+",dst=/rounds,options=rbind:rw", w.refs["known"], w.container, "sh", "-c", patientReader)
	must(t, err)
	w.goesOn(t, true)
	return w
}

// patientReader counts what it read right, read wrong, and wrote.
const patientReader = `all() { cat /data/* /bin/busybox | md5sum; }
want=$(all); while :; do
	if [ "$(all)" = "$want" ]; then printf . >> /rounds/read; else printf . >> /rounds/wrong; fi
	if echo x > /own; then printf . >> /rounds/written; fi; sleep 0.02
done`

// goesOn fails the test unless the running container reads on, and writes on if it shall.
func (w *world) goesOn(t *testing.T, writes bool) {
	t.Helper()
	files := []string{"read"}
	if writes {
		files = append(files, "written")
	}
	size := func(name string) int64 {
		fi, err := os.Stat(filepath.Join(w.rounds, name))
		if err != nil {
			return 0
		}
		return fi.Size()
	}
	for _, name := range files {
		for start, deadline := size(name), time.Now().Add(20*time.Second); size(name) < start+3; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the running container: %s stays at %d", name, start)
			}
		}
	}
	if n := size("wrong"); n > 0 {
		t.Fatalf("the running container has read other bytes, or nothing, %d times", n)
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
	for range 100 { // chain images are built in the background
		if found, _ := filepath.Glob(filepath.Join(n.DedupRoot(), "chains/*.erofs")); len(found) == 4 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if out, err := dedupctl(t, n, "gc", "--chain-images"); err != nil {
		t.Fatal(err, out)
	}
	flipByte(t, w.damaged)
	fsck(t, n, 3)
	view := 0
	return []operation{
		{opPull, func() (string, error) { return "", n.Pull(ctx, node.Snapshotter, w.refs["next"]) }},
		{opStart, func() (string, error) {
			out, err := n.Run(ctx, node.Snapshotter, w.refs["start"], "wc", "-c", "/start")
			if err == nil && out != "50000 /start\n" {
				t.Errorf("a container reads %q", out)
			}
			return out, err
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

// reboot is what it takes to get a file system back that the kernel has given up: everything that uses it ends.
func (w *world) reboot(t *testing.T) {
	t.Helper()
	c, err := w.n.Client().LoadContainer(w.ctx, w.container)
	must(t, err)
	task, err := c.Task(w.ctx, nil)
	must(t, err)
	_, err = task.Delete(w.ctx, client.WithProcessKill)
	must(t, err)
	must(t, w.n.KillDaemon())
	must(t, node.UnmountBelow(w.n.Dir()))
	out, err := exec.Command("e2fsck", "-f", "-p", w.path).CombinedOutput()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 1 {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	w.mountDisk(t)
	must(t, w.n.StartDaemon(w.ctx))
}

// faultyDisk is a file that fails on demand.
type faultyDisk struct {
	*os.File
	failWrites, failSyncs, failReads, failMarked atomic.Bool
}

// diskMark is in what failMarked fails to write, or to read.
const diskMark = "this does not get to the disk or from it "

var errFault = errors.New("a fault of the disk")

func (d *faultyDisk) heal() {
	for _, b := range []*atomic.Bool{&d.failWrites, &d.failSyncs, &d.failReads, &d.failMarked} {
		b.Store(false)
	}
}

func (d *faultyDisk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.File.ReadAt(p, off)
	if d.failReads.Load() || d.failMarked.Load() && bytes.Contains(p[:n], []byte(diskMark)) {
		return 0, errFault
	}
	return n, err
}

func (d *faultyDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.failWrites.Load() || d.failMarked.Load() && bytes.Contains(p, []byte(diskMark)) {
		return 0, errFault
	}
	return d.File.WriteAt(p, off)
}

func (d *faultyDisk) Sync() error {
	if d.failSyncs.Load() {
		return errFault
	}
	return nil
}

func (d *faultyDisk) Size() (int64, error) {
	fi, err := d.Stat()
	return fi.Size(), err
}

// makeDisk makes an ext4 on a disk that can fail.
func (w *world) makeDisk(t *testing.T, inodes int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	must(t, node.Require(w.ctx, func(s string) { t.Log(s) }, node.Command{Name: "mkfs.ext4", Packages: "e2fsprogs"}))
	f, err := os.CreateTemp(t.TempDir(), "disk")
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	must(t, f.Truncate(diskSize))
	args := []string{"-q", "-F", "-b", "4096", "-E", "nodiscard"}
	if inodes > 0 {
		args = append(args, "-N", fmt.Sprint(inodes))
	}
	if out, err := exec.Command("mkfs.ext4", append(args, f.Name())...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	w.disk = &faultyDisk{File: f}
	path, stop, err := disk.Serve(t.TempDir(), w.disk)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		w.disk.heal()
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	w.path = path
}

// mountDisk puts the disk where the daemon's store is; the node unmounts it.
func (w *world) mountDisk(t *testing.T) {
	t.Helper()
	m := mount.Mount{Type: "ext4", Source: w.path, Options: []string{"loop", "errors=remount-ro"}}
	must(t, m.Mount(w.n.DedupRoot()))
	// A request that is written in part the loop driver takes for written: none may be more than one write to FUSE.
	must(t, os.WriteFile(filepath.Join("/sys/block", w.device(t), "queue/max_sectors_kb"), []byte("512"), 0o600))
}

// device is the loop device, such as "loop0".
func (w *world) device(t *testing.T) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(w.n.DedupRoot(), &st))
	path, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	must(t, err)
	return filepath.Base(path)
}

// fill leaves about so many bytes on the disk.
func (w *world) fill(t *testing.T, leave int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(w.n.DedupRoot(), "filler"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer f.Close()
	for _, size := range []int64{1 << 20, 4096, 1} {
		for {
			var st unix.Statfs_t
			must(t, unix.Fstatfs(int(f.Fd()), &st))
			if leave > 0 && int64(st.Bfree)*st.Bsize < leave+size {
				return
			}
			if _, err = f.Write(bytes.Repeat([]byte("x"), int(size))); errors.Is(err, unix.ENOSPC) {
				break
			}
			must(t, err)
		}
	}
	if err := f.Sync(); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// fillInodes leaves so many inodes.
func (w *world) fillInodes(t *testing.T, leave uint64) {
	t.Helper()
	dir := filepath.Join(w.n.DedupRoot(), "fillers")
	must(t, os.MkdirAll(dir, 0o700))
	for i := 0; ; i++ {
		var st unix.Statfs_t
		must(t, unix.Statfs(dir, &st))
		if st.Ffree <= leave {
			return
		}
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(leave, "-", i)), nil, 0o600))
	}
}

// empty takes away what fill and fillInodes made.
func (w *world) empty(t *testing.T) {
	t.Helper()
	must(t, os.RemoveAll(filepath.Join(w.n.DedupRoot(), "filler")))
	must(t, os.RemoveAll(filepath.Join(w.n.DedupRoot(), "fillers")))
}

// limitFiles lets the daemon open so many files more.
func (w *world) limitFiles(t *testing.T, more uint64) {
	t.Helper()
	pids := w.n.Pids()
	pid := pids[len(pids)-1]
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	var limit unix.Rlimit
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit))
	limit.Cur = min(uint64(len(files))+more, limit.Max)
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil))
}

// breakFileSystem lets the kernel find an error in the file system, and turn it read-only.
func (w *world) breakFileSystem(t *testing.T) {
	t.Helper()
	trigger := filepath.Join("/sys/fs/ext4", w.device(t), "trigger_fs_error")
	if _, err := os.Stat(trigger); err != nil {
		t.Skipf("this kernel cannot be told to find an error: %v", err)
	}
	must(t, os.WriteFile(trigger, []byte("1"), 0o200))
}
