// Package blobs reads layers' blobs from the content store of the containerd that calls, and
// knows which layers the images there consist of.
//
// Everything is asked for in the containerd namespace of the caller's ctx: what that namespace does
// not have is not found. Manifests and configs are foreign bytes; one that makes no sense is left out.
package blobs

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// answerTimeout is how long containerd may take to answer a simple question.
const answerTimeout = 10 * time.Second

// deafFor is for how long a containerd that did not answer is not asked for blobs at hand.
const deafFor = time.Minute

// Store is the content store of one containerd. Safe for concurrent use.
type Store struct {
	content ctdcontent.Store
	plugins introspection.IntrospectionClient

	mu     sync.Mutex // guards what follows
	root   string     // the content store as a directory; "" while unknown
	images map[string]*images
	deaf   time.Time // when containerd last did not answer
}

// New reads from store. plugins tells where the store lies as a directory of this node,
// so that blobs need not come through a socket; nil leaves that out.
func New(store ctdcontent.Store, plugins introspection.IntrospectionClient) *Store {
	return &Store{content: store, plugins: plugins, images: map[string]*images{}}
}

// outgoing is a ctx for calls to containerd in the caller's namespace.
func outgoing(ctx context.Context) (context.Context, string, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return ctx, "", err
	}
	return namespaces.WithNamespace(ctx, ns), ns, nil
}

// Blob finds a layer's blob that lies whole in the content store; errdefs.ErrNotFound when it does not.
func (s *Store) Blob(ctx context.Context, desc ocispec.Descriptor) (layer.Blob, error) {
	info, err := s.info(ctx, desc.Digest)
	if err != nil {
		return layer.Blob{}, err
	}
	return layer.Blob{
		Digest: desc.Digest, MediaType: desc.MediaType, Size: info.Size,
		Open: func(ctx context.Context) (io.ReadCloser, error) { return s.open(ctx, info) },
	}, nil
}

func (s *Store) info(ctx context.Context, blob digest.Digest) (ctdcontent.Info, error) {
	ctx, _, err := outgoing(ctx)
	if err != nil {
		return ctdcontent.Info{}, err
	}
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	info, err := s.content.Info(short, blob)
	if err != nil {
		return info, fmt.Errorf("blob %s in containerd's content store: %w", blob, s.noAnswer(ctx, short, err))
	}
	return info, nil
}

// noAnswer explains err when the timeout of short is what ended a call for ctx.
func (s *Store) noAnswer(ctx, short context.Context, err error) error {
	if short.Err() == nil || ctx.Err() != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deaf = time.Now()
	return fmt.Errorf("containerd does not answer on containerd_address: set it in the daemon's config to the socket "+
		"of the containerd that calls: %w", err)
}

// silent reports that containerd has not answered lately, so that what can do without does not wait again.
func (s *Store) silent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.deaf) < deafFor
}

// open reads a blob that the caller's namespace has. containerd's content store is
// usually a directory of this node, and reading the file costs a fraction of reading
// through the socket.
func (s *Store) open(ctx context.Context, info ctdcontent.Info) (io.ReadCloser, error) {
	ctx, _, err := outgoing(ctx)
	if err != nil {
		return nil, err
	}
	if root := s.directory(ctx); root != "" {
		f, err := os.Open(filepath.Join(root, "blobs", info.Digest.Algorithm().String(), info.Digest.Encoded()))
		if err == nil {
			if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() && fi.Size() == info.Size {
				return f, nil
			}
			f.Close()
		}
	}
	ra, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", info.Digest, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{ctdcontent.NewReader(ra), ra}, nil
}

// directory asks containerd where its content store lies.
func (s *Store) directory(ctx context.Context) string {
	if s.plugins == nil {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != "" {
		return s.root
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	resp, err := s.plugins.Plugins(ctx, &introspection.PluginsRequest{Filters: []string{"type==io.containerd.content.v1"}})
	if err != nil {
		log.G(ctx).WithError(err).Debug("ask containerd for its content store")
		return ""
	}
	for _, p := range resp.Plugins {
		if root := p.Exports["root"]; root != "" {
			s.root = root
		}
	}
	return s.root
}
