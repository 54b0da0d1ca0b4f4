package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// together is how many containers start at once.
const together = 20

// use is an image that is started, read, and served across restarts.
type use struct {
	img    Image
	python bool // it holds the packages that inputs.Imports imports
}

func prepareUse(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	u, err := s.use(ctx)
	return u.trial, "", err
}

// use is the image of --image, else one made here.
func (s *stage) use(ctx context.Context) (u use, err error) {
	r, err := s.registry(ctx)
	if err != nil {
		return u, err
	}
	if len(s.opts.Images) > 0 {
		u.img, err = s.copyImage(ctx, r, s.opts.Images[0])
		return u, err
	}
	base, apps, err := s.apps(ctx, 1)
	if err != nil {
		return u, err
	}
	img, err := s.serve(ctx, r, "team-1/app:v1", base, apps[0])
	return use{img, true}, err
}

func (u use) trial(ctx context.Context, t *Trial) error {
	if _, err := t.pull(ctx, u.img); err != nil {
		return err
	}
	steps := map[string]func(context.Context, *Trial) error{"start": u.start, "read": u.read, "restart": u.restart}
	for _, name := range []string{"start", "read", "restart"} {
		if !t.wants(name) {
			continue
		}
		if err := steps[name](ctx, t); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// start measures from the request to make a container until its first output. The first container
// comes right after the pull, as it does for whoever waits for it.
func (u use) start(ctx context.Context, t *Trial) error {
	command := []string{"/bin/sh", "-c", "echo ok"}
	var around []time.Duration // of the tenth: one alone says little
	for i := range 14 {
		d, err := t.firstOutput(ctx, u.img, command...)
		if err != nil {
			return err
		}
		switch {
		case i == 0:
			t.record("start", "first container", "s", d.Seconds())
		case i >= 5:
			around = append(around, d)
		}
	}
	slices.Sort(around)
	t.record("start", "tenth container", "s", around[len(around)/2].Seconds())
	var slowest, sum time.Duration
	var mu sync.Mutex
	var eg errgroup.Group
	for range together {
		eg.Go(func() error {
			d, err := t.firstOutput(ctx, u.img, command...)
			mu.Lock()
			slowest, sum = max(slowest, d), sum+d
			mu.Unlock()
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	t.record("start", fmt.Sprintf("%d at once, all", together), "s", slowest.Seconds())
	t.record("start", fmt.Sprintf("%d at once, mean", together), "s", sum.Seconds()/together)
	return nil
}

// firstOutput runs a container to its end and returns how long it took to its first output.
func (t *Trial) firstOutput(ctx context.Context, img Image, command ...string) (d time.Duration, err error) {
	return t.firstOutputMapped(ctx, img, nil, command...)
}

// firstOutputMapped is firstOutput in a user namespace whose ids are mapped so.
func (t *Trial) firstOutputMapped(
	ctx context.Context, img Image, ids []specs.LinuxIDMapping, command ...string,
) (d time.Duration, err error) {
	c, n := t.Client(), t.Node
	id := node.NewID("bench")
	start := time.Now()
	ref, err := c.GetImage(ctx, img.Ref)
	if err != nil {
		return 0, fmt.Errorf("start container: %w", err)
	}
	spec := []oci.SpecOpts{oci.WithImageConfig(ref), oci.WithProcessArgs(command...)}
	var labels []snapshots.Opt
	if ids != nil {
		spec = append(spec, oci.WithUserNamespace(ids, ids))
		labels = append(labels, client.WithUserNSRemapperLabels(ids, ids))
	}
	container, err := c.NewContainer(ctx, id,
		client.WithImage(ref), client.WithSnapshotter(t.Subject.Snapshotter), client.WithNewSnapshot(id, ref, labels...),
		client.WithNewSpec(spec...),
		client.WithRuntime("io.containerd.runc.v2", &runcoptions.Options{Root: filepath.Join(n.Dir(), "runc")}))
	if err != nil {
		return 0, fmt.Errorf("make container: %w", err)
	}
	defer func() {
		err = errors.Join(err, container.Delete(context.WithoutCancel(ctx), client.WithSnapshotCleanup))
	}()
	var errOut strings.Builder
	out := &first{seen: make(chan struct{})}
	task, err := container.NewTask(ctx, cio.NewCreator(cio.WithFIFODir(filepath.Join(n.Dir(), "run")),
		cio.WithStreams(nil, out, &errOut)))
	if err != nil {
		return 0, fmt.Errorf("make task: %w", err)
	}
	defer func() {
		_, e := task.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
		err = errors.Join(err, e)
	}()
	exited, err := task.Wait(ctx)
	if err != nil {
		return 0, fmt.Errorf("wait for task: %w", err)
	}
	if err := task.Start(ctx); err != nil {
		return 0, fmt.Errorf("start task: %w", err)
	}
	status := <-exited
	code, _, err := status.Result()
	if err != nil {
		return 0, fmt.Errorf("wait for task: %w", err)
	}
	if code != 0 {
		return 0, fmt.Errorf("container ended with %d: %s", code, errOut.String())
	}
	select {
	case <-out.seen:
		return out.at.Sub(start), nil
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(10 * time.Second):
		return 0, fmt.Errorf("container %s printed nothing", id)
	}
}

// first notes when the first byte comes.
type first struct {
	once sync.Once
	at   time.Time
	seen chan struct{}
}

func (f *first) Write(p []byte) (int, error) {
	f.once.Do(func() { f.at = time.Now(); close(f.seen) })
	return len(p), nil
}

// read looks at every file of a mounted root: names and metadata, then all bytes, with
// nothing cached and again with everything cached; then Python imports a service's packages.
func (u use) read(ctx context.Context, t *Trial) error {
	find := func(root string) error { return walk(ctx, root, nil) }
	everything := func(root string) error {
		buf := make([]byte, 256<<10)
		return walk(ctx, root, buf)
	}
	for _, what := range []struct {
		name string
		do   func(root string) error
	}{{"find", find}, {"read everything", everything}} {
		if err := dropCaches("3"); err != nil {
			return err
		}
		err := t.View(ctx, t.Subject.Snapshotter, u.img.Ref, func(root string) error {
			for _, state := range []string{"cold", "warm"} {
				start := time.Now()
				if err := what.do(root); err != nil {
					return err
				}
				t.record("read", what.name+", "+state, "s", time.Since(start).Seconds())
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if !u.python {
		return nil
	}
	for i, state := range []string{"cold", "warm"} {
		if i == 0 {
			if err := dropCaches("3"); err != nil {
				return err
			}
		}
		// -B: nothing is written, so both runs find the same.
		d, err := t.firstOutput(ctx, u.img, "/usr/bin/python3", "-B", "-c", inputs.Imports)
		if err != nil {
			return err
		}
		t.record("read", "Python imports, "+state, "s", d.Seconds())
	}
	return nil
}

// walk stats everything below root and, with a buffer, reads it.
func walk(ctx context.Context, root string, buf []byte) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, err := d.Info(); err != nil {
			return err
		}
		if buf == nil || !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(discard{}, struct{ io.Reader }{f}, buf)
		return errors.Join(err, f.Close())
	})
}

// restart measures how long daemon and containerd take until they serve, with snapshots there.
func (u use) restart(ctx context.Context, t *Trial) error {
	count := max(10, int(100*t.opts.Scale))
	keys, err := t.manySnapshots(ctx, u.img, count)
	if err != nil {
		return err
	}
	return t.restarted(ctx, "restart", keys[0])
}

// manySnapshots makes writable snapshots on an image; the node takes them with it.
func (t *Trial) manySnapshots(ctx context.Context, img Image, count int) (keys []string, err error) {
	chain, err := t.ChainID(ctx, img.Ref)
	if err != nil {
		return nil, err
	}
	ctx, _, err = t.Client().WithLease(ctx)
	if err != nil {
		return nil, fmt.Errorf("take a lease: %w", err)
	}
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	for range count {
		key := node.NewID("many")
		if _, err := sn.Prepare(ctx, key, chain); err != nil {
			return nil, fmt.Errorf("make a snapshot: %w", err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// restarted stops and starts everything that the subject consists of, until it answers for
// a snapshot.
func (t *Trial) restarted(ctx context.Context, scenario, key string) error {
	daemon := t.Subject.Snapshotter == node.Snapshotter
	if err := t.StopContainerd(); err != nil {
		return err
	}
	if daemon {
		if err := t.StopDaemon(); err != nil {
			return err
		}
	}
	start := time.Now()
	if daemon {
		if err := t.StartDaemon(ctx); err != nil {
			return err
		}
		t.record(scenario, "daemon ready", "s", time.Since(start).Seconds())
	}
	if err := t.StartContainerd(ctx); err != nil {
		return err
	}
	if _, err := t.Client().SnapshotService(t.Subject.Snapshotter).Mounts(ctx, key); err != nil {
		return fmt.Errorf("after a restart: %w", err)
	}
	t.record(scenario, "everything ready", "s", time.Since(start).Seconds())
	return nil
}
