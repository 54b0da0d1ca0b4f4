package bench

import (
	"context"
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
	more := func(scenario string, list []Image, needed bool) (sum cost, err error) {
		if !needed || len(list) == 0 {
			return sum, nil
		}
		for _, img := range list {
			c, err := t.pull(ctx, img)
			if err != nil {
				return sum, err
			}
			sum = sum.plus(c)
			pulled = append(pulled, img)
		}
		t.recordPull(scenario, sum)
		return sum, nil
	}
	rebuilt, err := more("rebuild", seq.rebuild, t.wants("rebuild") || t.wants("delete"))
	if err != nil {
		return err
	}
	if _, err := more("known", seq.known, t.wants("known")); err != nil {
		return err
	}
	if err := t.recordNode(ctx, "rebuild", rebuilt, seq.rebuild); err != nil {
		return err
	}
	if !t.wants("delete") {
		return nil
	}
	if t.wants("rebuild") { // whose blobs are removed with it
		if err := t.fetchBlobs(ctx, seq.rebuild); err != nil {
			return err
		}
	}
	if t.wants("known") { // it holds layers of the others
		for _, img := range seq.known {
			if err := t.Client().ImageService().Delete(ctx, img.Ref, images.SynchronousDelete()); err != nil {
				return fmt.Errorf("remove image %s: %w", img.Ref, err)
			}
		}
		pulled = pulled[:len(pulled)-len(seq.known)]
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

// deleteAll removes the first image while the others stay, as an update does, and then all others.
func (t *Trial) deleteAll(ctx context.Context, pulled []Image, empty int64) error {
	if len(pulled) > 1 {
		if err := t.deleteImages(ctx, pulled[:1], "one image of several", empty, false); err != nil {
			return err
		}
		pulled = pulled[1:]
	}
	return t.deleteImages(ctx, pulled, "the last images", empty, true)
}

// deleteImages removes images and waits until the file system has their space back: all of it
// (last), or until the file system has not changed for a while.
func (t *Trial) deleteImages(ctx context.Context, list []Image, what string, empty int64, last bool) error {
	unix.Sync()
	full, err := diskUsed(t.disk)
	if err != nil {
		return err
	}
	var answered, back time.Duration
	c, err := t.measure(nil, func() error {
		start := time.Now()
		store := t.Client().ImageService()
		for i, img := range list {
			var opts []images.DeleteOpt
			if i == len(list)-1 {
				opts = append(opts, images.SynchronousDelete()) // one collection for all, and wait for it
			}
			if err := store.Delete(ctx, img.Ref, opts...); err != nil {
				return fmt.Errorf("remove image %s: %w", img.Ref, err)
			}
		}
		answered = time.Since(start)
		back, err = t.spaceBack(ctx, start, full.Bytes, empty, last)
		return err
	})
	if err != nil {
		return err
	}
	t.record("delete", what+": space back", "s", back.Seconds())
	t.record("delete", what+": containerd answers", "s", answered.Seconds())
	t.record("delete", what+": CPU", "s", c.cpu.Seconds())
	return nil
}

// spaceBack returns when, after start, the last space came back.
func (t *Trial) spaceBack(ctx context.Context, start time.Time, full, empty int64, last bool) (time.Duration, error) {
	used, changed := full, time.Since(start)
	for {
		now, err := diskUsed(t.disk)
		if err != nil {
			return 0, err
		}
		since := time.Since(start)
		if now.Bytes != used {
			used, changed = now.Bytes, since
		}
		// A file system keeps a little: grown directories and databases.
		done := used <= empty+max((full-empty)/50, 1<<20)
		if !last {
			done = since-changed > background
		}
		if done {
			return changed, nil
		}
		if since > 2*time.Minute {
			return 0, fmt.Errorf("delete: %d of %d bytes are not back after two minutes", used-empty, full-empty)
		}
		if err := sleep(ctx, 2*time.Millisecond); err != nil {
			return 0, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
