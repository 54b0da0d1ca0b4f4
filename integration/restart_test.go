package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// reader is a container's command that reads the image's files in a loop and dies of the first
// error; it counts its rounds in a file.
const reader = `n=0; while cat /data/* > /dev/null; do n=$((n+1)); echo $n > /rounds; done; exit 1`

func dataLayer(t *testing.T) *image.Layer {
	t.Helper()
	entries := []image.Entry{image.Dir("data")}
	for _, name := range []string{"a", "b", "c"} {
		entries = append(entries, image.File("data/"+name, strings.Repeat(name, 9000)), image.File("data/small-"+name, name))
	}
	return layer(t, entries...)
}

// Containers read on while the daemon stops, dies and comes back, and while containerd restarts;
// pulls and runs work after each.
func TestRestart(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	base, data := busybox(t), dataLayer(t)
	ref := push(t, r, "reader:1", base, data)
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sh", "-c", reader)
	must(t, err)

	for i, row := range []struct {
		name string
		do   func() error
	}{
		{"daemon stopped and started", func() error {
			if err := n.StopDaemon(); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
			return n.StartDaemon(ctx)
		}},
		{"daemon killed and started", func() error { _ = n.KillDaemon(); return n.StartDaemon(ctx) }},
		{"containerd restarted", func() error { return n.RestartContainerd(ctx) }},
		{"containerd killed", func() error { _ = n.KillContainerd(); return n.StartContainerd(ctx) }},
		{"daemon before containerd", func() error {
			if err := n.StopContainerd(); err != nil {
				return err
			}
			if err := n.StopDaemon(); err != nil {
				return err
			}
			if err := n.StartDaemon(ctx); err != nil {
				return err
			}
			return n.StartContainerd(ctx)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			must(t, row.do())
			before, err := n.Exec(ctx, id, "cat", "/rounds")
			must(t, err)
			next := push(t, r, "next:"+string(rune('a'+i)), base, layer(t, image.File("next", strings.Repeat(row.name, 500))))
			pull(t, n, node.Snapshotter, next)
			out, err := n.Run(ctx, node.Snapshotter, next, "head", "-c", "6", "/next")
			must(t, err)
			if out != row.name[:6] {
				t.Errorf("a new container prints %q", out)
			}
			after, err := n.Exec(ctx, id, "cat", "/rounds")
			must(t, err)
			if after == before {
				t.Errorf("the running container stands still at round %s", after)
			}
		})
	}
}

// After a reboot nothing is mounted and the run directory is empty. Containers that existed start
// again, with what they had written.
func TestReboot(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ctx := testContext(t)
	ref := push(t, r, "reboot:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	id, err := n.RunDetached(ctx, node.Snapshotter, ref, "sleep", "1000")
	must(t, err)
	_, err = n.Exec(ctx, id, "sh", "-c", "echo mine > /data/a; rm /data/b")
	must(t, err)
	c, err := n.Client().LoadContainer(ctx, id)
	must(t, err)
	task, err := c.Task(ctx, nil)
	must(t, err)
	_, err = task.Delete(ctx, client.WithProcessKill)
	must(t, err)

	must(t, n.StopContainerd())
	_ = n.KillDaemon()
	run := filepath.Join(n.Dir(), "run")
	must(t, node.UnmountBelow(run))
	must(t, os.RemoveAll(run))
	must(t, os.Mkdir(run, 0o700))
	must(t, n.StartDaemon(ctx))
	must(t, n.StartContainerd(ctx))

	c, err = n.Client().LoadContainer(ctx, id)
	must(t, err)
	nsctx := namespaces.WithNamespace(ctx, node.Namespace)
	must(t, c.Update(nsctx, client.UpdateContainerOpts(client.WithNewSpec(
		oci.WithDefaultSpec(), oci.WithProcessArgs("/bin/sh", "-c", "cat /data/a; ls /data; cat /data/c | wc -c"), oci.WithEnv([]string{"PATH=/bin"})))))
	var out strings.Builder
	task, err = c.NewTask(nsctx, cio.NewCreator(cio.WithStreams(nil, &out, &out), cio.WithFIFODir(t.TempDir())))
	must(t, err)
	wait, err := task.Wait(nsctx)
	must(t, err)
	must(t, task.Start(nsctx))
	<-wait
	_, err = task.Delete(nsctx)
	must(t, err)
	if want := "mine\na\nc\nsmall-a\nsmall-b\nsmall-c\n9000\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
