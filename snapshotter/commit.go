package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// buildDelay is how long a committed layer waits for another one on top of it before its
// chain image is built. containerd prepares the next layer right after a commit.
const buildDelay = 30 * time.Millisecond

// Layers is the store behind the snapshots, for the diff service.
func (rep *reports) Layers() *layer.Store { return rep.layers }

// Extraction returns the upper directory of mounts that this snapshotter handed out for an
// extraction into which nothing has been written. A layer may be noted for no other
// snapshot: what is in the directory of one would be lost.
func (s *Snapshotter) Extraction(ctx context.Context, mounts []mount.Mount) (upper string, ok bool, err error) {
	defer s.explain(&err)
	upper, ok = s.upperOf(mounts)
	if !ok {
		return "", false, nil
	}
	err = s.db.view(ctx, func(ctx context.Context) error {
		key, info, err := s.activeByID(ctx, idOfUpper(upper))
		ok = err == nil && isExtraction(key, info.Labels)
		return err
	})
	if errdefs.IsNotFound(err) || !ok {
		return "", false, nil
	}
	files, err := os.ReadDir(upper)
	return upper, len(files) == 0, err
}

// activeByID finds an active snapshot. In a transaction.
func (s *store) activeByID(ctx context.Context, id string) (key string, info snapshots.Info, err error) {
	for _, key := range s.ids.get(id) {
		have, info, _, err := getInfo(ctx, key)
		switch {
		case errdefs.IsNotFound(err):
		case err != nil:
			return "", info, err
		case have == id && info.Kind == snapshots.KindActive:
			return key, info, nil
		}
	}
	return "", info, fmt.Errorf("active snapshot with id %s: %w", id, errdefs.ErrNotFound)
}

func idOfUpper(upper string) string { return filepath.Base(filepath.Dir(upper)) }

func (s *store) upperOf(mounts []mount.Mount) (string, bool) {
	if len(mounts) == 0 || mounts[0].Type != "overlay" {
		return "", false
	}
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir, dir == s.upper(idOfUpper(dir))
		}
	}
	return "", false
}

// Applied notes that the active snapshot with this upper directory stands for a layer. The
// hold that in.Layer carries passes to the snapshot, also when an error is returned.
func (s *Snapshotter) Applied(ctx context.Context, upper string, in layer.Ingested) (err error) {
	defer s.explain(&err)
	id := idOfUpper(upper)
	var old snapshots.Info
	err = s.db.view(ctx, func(ctx context.Context) (err error) {
		_, old, err = s.activeByID(ctx, id)
		return err
	})
	if err == nil && !parentLater(old) {
		err = s.fits(ctx, in.Layer, old.Parent)
	}
	if err != nil {
		s.layers.Release(in.Layer)
		return fmt.Errorf("layer %s: %w", in.DiffID.Digest(), err)
	}
	private := s.claim(in.Layer)
	err = s.db.update(ctx, func(ctx context.Context) (err error) {
		var key string
		if key, old, err = s.activeByID(ctx, id); err != nil {
			return err
		}
		return setPrivate(ctx, key, id, private)
	})
	if err != nil {
		s.release(private)
		return fmt.Errorf("note layer of snapshot: %w", err)
	}
	s.release(old.Labels)
	s.step("applied.noted")
	s.countIngest(doorApply, in)
	s.seen.Lock()
	s.applied = true
	s.seen.Unlock()
	return nil
}

// parentLater reports whether containerd unpacks layers side by side, and names the parent of this one at Commit.
func parentLater(active snapshots.Info) bool {
	return active.Parent == "" && active.Labels[labelParentChain] != ""
}

