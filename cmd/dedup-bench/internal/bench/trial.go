package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// Trial is one subject on a fresh node.
type Trial struct {
	*node.Node
	Subject Subject
	opts    Options
	disk    string
	clients []int // processes that work for a client, and count as containerd does
	samples []report.Sample
}

func take(ctx context.Context, opts Options, s Subject, warm *Image,
	fn func(context.Context, *Trial) error) (samples []report.Sample, err error) {
	// 12.4 GB of small files take twice that, and 2.3 million inodes.
	size := max(diskSize, int64(2*opts.Scale)<<30)
	err = withDisk(ctx, opts.Tmp, size, func(dir string) (err error) {
		n, err := node.Start(ctx, s.options(opts, dir))
		if err != nil {
			return err
		}
		t := &Trial{Node: n, Subject: s, opts: opts, disk: dir}
		defer func() {
			if err != nil && ctx.Err() == nil {
				err = fmt.Errorf("%w\n%s", err, n.Logs(40))
			}
			err = errors.Join(err, n.Close())
			samples = t.samples
		}()
		if s.Snapshotter == node.Snapshotter {
			if err := n.StartDaemon(ctx); err != nil {
				return err
			}
		}
		if warm != nil {
			if err := t.warmUp(ctx, *warm); err != nil {
				return err
			}
		}
		err = fn(ctx, t)
		if s.Socket != "" {
			err = errors.Join(err, t.empty(context.WithoutCancel(ctx)))
		}
		return err
	})
	return samples, err
}

// empty removes all images: a snapshotter that somebody else runs outlives the trial, and shall
// know nothing of it in the next one.
func (t *Trial) empty(ctx context.Context) error {
	store := t.Client().ImageService()
	list, err := store.List(ctx)
	if err != nil {
		return fmt.Errorf("empty %s: %w", t.Subject.Name, err)
	}
	for i, img := range list {
		var opts []images.DeleteOpt
		if i == len(list)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := store.Delete(ctx, img.Name, opts...); err != nil {
			return fmt.Errorf("empty %s: %w", t.Subject.Name, err)
		}
	}
	return nil
}

// warmUp loads programs and kernel modules that any subject needs, with an image that shares
// nothing with those measured.
func (t *Trial) warmUp(ctx context.Context, img Image) error {
	if err := t.Pull(ctx, t.Subject.Snapshotter, img.Ref); err != nil {
		return err
	}
	_, err := t.Run(ctx, t.Subject.Snapshotter, img.Ref, "/bin/true")
	return err
}

func (t *Trial) wants(scenario string) bool { return slices.Contains(t.opts.Scenarios, scenario) }

// record keeps a figure, if its scenario is asked for.
func (t *Trial) record(scenario, metric, unit string, value float64) {
	if t.wants(scenario) {
		t.samples = append(t.samples, report.Sample{Scenario: scenario, Subject: t.Subject.Name, Metric: metric, Unit: unit,
			Value: value})
	}
}

// cost of something that a trial did.
type cost struct {
	wall    time.Duration // what a user waits for
	flushed time.Duration // and until it was on disk: some leave dirty pages for later
	cpu     time.Duration // of containerd, the snapshotter and their children, flush included
	serving time.Duration // CPU of the registries
	peak    int64         // largest resident sets of containerd and the snapshotter, bytes
	daemon  int64         // that of the snapshotter alone, 0 if it is part of containerd
	used    rootfs.Used   // added to the snapshotter's directory
	hasUsed bool
	disk    rootfs.Used // added to the whole file system: content store and databases too
}

// background is how long a measurement waits for work that goes on after the answer.
const background = 500 * time.Millisecond

