package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/disk"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// world is a node whose store lies on a small disk, with images, a running container, and things that are about to be
// done.
type world struct {
	n    *node.Node
	ctx  context.Context
	disk *faultyDisk
	path string // of the loop device's file
	run  string // the daemon's run directory, on a tmpfs
	refs map[string]string
	want map[string]rootfs.Tree
	// container is the running one; it writes to rounds.
	container, rounds string
	// damaged is a payload that gets damaged, marked one which holds diskMark, in the image next.
	damaged, marked string
	// layers are all that next has.
	layers []*image.Layer
}

const diskSize = 96 << 20

func newWorld(t *testing.T, s shortage) *world {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	w := &world{ctx: ctx, refs: map[string]string{}, want: map[string]rootfs.Tree{}}
	w.makeDisk(t, s.inodes)
	w.run = t.TempDir()
	w.mountRun(t)
	t.Cleanup(func() { must(t, node.UnmountBelow(w.run)) })
	w.n = startNode(t, node.Options{Daemon: map[string]any{"reserve_space": "0", "reserve_inodes": "0", "run_dir": w.run}})
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
	w.layers = []*image.Layer{bb, data, layer(t, many...), layer(t, marked)}
	w.refs["next"] = push(t, reg, "next:1", w.layers...)
	w.damaged, w.marked = hurt.Content, marked.Content

	w.rounds = filepath.Join(w.n.Dir(), "tmp/rounds")
	must(t, os.Mkdir(w.rounds, 0o755))
	w.container = node.NewID("reader")
	_, err := w.n.Ctr(ctx, "run", "--detach", "--snapshotter", node.Snapshotter, "--runc-root",
		filepath.Join(w.n.Dir(), "runc"),
		"--mount", "type=bind,src="+w.rounds+",dst=/rounds,options=rbind:rw", w.refs["known"], w.container, "sh", "-c",
		patientReader)
	must(t, err)
	w.goesOn(t, true)
	return w
}

// readsStart fails unless the file of the image start is whole.
const readsStart = `test "$(wc -c < /start)" = 50000`

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
		for start, deadline := size(name),
			time.Now().Add(2*time.Minute); size(name) < start+3; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the running container: %s stays at %d", name, start)
			}
		}
	}
	if n := size("wrong"); n > 0 {
		t.Fatalf("the running container has read other bytes, or nothing, %d times", n)
	}
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
	must(t, errors.Join(node.UnmountBelow(w.run), node.UnmountBelow(w.n.Dir())))
	w.mountRun(t)
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

// mountRun puts a small tmpfs where the daemon mounts chain images.
func (w *world) mountRun(t *testing.T) {
	t.Helper()
	must(t, unix.Mount("tmpfs", w.run, "tmpfs", 0, "mode=0700,size=1m,nr_inodes=100"))
}

// fillRun leaves no inode in the run directory.
func (w *world) fillRun(t *testing.T) {
	t.Helper()
	dir := filepath.Join(w.run, "fillers")
	must(t, os.Mkdir(dir, 0o700))
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600)
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		must(t, err)
	}
}

// mountDisk puts the disk where the daemon's store is; the node unmounts it.
func (w *world) mountDisk(t *testing.T) {
	t.Helper()
	m := mount.Mount{Type: "ext4", Source: w.path, Options: []string{"loop", "errors=remount-ro"}}
	must(t, m.Mount(w.n.DedupRoot()))
	limitRequests(t, w.n.DedupRoot())
}

// limitRequests keeps each of the loop device's requests within one write to FUSE: the driver takes one that is written
// in part for written.
func limitRequests(t *testing.T, at string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join("/sys/block", device(t, at), "queue/max_sectors_kb"), []byte("512"), 0o600))
}

// device is the loop device of a file system, such as "loop0".
func device(t *testing.T, at string) string {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(at, &st))
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
	open := openFiles(t, pid)
	for same := 0; same < 5; { // what opens and closes files in the background has come to its end
		time.Sleep(20 * time.Millisecond)
		now := openFiles(t, pid)
		if same++; !slices.Equal(now, open) {
			open, same = now, 0
		}
	}
	free, lowest := uint64(0), uint64(0) // the limit is one of numbers, of which some below the highest are free
	for ; free < more || slices.Contains(open, lowest); lowest++ {
		if !slices.Contains(open, lowest) {
			free++
		}
	}
	var limit unix.Rlimit
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit))
	limit.Cur = min(lowest, limit.Max)
	must(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil))
}

// openFiles are the numbers of a process's open files.
func openFiles(t *testing.T, pid int) (numbers []uint64) {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	for _, f := range files {
		n, err := strconv.ParseUint(f.Name(), 10, 64)
		must(t, err)
		numbers = append(numbers, n)
	}
	return numbers
}

// breakFileSystem lets the kernel find an error in the file system, and turn it read-only.
func (w *world) breakFileSystem(t *testing.T) {
	t.Helper()
	trigger := filepath.Join("/sys/fs/ext4", device(t, w.n.DedupRoot()), "trigger_fs_error")
	if _, err := os.Stat(trigger); err != nil {
		t.Skipf("this kernel cannot be told to find an error: %v", err)
	}
	must(t, os.WriteFile(trigger, []byte("1"), 0o200))
}
