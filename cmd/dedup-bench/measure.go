package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// trial is one subject on one fresh node that pulls images one after the other.
type trial struct {
	Subject string `json:"subject"`
	Steps   []step `json:"steps"` // one for each image
	// PeakMemory is the largest resident set of containerd plus that of the daemon.
	PeakMemory int64 `json:"peak_memory_bytes"`
}

// step is one image.
type step struct {
	Pull float64 `json:"pull_seconds"` // what a user waits for
	// Flushed is the pull and then syncfs: some subjects leave dirty pages behind for
	// later, others have made everything durable when the pull ends.
	Flushed float64     `json:"pull_flushed_seconds"`
	CPU     float64     `json:"cpu_seconds"` // of containerd, the daemon and their children, flush included
	Run     float64     `json:"run_seconds"` // a container, from ctr run to its end
	Used    rootfs.Used `json:"used"`        // of the snapshotter's root, after this step
	Output  string      `json:"output"`      // what the container printed
}

// plan says how trials are taken.
type plan struct {
	images  []served
	command []string // run in a container of each image
	parent  string   // of the trials' disks
	// keepCaches leaves the page cache alone before a pull.
	keepCaches bool
	// fidelity of the daemon; "" is its default.
	fidelity string
	// igzip lets all subjects use it.
	igzip bool
}

// take runs a trial on a fresh disk.
func (pl plan) take(ctx context.Context, subject string) (t trial, err error) {
	err = bench.WithDisk(ctx, pl.parent, func(dir string) error {
		t, err = pl.takeIn(ctx, dir, subject)
		return err
	})
	return t, err
}

// takeIn runs a trial. What it returns beside an error has the node's logs in it.
func (pl plan) takeIn(ctx context.Context, dir, subject string) (_ trial, err error) {
	t := trial{Subject: subject}
	n, err := node.Start(ctx, pl.options(dir, subject))
	if err != nil {
		return t, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\n%s", err, n.Logs(40))
		}
		err = errors.Join(err, n.Close())
	}()
	if subject == node.Snapshotter {
		if err := n.StartDaemon(ctx); err != nil {
			return t, err
		}
	}
	for _, img := range pl.images {
		s, err := pl.step(ctx, n, subject, img)
		if err != nil {
			return t, fmt.Errorf("%s, image %s: %w", subject, img.name, err)
		}
		t.Steps = append(t.Steps, s)
	}
	for _, pid := range n.Pids() {
		peak, err := node.PeakMemory(pid)
		if err != nil {
			return t, err
		}
		t.PeakMemory += peak
	}
	return t, nil
}

func (pl plan) step(ctx context.Context, n *node.Node, subject string, img served) (step, error) {
	var s step
	if err := pl.settle(img); err != nil {
		return s, err
	}
	before, err := cpu(n)
	if err != nil {
		return s, err
	}
	start := time.Now()
	if err := n.Pull(ctx, subject, img.ref); err != nil {
		return s, err
	}
	s.Pull = time.Since(start).Seconds()
	if err := syncfs(n.Dir()); err != nil {
		return s, err
	}
	s.Flushed = time.Since(start).Seconds()
	after, err := cpu(n)
	if err != nil {
		return s, err
	}
	s.CPU = (after - before).Seconds()
	start = time.Now()
	if s.Output, err = n.Run(ctx, subject, img.ref, pl.command...); err != nil {
		return s, err
	}
	s.Run = time.Since(start).Seconds()
	s.Used, err = rootfs.Usage(n.SnapshotterRoot(subject))
	return s, err
}

// settle gives every pull the same start: nothing dirty, no cached file of an earlier
// subject, the registry's blobs in memory.
func (pl plan) settle(img served) error {
	unix.Sync()
	if !pl.keepCaches {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
			return fmt.Errorf("drop caches: %w", err)
		}
	}
	return img.warm()
}

func cpu(n *node.Node) (time.Duration, error) {
	var total time.Duration
	for _, pid := range n.Pids() {
		d, err := node.CPUTime(pid)
		if err != nil {
			return 0, err
		}
		total += d
	}
	return total, nil
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

func (pl plan) options(dir, subject string) node.Options {
	opts := node.Options{Parent: dir, NoDedup: subject != node.Snapshotter, ExternalGzip: pl.igzip}
	if pl.fidelity != "" {
		opts.Daemon = map[string]any{"fidelity": pl.fidelity}
	}
	return opts
}
