// Package apply is containerd's diff service over the layer store: it reads a blob once
// and turns it into a layer, without writing into the snapshot that it is meant for.
package apply

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// Applier is a diff.Applier. Safe for concurrent use.
type Applier struct {
	snapshots *snapshotter.Snapshotter
	blobs     *blobs.Store
	ahead     *ahead
}

// New returns an applier for the snapshots of s that reads from b.
func New(s *snapshotter.Snapshotter, b *blobs.Store) *Applier {
	a := &Applier{snapshots: s, blobs: b, ahead: newAhead()}
	s.OnMiss(a.missed)
	return a
}

// Close ends what runs in the background. It comes before the Snapshotter's.
func (a *Applier) Close() {
	a.snapshots.OnMiss(nil)
	a.ahead.close()
}

func (a *Applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount,
	_ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	upper, ok, err := a.snapshots.Extraction(ctx, mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("the mounts are not of an empty extraction snapshot of dedup: %w",
			errdefs.ErrNotImplemented)
	}
	if !archive.KnownMediaType(desc.MediaType) {
		return ocispec.Descriptor{}, unknownMediaType(desc)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	blob, err := a.blobs.Blob(ctx, desc)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	a.ahead.wg.Go(func() { a.lookAhead(namespaces.WithNamespace(a.ahead.ctx, ns), ns, desc.Digest) })
	in, err := a.snapshots.Layers().IngestBlob(ctx, blob)
	if err != nil {
		return ocispec.Descriptor{}, classify(err)
	}
	if err := a.snapshots.Applied(ctx, upper, in); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: in.DiffID.Digest(), Size: in.TarSize}, nil
}

// unknownMediaType lets containerd ask its next differ only for encrypted layers, which its stream processors
// may know. Of any other type the transfer service would say no more than
// "method Transfer not implemented".
func unknownMediaType(desc ocispec.Descriptor) error {
	var class error = errdefs.ErrInvalidArgument
	if strings.HasSuffix(desc.MediaType, "+encrypted") {
		class = errdefs.ErrNotImplemented
	}
	return fmt.Errorf("layer %s has media type %q: dedup-diff unpacks tar, tar+gzip and tar+zstd layers of OCI and "+
		"docker: %w", desc.Digest, desc.MediaType, class)
}

func classify(err error) error {
	if errors.Is(err, archive.ErrInvalid) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if errors.Is(err, archive.ErrMemory) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}
