package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// reader is a container's command that reads the image's files in a loop, dies of the first wrong
// byte or error, and adds a byte to a file in every round.
const reader = `all() { cat /data/* /bin/busybox | md5sum; }
want=$(all); while [ "$(all)" = "$want" ]; do printf . >> /rounds; sleep 0.01; done`

func dataLayer(t *testing.T) *image.Layer {
	t.Helper()
	entries := []image.Entry{image.Dir("data")}
	for _, name := range []string{"a", "b", "c"} {
		entries = append(entries, image.File("data/"+name, strings.Repeat(name, 9000)), image.File("data/small-"+name, name))
	}
	return layer(t, entries...)
}

// readsOn fails the test unless the reader whose first process is pid goes on: not out of the
// page cache, and without any help of containerd or the daemon.
func readsOn(t *testing.T, n *node.Node, pid uint32) {
	t.Helper()
	dropCache(t, n)
	rounds := func() int64 {
		fi, err := os.Stat(fmt.Sprintf("/proc/%d/root/rounds", pid))
		if err != nil { // before the first round, and after the container's end
			return 0
		}
		return fi.Size()
	}
	const more = 5
	for start, deadline := rounds(), time.Now().Add(2*time.Minute); rounds() < start+more; {
		if time.Now().After(deadline) {
			t.Fatalf("the running container has stopped reading: %d rounds, %d before", rounds(), start)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func pidOf(t *testing.T, n *node.Node, id string) uint32 {
	t.Helper()
	c, err := n.Client().LoadContainer(testContext(t), id)
	must(t, err)
	task, err := c.Task(testContext(t), nil)
	must(t, err)
	return task.Pid()
}

// installBinary puts one of our programs at path, as a package manager does: under a new inode.
func installBinary(t *testing.T, path string) {
	t.Helper()
	module, err := node.ModuleRoot()
	must(t, err)
	data, err := os.ReadFile(filepath.Join(module, "bin", filepath.Base(path)))
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("no %s in bin/: run `make build`", filepath.Base(path))
	}
	must(t, err)
	must(t, os.WriteFile(path+".new", data, 0o755))
	must(t, os.Rename(path+".new", path))
}

// A container reads on while the daemon and containerd are stopped, killed, upgraded and away;
// pulls and runs work when they are back.
func TestRestart(t *testing.T) {
	t.Parallel()
	bin := filepath.Join(t.TempDir(), "containerd-dedup-grpc")
	installBinary(t, bin)
	n, r := startDedup(t, node.Options{DaemonBinary: bin}), startRegistry(t)
	ctx := testContext(t)
	base, data := busybox(t), dataLayer(t)
	ref := push(t, r, "reader:1", base, data)
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sh", "-c", reader)
	must(t, err)
	pid := pidOf(t, n, id)
	readsOn(t, n, pid)
	upgrade := func() error { installBinary(t, bin); return nil }
	startDaemon := func() error { return n.StartDaemon(ctx) }
	startContainerd := func() error { return n.StartContainerd(ctx) }

	for i, row := range []struct {
		name  string
		steps []func() error
	}{
		{"daemon stopped and started", []func() error{n.StopDaemon, startDaemon}},
		{"daemon killed and started", []func() error{n.KillDaemon, startDaemon}},
		{"daemon upgraded", []func() error{upgrade, n.StopDaemon, startDaemon}},
		{"containerd restarted", []func() error{n.StopContainerd, startContainerd}},
		{"containerd killed", []func() error{n.KillContainerd, startContainerd}},
		{"daemon before containerd", []func() error{n.StopContainerd, n.StopDaemon, startDaemon, startContainerd}},
		{"containerd before daemon", []func() error{n.StopDaemon, n.StopContainerd, startContainerd, startDaemon}},
		{"both killed", []func() error{n.KillDaemon, n.KillContainerd, startContainerd, startDaemon}},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, step := range row.steps {
				must(t, step())
				readsOn(t, n, pid)
			}
			next := push(t, r, fmt.Sprintf("next:%d", i), base, layer(t, payload(row.name, "next", 20000)))
			pull(t, n, node.Snapshotter, next)
			out, err := n.Run(ctx, node.Snapshotter, next, "cat", "/next")
			must(t, err)
			if out != payload(row.name, "next", 20000).Content {
				t.Errorf("a new container reads %d other bytes", len(out))
			}
			out, err = n.Run(ctx, node.Snapshotter, ref, "cat", "/data/small-a")
			must(t, err)
			if out != "a" {
				t.Errorf("a new container of the image from before prints %q", out)
			}
			out, err = n.Exec(ctx, id, "echo", "alive")
			must(t, err)
			if out != "alive\n" {
				t.Errorf("exec in the running container prints %q", out)
			}
		})
	}
	objectsUntouched(t, n)
}

