package compare

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/epoch"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// Comparer is a diff.Comparer. Safe for concurrent use.
type Comparer struct {
	snapshots *snapshotter.Snapshotter
	store     ctdcontent.Store
	leases    leases.Manager

	mu     sync.Mutex       // guards shared
	shared map[string]lease // by namespace
}

// lease is one of containerd's that blobs share.
type lease struct {
	id    string
	until time.Time // takes blobs, by the wall clock, as containerd counts; the other stands still while a machine sleeps
}

// New returns a comparer for the mounts of s that writes to the content store of the containerd that calls.
func New(s *snapshotter.Snapshotter, store ctdcontent.Store, l leases.Manager) *Comparer {
	return &Comparer{snapshots: s, store: store, leases: l, shared: map[string]lease{}}
}

// Compare writes what upper adds to lower to the content store. What is not ours to serve is ErrNotImplemented, so
// that containerd asks its next differ: other mounts, other media types.
func (c *Comparer) Compare(
	ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt,
) (ocispec.Descriptor, error) {
	var config diff.Config
	for _, opt := range opts {
		if err := opt(&config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if config.SourceDateEpoch == nil {
		config.SourceDateEpoch = epoch.FromContext(ctx)
	}
	compressor, err := compressorOf(&config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	pair, err := snapshotter.OpenPair(ctx, c.snapshots, lower, upper)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := c.compare(ctx, pair, config, compressor)
	if cerr := pair.Close(); cerr != nil {
		log.G(ctx).WithError(cerr).Warn("what was mounted to compare snapshots stays mounted until the next start")
	}
	return desc, err
}

// compressorOf fills in the media type, and says how it is compressed.
func compressorOf(config *diff.Config) (compression.Compression, error) {
	if config.Compressor != nil { // none comes through a socket
		return 0, fmt.Errorf("dedup-diff does not take compressors: %w", errdefs.ErrNotImplemented)
	}
	if config.MediaType == "" {
		config.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	switch config.MediaType {
	case ocispec.MediaTypeImageLayer:
		return compression.Uncompressed, nil
	case ocispec.MediaTypeImageLayerGzip:
		return compression.Gzip, nil
	case ocispec.MediaTypeImageLayerZstd:
		return compression.Zstd, nil
	}
	return 0, fmt.Errorf("dedup-diff does not write media type %q: %w", config.MediaType, errdefs.ErrNotImplemented)
}

// leaseTime is how long containerd keeps a blob, at least, for a caller whose lease it did not pass on. Once the caller
// knows the blob, it refers to it from a manifest or under its lease. A lease is a write to containerd's database and
// a sync: the layers of a build share one, which takes blobs for leaseShared.
const (
	leaseTime   = 15 * time.Minute
	leaseShared = 5 * time.Minute
)

// leased puts what is written under the caller's lease. containerd passes it on when it calls by itself, and loses that
// of a client: without one of our own the next garbage collection would remove the blob. shared is the id of that.
func (c *Comparer) leased(ctx context.Context) (_ context.Context, shared string, err error) {
	if id, ok := leases.FromContext(ctx); ok {
		return leases.WithLease(ctx, id), "", nil
	}
	ns, _ := namespaces.Namespace(ctx)
	c.mu.Lock()
	have := c.shared[ns]
	c.mu.Unlock()
	if time.Now().After(have.until) {
		l, err := c.leases.Create(ctx, leases.WithID("dedup-compare-"+rand.Text()),
			leases.WithExpiration(leaseTime+leaseShared))
		if err != nil {
			return ctx, "", fmt.Errorf("lease for a layer: %w", err)
		}
		have = lease{l.ID, time.Now().Add(leaseShared).Round(0)}
		c.mu.Lock()
		c.shared[ns] = have
		c.mu.Unlock()
	}
	return leases.WithLease(ctx, have.id), have.id, nil
}

// forget has the next blob get a new lease.
func (c *Comparer) forget(ctx context.Context, shared string) {
	ns, _ := namespaces.Namespace(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shared[ns].id == shared {
		delete(c.shared, ns)
	}
}

func (c *Comparer) compare(
	ctx context.Context, pair *snapshotter.Pair, config diff.Config, as compression.Compression,
) (ocispec.Descriptor, error) {
	where, err := namesOf(ctx, pair) // before containerd knows of a blob
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ctx, w, discard, err := c.begin(ctx, config)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	out := newOutput(ctx, c.snapshots.Layers(), w, as)
	var blob digest.Digest
	diffID, isNew := "", false
	if err = out.write(pair, where, config.SourceDateEpoch); err == nil {
		blob = w.Digest()
		if as != compression.Uncompressed {
			diffID = out.diffID().String()
		}
		isNew, err = commit(ctx, w, blob, config.Labels, diffID)
	}
	if err != nil {
		return ocispec.Descriptor{}, errors.Join(err, out.abandon(err), discard())
	}
	out.keep(pair, blob)
	if err := w.Close(); err != nil {
		log.G(ctx).WithError(err).Warnf("close the writer of blob %s", blob)
	}
	desc := ocispec.Descriptor{MediaType: config.MediaType, Digest: blob, Size: out.size}
	if isNew && diffID != "" {
		return desc, nil
	}
	return c.describe(ctx, desc, diffID)
}

// begin begins a blob under a lease, which the ctx that it returns has. Somebody may have removed one that is shared.
func (c *Comparer) begin(ctx context.Context, config diff.Config) (
	own context.Context, w ctdcontent.Writer, discard func() error, err error,
) {
	for range 2 {
		var shared string
		if own, shared, err = c.leased(ctx); err != nil {
			return own, nil, nil, err
		}
		w, discard, err = c.writer(own, config)
		if !errdefs.IsNotFound(err) || shared == "" {
			break
		}
		c.forget(ctx, shared)
	}
	return own, w, discard, err
}

// writer begins a blob. discard gives up one that is not to be committed. The caller's reference stays with containerd
// then, as it does with the walking differ: whoever begins again under it finds it empty.
func (c *Comparer) writer(
	ctx context.Context, config diff.Config,
) (w ctdcontent.Writer, discard func() error, err error) {
	ref := config.Reference
	if ref == "" {
		ref = "dedup-compare-" + rand.Text()
	}
	desc := ocispec.Descriptor{MediaType: config.MediaType}
	w, err = c.store.Writer(ctx, ctdcontent.WithRef(ref), ctdcontent.WithDescriptor(desc))
	if err != nil {
		return nil, nil, fmt.Errorf("open a writer in containerd's content store: %w", err)
	}
	discard = func() error {
		err := w.Close()
		if config.Reference == "" {
			if aerr := c.store.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
				err = errors.Join(err, fmt.Errorf("remove what was written of blob %s: %w", ref, aerr))
			}
		}
		return err
	}
	if config.Reference != "" {
		if err := w.Truncate(0); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("begin blob %s anew: %w", ref, err), discard())
		}
	}
	return w, discard, nil
}

// commit gives a blob its name and its labels. One that is there already will do: that is not new.
func commit(
	ctx context.Context, w ctdcontent.Writer, blob digest.Digest, given map[string]string, diffID string,
) (isNew bool, err error) {
	all := maps.Clone(given)
	if diffID != "" {
		if all == nil {
			all = map[string]string{}
		}
		all[labels.LabelUncompressed] = diffID
	}
	var opts []ctdcontent.Opt
	if all != nil {
		opts = append(opts, ctdcontent.WithLabels(all))
	}
	err = w.Commit(ctx, 0, blob, opts...)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return false, fmt.Errorf("commit blob %s: %w", blob, err)
	}
	return err == nil, nil
}

// describe returns the descriptor of a blob, and makes sure of its label: it may have been there before.
func (c *Comparer) describe(
	ctx context.Context, desc ocispec.Descriptor, diffID string,
) (ocispec.Descriptor, error) {
	info, err := c.store.Info(ctx, desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if _, ok := info.Labels[labels.LabelUncompressed]; !ok {
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		info.Labels[labels.LabelUncompressed] = diffID
		if _, err := c.store.Update(ctx, info, "labels."+labels.LabelUncompressed); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("label blob %s: %w", desc.Digest, err)
		}
	}
	desc.Size = info.Size
	return desc, nil
}

func namesOf(ctx context.Context, pair *snapshotter.Pair) (*names, error) {
	where := &names{all: pair.Parted}
	if err := pair.Names(ctx, where.add); err != nil {
		return nil, err
	}
	for _, dir := range pair.Dirs {
		if err := where.addUpper(dir); err != nil {
			return nil, fmt.Errorf("read upper directory: %w", err)
		}
	}
	return where, nil
}
