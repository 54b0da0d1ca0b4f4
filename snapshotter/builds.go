package snapshotter

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// containerd holds a lock of its snapshotter while Prepare runs, for readers only. But its garbage collection waits
// for it, and then everybody else behind that. So Prepare must not take long, whatever it waits for: an ingest, a
// repair, a chain image. Apply and Mounts hold no lock.
const (
	// ingestPatience is how long Prepare waits for an ingest. Apply joins one that takes longer.
	ingestPatience = 500 * time.Millisecond
	// belowPatience is how long Prepare waits for what lies below a container. It is long, since clients may use what
	// Prepare answers without asking Mounts: only one that asks Mounts can start after a build that takes longer.
	belowPatience = 10 * time.Second
)

// Builds are the chain images that are being built.
func (rep *reports) Builds() lower.Work { return rep.chains.Work() }

// buildJob is work in the background for one snapshot. It ends early when the snapshot is removed.
type buildJob struct {
	timer  *time.Timer
	cancel context.CancelFunc
	done   chan struct{} // closed when err is set
	err    error
}

func (t *tasks) startJob(ctx context.Context, name string, delay time.Duration,
	fn func(context.Context) error) *buildJob {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	j := &buildJob{cancel: cancel, done: make(chan struct{})}
	run := func(stop context.Context) {
		defer cancel()
		defer context.AfterFunc(stop, cancel)()
		j.err = lower.Safely(func() error { return fn(ctx) })
		close(j.done)
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.jobs[name] == j {
			delete(t.jobs, name)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		cancel()
		return nil
	}
	if old := t.jobs[name]; old != nil {
		old.stop()
	}
	t.jobs[name] = j
	if delay == 0 {
		t.wg.Go(func() { run(t.ctx) })
		return j
	}
	j.timer = time.AfterFunc(delay, func() { t.background(run) })
	return j
}

// stop ends a job.
func (j *buildJob) stop() {
	if j.timer != nil {
		j.timer.Stop()
	}
	j.cancel()
}

// abandon ends the job of a snapshot that is gone, and calls after when it has ended.
func (t *tasks) abandon(name string, after func(context.Context)) {
	t.mu.Lock()
	j := t.jobs[name]
	waiting := j != nil && j.timer != nil && j.timer.Stop()
	if j != nil {
		j.cancel()
		delete(t.jobs, name)
	}
	t.mu.Unlock()
	if j == nil || waiting {
		after(t.ctx)
		return
	}
	t.background(func(ctx context.Context) {
		<-j.done
		after(ctx)
	})
}

// settled waits for the job of a snapshot, if it has one.
func (t *tasks) settled(ctx context.Context, name string) error {
	t.mu.Lock()
	j := t.jobs[name]
	t.mu.Unlock()
	if j == nil {
		return nil
	}
	select {
	case <-j.done:
		return nil // who needs what it was for finds out what is wrong
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// cancelBuild keeps a job from being begun.
func (t *tasks) cancelBuild(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if j := t.jobs[name]; j != nil && j.timer != nil && j.timer.Stop() {
		j.cancel()
		delete(t.jobs, name)
	}
}

// buildImage builds the chain image of a committed snapshot.
func (s *Snapshotter) buildImage(ctx context.Context, name string, delay time.Duration) {
	s.startJob(ctx, name, delay, func(ctx context.Context) error {
		chain, err := s.resolve(ctx, name)
		if err == nil {
			err = s.chains.Build(ctx, chain, lower.Plain)
		}
		if err == nil && s.mapped.Load() {
			err = s.chains.Build(ctx, chain, lower.Mapped)
		}
		if err != nil && !isGone(err) && ctx.Err() == nil {
			log.G(ctx).WithError(err).Errorf("build chain image of %q", name)
		}
		return err
	})
}

// belowSoon is below for a snapshot that was just created. For one that a container is about to write to it does not
// take longer than patience: late tells that what lies below is not there yet. The work goes on, and Mounts waits for
// it. A view and an extraction wait as long as it takes: clients use what they are told at once, and do not ask again.
func (m *mounter) belowSoon(ctx context.Context, key string, c creation) (l below, late bool, err error) {
	if c.extraction || c.view || c.parent == "" {
		l, err = m.below(ctx, c)
		return l, false, err
	}
	var found below
	j := m.startJob(ctx, key, 0, func(ctx context.Context) (err error) {
		found, err = m.below(ctx, c)
		return err
	})
	if j == nil {
		return below{}, false, lower.ErrClosed
	}
	timer := time.NewTimer(m.belowPatience)
	defer timer.Stop()
	select {
	case <-j.done:
		return found, false, j.err
	case <-ctx.Done():
		return below{}, false, context.Cause(ctx) // the caller removes the snapshot, which ends the job
	case <-timer.C:
	}
	log.G(ctx).Infof("the layers below snapshot %q are not ready yet: Mounts waits for them", key)
	return below{dir: m.path(dirAbsent), chain: true, ids: c.ids}, true, nil
}

// dirAbsent is never there, so that nothing mounts over it.
const dirAbsent = "not-built-yet"

// creation is what create is asked for.
type creation struct {
	id, parent       string
	extraction, view bool
	ids              idMap    // how owners are mapped
	over             []string // ids of the steps that it lies over, the topmost first
}

// recreation is what create was asked for when it made a stored snapshot.
func recreation(id, key string, info snapshots.Info) creation {
	return creation{
		id: id, parent: info.Parent, extraction: isExtraction(key, info.Labels), ids: idMapOf(info), over: overOf(info),
	}
}

// lateHold is how long an ingest that Prepare did not wait for is kept going, and its layer kept, until Apply comes
// for it.
const lateHold = 10 * time.Second

var errLate = errors.New("the ingest takes longer than Prepare may")

// ingestSoon ingests a blob within ingestPatience. One that takes longer goes on, for the Apply that follows to join.
func (k *known) ingestSoon(ctx context.Context, b layer.Blob) (layer.Ingested, error) {
	type result struct {
		in  layer.Ingested
		err error
	}
	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	done, taken := make(chan result, 1), make(chan bool, 1)
	started := k.background(func(stop context.Context) {
		defer cancel(nil)
		defer context.AfterFunc(stop, func() { cancel(lower.ErrClosed) })()
		var r result
		r.err = lower.Safely(func() (err error) {
			r.in, err = k.layers.IngestBlob(own, b)
			return err
		})
		done <- r
		if r.err != nil || <-taken {
			return
		}
		k.handOver(own, r.in.Layer)
	})
	if !started {
		return layer.Ingested{}, lower.ErrClosed
	}
	timer := time.NewTimer(k.ingestPatience)
	defer timer.Stop()
	select {
	case r := <-done:
		taken <- true
		return r.in, r.err
	case <-ctx.Done():
		cancel(context.Cause(ctx))
		taken <- false
		return layer.Ingested{}, context.Cause(ctx)
	case <-timer.C:
	}
	taken <- false
	if !k.unpacks() {
		cancel(errLate) // somebody else's differ is about to do it again
	}
	time.AfterFunc(lateHold, func() { cancel(errLate) })
	return layer.Ingested{}, errLate
}

// handOver releases a layer as soon as somebody else has taken it up, and when ctx ends.
func (k *known) handOver(ctx context.Context, id content.LayerID) {
	const poll = 15 * time.Millisecond
	for ctx.Err() == nil && k.layers.Taken(id) < 2 {
		select {
		case <-time.After(poll):
		case <-ctx.Done():
		}
	}
	k.layers.Release(id)
}

// unpacks reports whether layers come through our diff service, as far as that is known.
func (k *known) unpacks() bool {
	k.seen.Lock()
	defer k.seen.Unlock()
	return !k.advised
}