// measure runs fn and says what it cost.
func (t *Trial) measure(registries []*Registry, fn func() error) (c cost, err error) {
	before, err := t.state(registries)
	if err != nil {
		return c, err
	}
	for _, pid := range t.pids() {
		// Peaks start again (proc(5)); where the kernel cannot, they are since the start.
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
	}
	start := time.Now()
	if err := fn(); err != nil {
		return c, err
	}
	c.wall = time.Since(start)
	if err := syncfs(t.disk); err != nil {
		return c, err
	}
	c.flushed = time.Since(start)
	// What a subject does in the background right after belongs to the cost, but to nobody's
	// wait: dedup builds the chain image, containerd collects garbage.
	time.Sleep(background)
	if err := syncfs(t.disk); err != nil {
		return c, err
	}
	after, err := t.state(registries)
	if err != nil {
		return c, err
	}
	for i, pid := range t.pids() {
		peak, err := node.PeakMemory(pid)
		if err != nil {
			return c, err
		}
		c.peak += peak
		if i > 0 { // the first is containerd
			c.daemon += peak
		}
	}
	c.cpu, c.serving = after.cpu-before.cpu, after.serving-before.serving
	c.used, c.hasUsed = after.used.Sub(before.used), after.hasUsed
	c.disk = after.disk.Sub(before.disk)
	return c, nil
}

type state struct {
	cpu, serving time.Duration
	used, disk   rootfs.Used
	hasUsed      bool
}

func (t *Trial) state(registries []*Registry) (s state, err error) {
	for _, pid := range t.pids() {
		d, err := node.CPUTime(pid)
		if err != nil {
			return s, err
		}
		s.cpu += d
	}
	for _, r := range registries {
		d, err := node.CPUTime(r.Pid())
		if err != nil {
			return s, err
		}
		s.serving += d
	}
	if s.used, s.hasUsed, err = t.Subject.used(t.Node); err != nil {
		return s, err
	}
	s.disk, err = diskUsed(t.disk)
	return s, err
}

func (t *Trial) pids() []int {
	pids := t.Pids()
	pids = append(pids[:len(pids):len(pids)], t.clients...)
	if t.Subject.Socket != "" {
		if pid, err := peer(t.Subject.Socket); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// recordPull keeps the cost of a pull.
func (t *Trial) recordPull(scenario string, c cost) {
	t.record(scenario, "pull", "s", c.wall.Seconds())
	t.record(scenario, "pull, flushed", "s", c.flushed.Seconds())
	t.record(scenario, "CPU", "s", c.cpu.Seconds())
	t.record(scenario, "CPU of the registry", "s", c.serving.Seconds())
	t.record(scenario, "peak memory", "bytes", float64(c.peak))
	if c.daemon > 0 {
		t.record(scenario, "peak memory of the snapshotter alone", "bytes", float64(c.daemon))
	}
	t.recordUsed(scenario, c)
}

func (t *Trial) recordUsed(scenario string, c cost) {
	if c.hasUsed {
		t.record(scenario, "disk", "bytes", float64(c.used.Bytes))
		t.record(scenario, "inodes", "inodes", float64(c.used.Inodes))
	}
	t.record(scenario, "disk, with the content store", "bytes", float64(c.disk.Bytes))
	t.record(scenario, "inodes, with the content store", "inodes", float64(c.disk.Inodes))
}

// pull measures the pull of an image on a settled machine.
func (t *Trial) pull(ctx context.Context, img Image) (cost, error) {
	if err := settle(img); err != nil {
		return cost{}, err
	}
	return t.measure(registriesOf(img), func() error { return t.Pull(ctx, t.Subject.Snapshotter, img.Ref) })
}

// settle gives every pull the same start: nothing dirty, no cached file of an earlier
// subject, the registry's blobs in memory.
func settle(images ...Image) error {
	if err := dropCaches("1"); err != nil {
		return err
	}
	for _, img := range images {
		for _, blob := range img.Blobs {
			if err := Warm(blob); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropCaches writes out all that is dirty and drops the page cache ("1") or that and
// dentries and inodes ("3").
func dropCaches(what string) error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte(what), 0); err != nil {
		return fmt.Errorf("drop caches: %w", err)
	}
	return nil
}

// Warm reads a file into the page cache: a registry is remote in real life, its disk is not
// what a pull waits for.
func Warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("warm registry: %w", err)
	}
	_, err = f.WriteTo(discard{})
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("warm registry: %w", err)
	}
	return nil
}

// discard has no ReadFrom, so that the file is really read.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// diskUsed asks the file system itself.
func diskUsed(dir string) (rootfs.Used, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return rootfs.Used{}, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return rootfs.Used{
		Bytes:  int64(st.Blocks-st.Bfree) * st.Bsize,
		Inodes: int64(st.Files - st.Ffree),
	}, nil
}

func syncfs(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}
