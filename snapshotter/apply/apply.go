// Package apply is containerd's diff service over the layer store: it reads a blob once
// and turns it into a layer, without writing into the snapshot that it is meant for.
package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// Applier is a diff.Applier. Safe for concurrent use.
type Applier struct {
	snapshots *snapshotter.Snapshotter
	blobs     ctdcontent.Store
	plugins   introspection.IntrospectionClient
	ahead     *ahead

	mu   sync.Mutex // guards root, and asking for it
	root string     // containerd's content store as a directory; "" while unknown
}

// answerTimeout is how long containerd may take to answer a simple question.
const answerTimeout = 10 * time.Second

// New returns an applier that reads blobs from the containerd behind conn. The
// connection may not be up yet, and may come and go.
func New(s *snapshotter.Snapshotter, conn grpc.ClientConnInterface) *Applier {
	return &Applier{
		snapshots: s,
		blobs:     contentproxy.NewContentStore(conn),
		plugins:   introspection.NewIntrospectionClient(conn),
		ahead:     newAhead(),
	}
}

// Close ends what runs in the background. It comes before the Snapshotter's.
func (a *Applier) Close() { a.ahead.close() }

// Apply ingests a blob for the active snapshot that mounts belong to, and returns the descriptor of
// its uncompressed tar. What is not ours to serve is ErrNotImplemented, so that containerd asks
// its next differ.
func (a *Applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	upper, ok, err := a.snapshots.Extraction(ctx, mounts)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if !ok {
		return ocispec.Descriptor{}, fmt.Errorf("the mounts are not of an empty extraction snapshot of dedup: %w", errdefs.ErrNotImplemented)
	}
	if !archive.KnownMediaType(desc.MediaType) {
		return ocispec.Descriptor{}, unknownMediaType(desc)
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ctx = namespaces.WithNamespace(ctx, ns) // for our own calls to containerd
	info, err := a.info(ctx, desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	a.ahead.wg.Go(func() { a.lookAhead(namespaces.WithNamespace(a.ahead.ctx, ns), ns, desc.Digest) })
	in, err := a.ingest(ctx, desc, info)
	if err != nil {
		return ocispec.Descriptor{}, classify(err)
	}
	if err := a.snapshots.Applied(ctx, upper, in); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: in.DiffID.Digest(), Size: in.TarSize}, nil
}

// info asks containerd for a blob of the caller's namespace.
func (a *Applier) info(ctx context.Context, blob digest.Digest) (ctdcontent.Info, error) {
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	info, err := a.blobs.Info(short, blob)
	if err != nil && short.Err() != nil && ctx.Err() == nil {
		return info, fmt.Errorf("containerd does not answer on containerd_address: set it in the daemon's config to the socket of the containerd that calls: %w", err)
	}
	if err != nil {
		return info, fmt.Errorf("blob %s in containerd's content store: %w", blob, err)
	}
	return info, nil
}

func (a *Applier) ingest(ctx context.Context, desc ocispec.Descriptor, info ctdcontent.Info) (layer.Ingested, error) {
	return a.snapshots.Layers().IngestBlob(ctx, layer.Blob{
		Digest: desc.Digest, MediaType: desc.MediaType, Size: info.Size,
		Open: func(ctx context.Context) (io.ReadCloser, error) { return a.open(ctx, info) },
	})
}

// unknownMediaType lets containerd ask its next differ only for encrypted layers, which its stream processors
// may know. Of any other type the transfer service would say no more than
// "method Transfer not implemented".
func unknownMediaType(desc ocispec.Descriptor) error {
	var class error = errdefs.ErrInvalidArgument
	if strings.HasSuffix(desc.MediaType, "+encrypted") {
		class = errdefs.ErrNotImplemented
	}
	return fmt.Errorf("layer %s has media type %q: dedup-diff unpacks tar, tar+gzip and tar+zstd layers of OCI and docker: %w", desc.Digest, desc.MediaType, class)
}

func classify(err error) error {
	if errors.Is(err, archive.ErrInvalid) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// open reads a blob that the caller's namespace has. containerd's content store is
// usually a directory of this node, and reading the file costs a fraction of reading
// through the socket.
func (a *Applier) open(ctx context.Context, info ctdcontent.Info) (io.ReadCloser, error) {
	if root := a.contentRoot(ctx); root != "" {
		f, err := os.Open(filepath.Join(root, "blobs", info.Digest.Algorithm().String(), info.Digest.Encoded()))
		if err == nil {
			if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() && fi.Size() == info.Size {
				return f, nil
			}
			f.Close()
		}
	}
	ra, err := a.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", info.Digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{ctdcontent.NewReader(ra), ra}, nil
}

// contentRoot asks containerd where its content store lies.
func (a *Applier) contentRoot(ctx context.Context) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.root != "" {
		return a.root
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	resp, err := a.plugins.Plugins(ctx, &introspection.PluginsRequest{Filters: []string{"type==io.containerd.content.v1"}})
	if err != nil {
		log.G(ctx).WithError(err).Debug("ask containerd for its content store")
		return ""
	}
	for _, p := range resp.Plugins {
		if root := p.Exports["root"]; root != "" {
			a.root = root
		}
	}
	return a.root
}
