package snapshotter

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// wanted is the layer that an extraction is for.
type wanted struct {
	target content.ChainID
	parent content.ChainID // zero for a base layer
	// staged: containerd unpacks layers side by side, without their parents (capability "rebase"), and
	// names the parent at Commit. An answer of ErrAlreadyExists would leave the parent out for good.
	staged bool
	// diffID is what the client says, and leads from parent to target; zero when it says nothing that fits.
	diffID content.DiffID
	// blob may be the layer's.
	blob digest.Digest
}

// leads reports whether a layer is the one that is wanted.
func (w wanted) leads(d content.DiffID) bool { return w.parent.Chain(d) == w.target }

// want reads an extraction's labels. They can come from an image's annotations: one is
// believed only when it fits the chainID. ok is false when no layer can be told to be the right one.
func want(ctx context.Context, parent string, labels map[string]string) (w wanted, ok bool) {
	sum, err := content.ParseSum(labels[labelRef])
	if err != nil {
		return w, false
	}
	w.target = content.ChainID{Sum: sum}
	if parent != "" {
		if w.parent, ok = chainOfName(parent); !ok {
			return w, false
		}
	}
	if text := labels[labelParentChain]; text != "" {
		sum, err := content.ParseSum(text)
		chain := content.ChainID{Sum: sum}
		switch {
		case err == nil && parent == "":
			w.parent, w.staged = chain, true
		case err != nil || chain != w.parent:
			log.G(ctx).Warnf("ignoring label %s=%q: the parent is %q", labelParentChain, text, parent)
		}
	}
	if text := labels[labelDiffID]; text != "" {
		sum, err := content.ParseSum(text)
		if d := (content.DiffID{Sum: sum}); err == nil && w.leads(d) {
			w.diffID = d
		} else if base := (wanted{target: w.target}); err == nil && w.staged && base.leads(d) {
			log.G(ctx).Warnf("ignoring label %s=%q: %s is the chainID of a base layer", labelParentChain,
				labels[labelParentChain], labels[labelRef])
			w.parent, w.staged, w.diffID = content.ChainID{}, false, d
		} else {
			log.G(ctx).Warnf("ignoring label %s=%q: it does not lead from parent %q to %s", labelDiffID, text, w.parent,
				w.target.Digest())
		}
	}
	if text := labels[labelCRIDigest]; text != "" {
		if w.blob = digest.Digest(text); w.blob.Validate() != nil {
			log.G(ctx).Warnf("ignoring label %s=%q: it is no digest", labelCRIDigest, text)
			w.blob = ""
		}
	}
	// Whoever names a parent that nobody can check has to name the layer too.
	return w, !w.staged || !w.diffID.IsZero()
}

func (s *Snapshotter) serveKnown(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount,
	error) {
	w, ok := want(ctx, parent, labels)
	if !ok {
		s.counters.answer(doorPrepare, false, reasonUntrusted)
		return nil, nil
	}
	in, reason, ok := s.findLayer(ctx, w)
	if ok && !w.staged { // the parent of a staged one is known at Commit
		if err := s.fits(ctx, in.Layer, parent); err != nil {
			s.layers.Release(in.Layer)
			return nil, fmt.Errorf("layer %s: %w", in.DiffID.Digest(), err)
		}
	}
	hit := ok && reason != reasonIngested
	if ok && s.layers.TakeAhead(in.Layer) {
		hit, reason = false, reasonAhead
	}
	s.counters.answer(doorPrepare, hit, reason)
	if !ok {
		s.missed(ctx, w.target)
		return nil, context.Cause(ctx)
	}
	if w.staged {
		return s.stage(ctx, key, labels, in)
	}
	return nil, s.commitKnown(ctx, key, parent, labels, in)
}

// OnMiss sets what is called when Prepare cannot serve a layer that will be applied: with the namespace, and the chain
// that the layer ends. It must not block.
func (k *known) OnMiss(fn func(ctx context.Context, namespace string, chain content.ChainID)) {
	k.seen.Lock()
	defer k.seen.Unlock()
	k.onMiss = fn
}

