package blobs

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/log"
)

const (
	// lookEvery is how often Run looks without being asked: leases end, and images lose their mark.
	lookEvery = 10 * time.Minute
	// kickDelay is how long after a commit it looks: after its pull has settled, most likely.
	kickDelay = settleFor + time.Second
	// failedDelay is how long after an error it tries again.
	failedDelay = time.Minute
)

// Committed tells Run that a layer came in. It does not block.
func (t *Trimmer) Committed() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// Watch looks who reads blobs, until ctx ends. Without it everything stays.
func (t *Trimmer) Watch(ctx context.Context) { t.readers.run(ctx) }

// Run lets go of blobs as their layers come in, until ctx ends (blobs = "drop").
func (t *Trimmer) Run(ctx context.Context) {
	// A process that was killed may have left garbage, or pulls that it has not seen the end of.
	next := time.NewTimer(kickDelay)
	defer next.Stop()
	collect := true
	at := time.Now().Add(kickDelay)
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.kick:
			if until := time.Now().Add(kickDelay); until.Before(at) {
				at = until
				next.Reset(kickDelay)
			}
			continue
		case <-next.C:
		}
		wait := t.sweep(ctx, collect)
		collect = false
		at = time.Now().Add(wait)
		next.Reset(wait)
	}
}

// sweep does it once, and returns when to do it again.
func (t *Trimmer) sweep(ctx context.Context, collect bool) time.Duration {
	plan, err := t.Plan(ctx, TrimOptions{Settled: true})
	if err == nil && collect && len(plan.Images) > 0 {
		err = t.Collect(ctx, plan.Images[0].Namespace)
	}
	var done TrimPlan
	if err == nil {
		done, err = t.Execute(ctx, plan)
	}
	switch {
	case ctx.Err() != nil:
		return lookEvery
	case err != nil:
		log.G(ctx).WithError(err).Warn("blobs that no container needs stay in containerd's content store for now")
		return failedDelay
	case plan.unseen != nil && len(plan.Images) > 0:
		log.G(ctx).WithError(plan.unseen).Warn("blobs that no container needs stay in containerd's content store")
	case done.Blobs > 0:
		recipes := 0
		for _, i := range done.Images {
			recipes += i.Recipes
		}
		log.G(ctx).Infof("removed %d blobs, %d bytes, from containerd's content store: their layers are stored here; "+
			"%d of them can be made again without a registry", done.Blobs, done.Bytes, recipes)
		if slices.ContainsFunc(done.Images, func(i TrimImage) bool { return i.Namespace == "moby" && i.Bytes > 0 }) {
			log.G(ctx).Warn("docker save leaves out the layers of these images without an error: before it run " +
				"dedupctl complete --namespace moby IMAGE")
		}
	}
	if !plan.again.IsZero() {
		return min(lookEvery, max(time.Second, time.Until(plan.again)))
	}
	return lookEvery
}