// fits returns an error when a held layer cannot lie on a parent. Unless it has hard links into lower layers that is
// known at once.
func (g *ingester) fits(ctx context.Context, id content.LayerID, parent string) error {
	err := g.layers.Fits(ctx, id, func() ([]content.LayerID, error) { return g.resolve(ctx, parent) })
	if errors.Is(err, tree.ErrUnfit) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

func (k *known) usesApply() bool {
	k.seen.Lock()
	defer k.seen.Unlock()
	return k.applied
}

// Commit turns an active snapshot into a committed one. containerd calls it inside a write
// transaction of its own, so a directory is only noted here and ingested right after.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	defer s.explain(&err)
	base, err := clientLabels(opts)
	if err != nil {
		return err
	}
	var id string
	var active snapshots.Info
	err = s.db.view(ctx, func(ctx context.Context) error {
		id, active, _, err = getInfo(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	lid, applied := layerOf(active)
	if applied && (base.Parent != "" || parentLater(active)) {
		if err := s.fits(ctx, lid, cmp.Or(base.Parent, active.Parent)); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
	}
	var usage snapshots.Usage
	labels := withCompared(maps.Clone(base.Labels), active.Labels)
	if applied {
		labels = withPrivate(labels, active.Labels)
		for _, l := range []string{labelUpdated, labelStaged} {
			delete(labels, l)
		}
	} else {
		labels[labelPending] = "true"
		if !isExtraction(key, active.Labels) && !s.kernel.Metacopy {
			labels[labelPending] = pendingStep
		}
		if err := s.makeLate(ctx, key, id, active); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		// metadata.db is about to say that the directory is a layer: after a power cut it has to be.
		if err := s.layers.Sync(); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		du, err := cfs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return fmt.Errorf("commit snapshot %q: %w", key, err)
		}
		usage = snapshots.Usage(du)
	}
	labels[labelNamespace], _ = namespaces.Namespace(ctx)
	err = s.db.update(ctx, func(ctx context.Context) error {
		if ref := labels[labelRef]; ref != "" {
			s.refs.add(ref, name)
		}
		return commitActive(ctx, key, name, base.Parent, usage, labels)
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q as %q: %w", key, name, err)
	}
	s.step("commit.recorded")
	s.ids.remove(id, key)
	s.unuse(ctx, id)
	extraction := isExtraction(key, active.Labels)
	switch p := (pendingSnapshot{id, name}); labels[labelPending] {
	case pendingStep:
		s.waits(p)
	case "":
		if err := s.discard(ctx, id); err != nil {
			s.counters.removeError()
			log.G(ctx).WithError(err).Warn("an applied snapshot's directory stays until the next cleanup")
		}
	default:
		s.startIngest(p)
		if extraction {
			s.advise(ctx)
		}
	}
	s.leave(ctx, id) // those below are ingested with this one
	if extraction {
		s.scheduleBuild(ctx, name)
	}
	return nil
}

// advise tells, once, what to configure when layers do not come through our diff service.
func (k *known) advise(ctx context.Context) {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.applied = false // the next one may look at its parent's directories
	if k.advised {
		return
	}
	k.advised = true
	log.G(ctx).Warn("a layer was unpacked by another differ, so each of its files was written and read one time too " +
		"many. " +
		"Add the differ to containerd's config.toml: [proxy_plugins.dedup-diff] type = \"diff\", address = this daemon's " +
		"socket; " +
		"\"dedup-diff\" first in default of [plugins.\"io.containerd.service.v1.diff-service\"]; " +
		"and differ = \"dedup-diff\" beside snapshotter = \"dedup\" in unpack_config of " +
		"[plugins.\"io.containerd.transfer.v1.local\"]")
}

// scheduleBuild builds the chain image of a committed snapshot: at once where it is known to be all of an
// image, not at all where it is known to be a part, else soon, unless another layer is put on top of it before.
func (s *Snapshotter) scheduleBuild(ctx context.Context, name string) {
	if s.opts.Committed != nil {
		s.opts.Committed()
	}
	delay := buildDelay
	if chain, ok := chainOfName(name); ok && s.opts.Blobs != nil {
		ns, _ := namespaces.Namespace(ctx)
		switch whole, part := s.opts.Blobs.Ends(ns, chain); {
		case whole:
			delay = 0
		case part:
			return
		}
	}
	s.buildImage(ctx, name, delay)
}

// isGone tells an error of something that was removed meanwhile.
func isGone(err error) bool { return errdefs.IsNotFound(err) || errors.Is(err, fs.ErrNotExist) }

// pendingSnapshot is a committed snapshot whose directory is not yet ingested. The name can be taken
// again by another one after a Remove, the id cannot.
type pendingSnapshot struct{ id, name string }

// ingestJob is the running ingest of one pending snapshot.
type ingestJob struct {
	done chan struct{} // closed when err is set
	err  error
}

// pending are the committed snapshots whose directories are not yet ingested.
func (r records) pending() (all []pendingSnapshot) {
	for _, sn := range r.whole {
		if sn.Labels[labelPending] != "" {
			all = append(all, pendingSnapshot{sn.id, sn.Name})
		}
	}
	return all
}

func (g *ingester) startIngest(p pendingSnapshot) *ingestJob {
	g.mu.Lock()
	defer g.mu.Unlock()
	if j := g.ingests[p.id]; j != nil {
		return j
	}
	j := &ingestJob{done: make(chan struct{})}
	if g.closed {
		j.err = lower.ErrClosed
		close(j.done)
		return j
	}
	g.ingests[p.id] = j
	g.wg.Go(func() {
		err := g.ingest(g.ctx, p)
		if err != nil && g.ctx.Err() == nil {
			log.G(g.ctx).WithError(err).Errorf("ingest of committed snapshot %q", p.name)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.ingests, p.id)
		j.err = err
		close(j.done)
	})
	return j
}

// awaitIngest waits until a snapshot is no longer pending. A failed ingest is tried again by the
// next one who needs it.
func (g *ingester) awaitIngest(ctx context.Context, p pendingSnapshot) error {
	j := g.startIngest(p)
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ingest turns the directory of a pending snapshot into its layer.
func (g *ingester) ingest(ctx context.Context, p pendingSnapshot) error {
	var id string
	var info snapshots.Info
	err := g.db.view(ctx, func(ctx context.Context) (err error) {
		id, info, _, err = getInfo(ctx, p.name)
		return err
	})
	switch {
	case errdefs.IsNotFound(err), err == nil && id != p.id:
		return nil // removed meanwhile
	case err != nil:
		return err
	case info.Labels[labelPending] == "":
		return nil
	}
	in, err := g.ingestDir(ctx, id, info.Parent)
	if err != nil {
		if g.vanished(ctx, p.name, id) {
			return nil
		}
		return err
	}
	g.step("pending.ingested")
	g.countIngest(doorCommit, in)
	private := g.claim(in.Layer)
	private[labelPending] = ""
	err = g.db.update(ctx, func(ctx context.Context) error {
		return setPrivate(ctx, p.name, id, private)
	})
	if err != nil {
		g.release(private)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("note layer of snapshot %q: %w", p.name, err)
	}
	g.step("pending.noted")
	g.waitsNoMore(id)
	if g.steps.keep(id) {
		return nil
	}
	return g.discard(ctx, id)
}

func (g *ingester) ingestDir(ctx context.Context, id, parent string) (_ layer.Ingested, err error) {
	dir := layer.Dir{Upper: g.upper(id)}
	if g.kernel.Metacopy && parent != "" {
		// Files whose metadata alone was changed have no bytes in the upper directory.
		chain, err := g.resolve(ctx, parent)
		if err != nil {
			return layer.Ingested{}, err
		}
		g.chains.Users.Use(g.chains.Name(chain, lower.Plain), id)
		defer g.unuse(ctx, id)
		have, err := g.chains.Ensure(ctx, chain, lower.Plain)
		if err != nil {
			return layer.Ingested{}, err
		}
		if dir.View, err = os.MkdirTemp(g.opts.RunDir, viewPrefix); err != nil {
			return layer.Ingested{}, err
		}
		options, err := g.kernel.Overlay(lower.Stack{Lower: []string{g.upper(id), have.Chain}, Packs: have.Packs})
		if err != nil {
			return layer.Ingested{}, errors.Join(err, os.Remove(dir.View))
		}
		m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
		if err := m.Mount(dir.View); err != nil {
			return layer.Ingested{}, errors.Join(err, os.Remove(dir.View))
		}
		defer func() {
			err = errors.Join(err, mount.UnmountAll(dir.View, 0), os.Remove(dir.View))
		}()
	}
	return g.layers.IngestDir(ctx, dir)
}