func (k *known) missed(ctx context.Context, chain content.ChainID) {
	k.seen.Lock()
	fn := k.onMiss
	if k.advised {
		fn = nil // somebody else's differ unpacks
	}
	k.seen.Unlock()
	ns, err := namespaces.NamespaceRequired(ctx)
	if fn != nil && err == nil {
		fn(ctx, ns, chain)
	}
}

// findLayer returns the wanted layer, held, and why it was found or not.
func (k *known) findLayer(ctx context.Context, w wanted) (in layer.Ingested, reason string, ok bool) {
	if !k.opts.FetchedOnly {
		if d, reason, ok := k.diffIDOf(ctx, w); ok {
			if id, ok := k.layers.Lookup(d); ok {
				if k.opts.Blobs != nil && listsAnother(ctx, k.layers, k.opts.Blobs, w, d) {
					k.layers.Release(id)
					return layer.Ingested{}, reasonBadBlob, false
				}
				return layer.Ingested{Layer: id, DiffID: d}, reason, true
			}
		}
	}
	if k.opts.Blobs == nil {
		return layer.Ingested{}, reasonUnknown, false
	}
	blob, ok, err := k.opts.Blobs.Find(ctx, w.target, w.blob)
	if err != nil {
		log.G(ctx).WithError(err).Warnf("look for the blob of %s", w.target.Digest())
	}
	if !ok {
		return layer.Ingested{}, reasonUnknown, false
	}
	if w.staged {
		// The layers of this image are unpacked side by side, but prepared one after the other.
		in, ok := k.layers.LookupBlob(blob.Digest)
		if ok && !w.leads(in.DiffID) {
			k.layers.Release(in.Layer)
			return layer.Ingested{}, reasonBadBlob, false
		}
		if !ok {
			return layer.Ingested{}, reasonUnknown, false
		}
		return in, reasonBlob, true
	}
	in, err = k.ingestSoon(ctx, blob)
	if errors.Is(err, errLate) {
		return layer.Ingested{}, reasonLate, false
	}
	if err != nil {
		if ctx.Err() == nil { // whoever unpacks it next says what is wrong
			log.G(ctx).WithError(err).Warnf("the blob in the content store for %s cannot be used", w.target.Digest())
		}
		return layer.Ingested{}, reasonBadBlob, false
	}
	if !w.leads(in.DiffID) {
		log.G(ctx).Warnf("ignoring blob %s: its diffID %s does not lead from parent %q to %s", blob.Digest,
			in.DiffID.Digest(), w.parent, w.target.Digest())
		k.layers.Release(in.Layer)
		return layer.Ingested{}, reasonBadBlob, false
	}
	if in.Outcome != layer.Known {
		return in, reasonIngested, true
	}
	return in, reasonBlob, true
}

// listsAnother reports that an image lists, in the place of a known layer, a blob that is known to be another
// one's. Its config and its manifest do not belong together: whoever fetches it is told so, and so is who need not
// fetch it. A blob that nobody here has read may be the same layer, compressed by somebody else.
func listsAnother(ctx context.Context, layers *layer.Store, found *blobs.Store, w wanted, d content.DiffID) bool {
	listed := []digest.Digest{w.blob}
	if part, ok, err := found.Below(ctx, w.target); err == nil && ok {
		listed = append(listed, part.Layers[part.At].Digest)
	}
	for _, blob := range listed {
		in, ok := layers.LookupBlob(blob)
		if !ok {
			continue
		}
		layers.Release(in.Layer)
		if in.DiffID != d {
			log.G(ctx).Warnf("an image names blob %s for diffID %s, but its diffID is %s: "+
				"containerd fetches the blob, and Apply checks it",
				blob, d.Digest(), in.DiffID.Digest())
			return true
		}
	}
	return false
}

