package blobs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// Execute lets go of what a plan has found, and waits until containerd has collected it. What has changed since the
// plan counts: blobs of a layer that is not whole any more, or that a client has leased or read meanwhile, stay. It
// returns what has gone.
func (t *Trimmer) Execute(ctx context.Context, plan TrimPlan) (done TrimPlan, err error) {
	t.executing.Lock()
	defer t.executing.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.totals.Blobs, t.totals.Bytes = t.totals.Blobs+int64(done.Blobs), t.totals.Bytes+done.Bytes
		if err != nil {
			t.totals.Errors++
		}
	}()
	if err := t.keepRecipes(ctx, plan); err != nil {
		return done, err
	}
	held, err := t.hold(ctx, plan)
	if err != nil {
		return done, errors.Join(err, t.letGo(ctx, held, false))
	}
	released, err := t.release(ctx, plan)
	err = errors.Join(err, t.letGo(ctx, held, err == nil && len(released) > 0))
	if err != nil {
		return done, err
	}
	if len(released) == 0 {
		return TrimPlan{Images: plan.Images}, nil
	}
	t.step("trim.collected")
	return t.gone(ctx, plan)
}

// release takes the references off that keep what a plan has found, and puts those back that are needed after all.
func (t *Trimmer) release(ctx context.Context, plan TrimPlan) (released []*TrimImage, err error) {
	for at := range plan.Images {
		i := &plan.Images[at]
		if len(i.refs) == 0 {
			continue
		}
		ok, err := t.setRefs(ctx, i, false)
		if err != nil {
			return nil, errors.Join(err, t.restore(ctx, released, plan.at))
		}
		if ok {
			released = append(released, i)
			t.step("trim.released")
		}
	}
	if len(released) == 0 {
		return nil, nil
	}
	return released, t.restore(ctx, released, plan.at)
}

// restore puts references back where the blobs turn out to be needed after all, also for a caller who has gone.
func (t *Trimmer) restore(ctx context.Context, released []*TrimImage, planned time.Time) error {
	ctx = context.WithoutCancel(ctx)
	graphs, err := t.catalog.graphs(ctx)
	var stored Stored
	if err == nil {
		stored, err = t.stored(ctx)
	}
	if err == nil {
		err = t.readers.look(ctx)
	}
	for _, i := range released {
		why := err
		if why == nil {
			why = i.needed(graphs, stored)
		}
		if why == nil {
			why = t.readSince(i, planned)
		}
		if why == nil {
			continue
		}
		if _, rerr := t.setRefs(ctx, i, true); rerr != nil {
			return errors.Join(err, rerr)
		}
		i.KeptBlobs, i.KeptBytes, i.Kept = i.KeptBlobs+i.Blobs, i.KeptBytes+i.Bytes, why.Error()
		i.Blobs, i.Bytes, i.Recipes = 0, 0, 0
	}
	return err
}

// readSince says that somebody has read what belongs to an image.
func (t *Trimmer) readSince(i *TrimImage, planned time.Time) error {
	for d := range i.reads(false) {
		if t.readers.last(d, time.Time{}).After(planned) {
			return errors.New(beingRead)
		}
	}
	return nil
}

// needed says why an image needs its blobs after all.
func (i *TrimImage) needed(graphs []*graph, stored Stored) error {
	for at := range i.image.Layers {
		if !slices.Contains(slices.Collect(maps.Values(i.refs)), i.image.Layers[at].Digest.String()) {
			continue
		}
		if _, err := stored(i.Namespace, i.image.Chains[at], i.image.DiffIDs[at]); err != nil {
			return err
		}
	}
	for _, g := range graphs {
		if g.namespace != i.Namespace {
			continue
		}
		for _, l := range g.leases {
			if slices.Contains(g.leased(l), i.Manifest) {
				return errors.New(inUse)
			}
		}
	}
	return nil
}

// setRefs takes the references off, or puts them back. ok is false when there is no such manifest any more.
func (t *Trimmer) setRefs(ctx context.Context, i *TrimImage, back bool) (ok bool, err error) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, i.Namespace), answerTimeout)
	defer cancel()
	info := ctdcontent.Info{Digest: i.Manifest, Labels: map[string]string{}}
	var fields []string
	for key, value := range i.refs {
		if !back {
			value = "" // which removes it
		}
		info.Labels[key] = value
		fields = append(fields, "labels."+key)
	}
	if _, err := t.catalog.content.Update(ctx, info, fields...); err != nil && !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("references of manifest %s in namespace %s: %w", i.Manifest, i.Namespace, err)
	} else if err != nil {
		return false, nil
	}
	return true, nil
}

// gone leaves in a plan what is not there any more.
func (t *Trimmer) gone(ctx context.Context, plan TrimPlan) (TrimPlan, error) {
	graphs, err := t.catalog.graphs(ctx)
	if err != nil {
		return TrimPlan{}, err
	}
	plan.Blobs, plan.Bytes = 0, 0
	for d, size := range plan.going {
		if slices.ContainsFunc(graphs, func(g *graph) bool { return g.blobs[d] != nil }) {
			continue // somebody has come to need it
		}
		plan.Blobs, plan.Bytes = plan.Blobs+1, plan.Bytes+size
	}
	return plan, nil
}
