package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
)

// sequence is what the pull scenarios pull, in this order, on one node.
type sequence struct {
	cold    Image
	rebuild []Image // the same content, other times and owners, another registry
	known   []Image // the same layers on another parent, another registry
}

// preparePulls makes a Debian image with a pip install, a rebuild of it, and an image of the
// same layers the other way round, so that both have another parent. A user's images are pulled in
// the order given instead, then the first one again from another registry.
func preparePulls(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	seq, err := s.sequence(ctx)
	if err != nil {
		return nil, "", err
	}
	s.limit = func(ctx context.Context) ([]report.Sample, error) { return seq.limits(ctx, s.opts) }
	return seq.trial, "", nil
}

func (s *stage) sequence(ctx context.Context) (seq sequence, err error) {
	var r [3]*Registry
	for i := range r {
		if r[i], err = s.registry(ctx); err != nil {
			return seq, err
		}
	}
	if len(s.opts.Images) > 0 {
		return s.usersSequence(ctx, r)
	}
	base, apps, err := s.apps(ctx, 2)
	if err != nil {
		return seq, err
	}
	if seq.cold, err = s.serve(ctx, r[0], "team-1/app:v1", base, apps[0]); err != nil {
		return seq, err
	}
	rebuild, err := s.serve(ctx, r[1], "team-2/app:v2", base, apps[1])
	if err != nil {
		return seq, err
	}
	known, err := s.serve(ctx, r[2], "team-3/app:v3", apps[0], base)
	if err != nil {
		return seq, err
	}
	seq.rebuild, seq.known = []Image{rebuild}, []Image{known}
	return seq, nil
}

func (s *stage) usersSequence(ctx context.Context, r [3]*Registry) (seq sequence, err error) {
	for i, ref := range s.opts.Images {
		img, err := s.copyImage(ctx, r[min(i, 1)], ref)
		if err != nil {
			return seq, err
		}
		if i == 0 {
			seq.cold = img
		} else {
			seq.rebuild = append(seq.rebuild, img)
		}
	}
	known, err := s.copyImage(ctx, r[2], seq.cold.Ref)
	if err != nil {
		return seq, err
	}
	seq.known = []Image{known}
	return seq, nil
}

// apps are the layers of a Debian root and of n separate runs of pip install.
func (s *stage) apps(ctx context.Context, n int) (base *image.Layer, apps []*image.Layer, err error) {
	set, err := inputs.Open(s.opts.Say)
	if err != nil {
		return nil, nil, err
	}
	if base, err = set.Debian(ctx); err != nil {
		return nil, nil, err
	}
	for i := range n {
		app, err := set.App(ctx, i+1)
		if err != nil {
			return nil, nil, err
		}
		apps = append(apps, app)
	}
	return base, apps, nil
}

func (seq sequence) trial(ctx context.Context, t *Trial) error {
	empty, err := diskUsed(t.disk)
	if err != nil {
		return err
	}
	c, err := t.pull(ctx, seq.cold)
	if err != nil {
		return err
	}
	t.recordPull("cold", c)
	pulled := []Image{seq.cold}
	more := func(scenario string, list []Image, needed bool) error {
		if !needed || len(list) == 0 {
			return nil
		}
		var sum cost
		for _, img := range list {
			c, err := t.pull(ctx, img)
			if err != nil {
				return err
			}
			sum = sum.plus(c)
			pulled = append(pulled, img)
		}
		t.recordPull(scenario, sum)
		return nil
	}
	if err := more("rebuild", seq.rebuild, t.wants("rebuild") || t.wants("delete")); err != nil {
		return err
	}
	if err := more("known", seq.known, t.wants("known")); err != nil {
		return err
	}
	if !t.wants("delete") {
		return nil
	}
	return t.deleteAll(ctx, pulled, empty.Bytes)
}

func (c cost) plus(d cost) cost {
	c.wall, c.flushed, c.cpu, c.serving = c.wall+d.wall, c.flushed+d.flushed, c.cpu+d.cpu, c.serving+d.serving
	c.peak = max(c.peak, d.peak)
	c.used.Bytes, c.used.Inodes = c.used.Bytes+d.used.Bytes, c.used.Inodes+d.used.Inodes
	c.disk.Bytes, c.disk.Inodes = c.disk.Bytes+d.disk.Bytes, c.disk.Inodes+d.disk.Inodes
	c.hasUsed = d.hasUsed
	return c
}

// deleteAll removes images, and waits until the file system has their space back.
func (t *Trial) deleteAll(ctx context.Context, pulled []Image, empty int64) error {
	unix.Sync()
	full, err := diskUsed(t.disk)
	if err != nil {
		return err
	}
	if full.Bytes <= empty {
		return errors.New("delete: the pulls took no space")
	}
	var answered, back time.Duration
	c, err := t.measure(nil, func() error {
		start := time.Now()
		store := t.Client().ImageService()
		for i, img := range pulled {
			var opts []images.DeleteOpt
			if i == len(pulled)-1 {
				opts = append(opts, images.SynchronousDelete()) // one collection for all, and wait for it
			}
			if err := store.Delete(ctx, img.Ref, opts...); err != nil {
				return fmt.Errorf("remove image %s: %w", img.Ref, err)
			}
		}
		answered = time.Since(start)
		// A file system keeps a little: grown directories and databases.
		goal := empty + (full.Bytes-empty)/50
		for {
			now, err := diskUsed(t.disk)
			if err != nil {
				return err
			}
			if now.Bytes <= goal {
				back = time.Since(start)
				return nil
			}
			if time.Since(start) > 2*time.Minute {
				return fmt.Errorf("delete: %d of %d bytes are not back after two minutes", now.Bytes-empty, full.Bytes-empty)
			}
			if err := sleep(ctx, 2*time.Millisecond); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return err
	}
	t.record("delete", "space back", "s", back.Seconds())
	t.record("delete", "containerd answers", "s", answered.Seconds())
	t.record("delete", "CPU", "s", c.cpu.Seconds())
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