// diffIDOf finds the diffID of the wanted layer: from the client, from the image in the content store, or by
// trying all that are known.
func (k *known) diffIDOf(ctx context.Context, w wanted) (d content.DiffID, reason string, ok bool) {
	if !w.diffID.IsZero() {
		return w.diffID, reasonLabel, true
	}
	if k.opts.Blobs != nil {
		d, ok, err := k.opts.Blobs.DiffID(ctx, w.target)
		if err != nil {
			log.G(ctx).WithError(err).Warnf("look for the image of %s", w.target.Digest())
		}
		if ok && w.leads(d) {
			return d, reasonImage, true
		}
	}
	d, ok = k.layers.Infer(w.parent, w.target)
	return d, reasonChain, ok
}

func (s *Snapshotter) commitKnown(ctx context.Context, key, parent string, labels map[string]string,
	in layer.Ingested) error {
	ns, _ := namespaces.Namespace(ctx)
	target := labels[labelRef]
	labels = maps.Clone(labels)
	maps.Copy(labels, s.claim(in.Layer))
	labels[labelNamespace] = ns
	name := hitName(ns, parent, target)
	err := s.db.update(ctx, func(ctx context.Context) error {
		if _, _, _, err := getInfo(ctx, name); err == nil {
			return errdefs.ErrAlreadyExists // served before, to the same namespace
		}
		if _, err := createSnapshot(ctx, snapshots.KindActive, key, parent, nil); err != nil {
			return err
		}
		s.refs.add(target, name)
		return commitActive(ctx, key, name, "", snapshots.Usage{}, labels)
	})
	if err != nil {
		s.release(labels)
	}
	s.step("known.recorded")
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("commit known layer %s as %q: %w", in.Layer, name, err)
	}
	log.G(ctx).WithField("diffID", in.DiffID.Digest()).Debugf("served %s from known layer %s", target, in.Layer)
	s.scheduleBuild(ctx, name)
	return fmt.Errorf("layer %s is known: %w", in.DiffID.Digest(), errdefs.ErrAlreadyExists)
}

// hitName is the same for the same target on the same parent in the same namespace, so that
// two clients who meet share one snapshot. It ends in the chainID, as containerd's names do.
func hitName(namespace, parent, target string) string {
	h := sha256.Sum256([]byte(parent))
	return fmt.Sprintf("%s/known-%x/%s", namespace, h[:8], target)
}

func (s *Snapshotter) stage(ctx context.Context, key string, labels map[string]string,
	in layer.Ingested) ([]mount.Mount, error) {
	labels = maps.Clone(labels)
	maps.Copy(labels, s.claim(in.Layer))
	labels[labelStaged] = "true"
	var id string
	err := s.db.update(ctx, func(ctx context.Context) (err error) {
		if id, err = createSnapshot(ctx, snapshots.KindActive, key, "", labels); err == nil {
			s.ids.add(id, key)
		}
		return err
	})
	if err != nil {
		s.release(labels)
		return nil, fmt.Errorf("create snapshot %q: %w", key, err)
	}
	if err := s.restoreDirs(id, below{}); err != nil {
		return nil, errors.Join(fmt.Errorf("create snapshot %q: %w", key, err), s.Remove(context.WithoutCancel(ctx), key))
	}
	log.G(ctx).WithField("diffID", in.DiffID.Digest()).Debugf("staged %s from known layer %s", labels[labelRef], in.Layer)
	return s.stagedMounts(ctx, id)
}

// stagedMounts have a whole overlay, so that a containerd that does not know what read-only means here, and
// fetches the blob, still finds its way to our diff service.
func (m *mounter) stagedMounts(ctx context.Context, id string) ([]mount.Mount, error) {
	mounts, err := m.mounts(ctx, snapshots.KindActive, id, below{dir: m.path(dirEmpty)})
	mounts[0].Options = append(mounts[0].Options, "ro")
	return mounts, err
}