// A daemon that is killed, or stopped, in the middle of a pull leaves nothing that a later pull trips over.
func TestDaemonKilledDuringPull(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	for name, end := range map[string]func() error{"killed": n.KillDaemon, "stopped": n.StopDaemon} {
		endDuringPull(t, n, r, name, end)
	}
	objectsUntouched(t, n)
}

func endDuringPull(t *testing.T, n *node.Node, r *registry.Registry, name string, end func() error) {
	t.Helper()
	ctx := testContext(t)
	layers := []*image.Layer{busybox(t)}
	var want strings.Builder
	for i := range 6 {
		e := payload(name, fmt.Sprint("big", i), 8<<20)
		want.WriteString(e.Content[:100])
		layers = append(layers, layer(t, e))
	}
	ref := push(t, r, name+":1", layers...)
	before := packed(n)
	pulled := make(chan error, 1)
	go func() { pulled <- n.Pull(ctx, node.Snapshotter, ref) }()
	for packed(n) < before+8<<20 { // one of six
		must(t, ctx.Err())
		time.Sleep(time.Millisecond)
	}
	must(t, end())
	if err := <-pulled; err == nil {
		t.Logf("%s: the pull was over: nothing of this run was cut off", name)
	}
	must(t, n.StartDaemon(ctx))
	pull(t, n, node.Snapshotter, ref)
	out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", "for f in /big*; do head -c 100 $f; done")
	must(t, err)
	if out != want.String() {
		t.Errorf("%s: the container reads %q", name, out)
	}
}

// onceMore is a container's command that changes its files and waits when it runs first,
// and afterwards tells what it finds.
const onceMore = `if [ -e /mine ]; then cat /mine /data/a; ls /data; wc -c < /data/c; exit; fi
echo changed > /data/a; rm /data/b; echo mine > /mine; sleep 1000`

// After a reboot nothing is mounted. Containers that existed start again, with what they
// had written; those that were only created start too.
func TestReboot(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		lost []string // directories of the node that are empty afterwards
	}{
		{"run directory emptied", []string{"run", "s", "runc"}},
		// run_dir need not be on a tmpfs.
		{"mount points left", []string{"s", "runc"}},
	} {
		t.Run(row.name, func(t *testing.T) { startsAfterReboot(t, row.lost) })
	}
}

func startsAfterReboot(t *testing.T, lost []string) {
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	ref := push(t, r, "reboot:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sh", "-c", onceMore)
	must(t, err)
	pid := pidOf(t, n, id)
	for mine := fmt.Sprintf("/proc/%d/root/mine", pid); ; time.Sleep(10 * time.Millisecond) {
		if fi, err := os.Stat(mine); err == nil && fi.Size() > 0 {
			break
		}
		must(t, ctx.Err())
	}
	created := node.NewID("created")
	_, err = n.Ctr(ctx, "container", "create", "--snapshotter", node.Snapshotter, "--runc-root",
		filepath.Join(n.Dir(), "runc"),
		ref, created, "cat", "/data/small-c")
	must(t, err)

	reboot(t, n, id, lost)
	for _, row := range []struct{ name, id, want string }{
		{"a container that ran", id, "mine\nchanged\na\nc\nsmall-a\nsmall-b\nsmall-c\n9000\n"},
		{"a container that was only created", created, "c"},
	} {
		out, err := n.Ctr(ctx, "task", "start", row.id)
		must(t, err)
		if out != row.want {
			t.Errorf("%s: %q, want %q", row.name, out, row.want)
		}
	}
	out, err := n.Run(ctx, node.Snapshotter, ref, "cat", "/data/small-b")
	must(t, err)
	if out != "b" {
		t.Errorf("a new container prints %q", out)
	}
	next := push(t, r, "reboot:2", busybox(t), layer(t, image.File("next", "next")))
	pull(t, n, node.Snapshotter, next)
	objectsUntouched(t, n)
}

// reboot ends a running container and everything else, unmounts all, and empties what is lost.
func reboot(t *testing.T, n *node.Node, id string, lost []string) {
	t.Helper()
	ctx := testContext(t)
	c, err := n.Client().LoadContainer(ctx, id)
	must(t, err)
	task, err := c.Task(ctx, nil)
	must(t, err)
	_, err = task.Delete(ctx, client.WithProcessKill)
	must(t, err)
	must(t, n.KillContainerd())
	must(t, n.KillDaemon())
	must(t, node.UnmountBelow(n.Dir()))
	for _, sub := range lost {
		dir := filepath.Join(n.Dir(), sub)
		must(t, os.RemoveAll(dir))
		must(t, os.Mkdir(dir, 0o700))
	}
	must(t, n.StartDaemon(ctx))
	must(t, n.StartContainerd(ctx))
}
