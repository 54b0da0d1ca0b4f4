package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// completion makes or fetches what an image lacks.
type completion struct {
	store   content.Store
	leases  leases.Manager
	fetcher remotes.Fetcher
	source  images.HandlerFunc     // notes on a blob which registry has it
	only    map[digest.Digest]bool // layers' blobs that are wanted; nil is all

	daemon    dedupv1.ControlClient // makes blobs again; nil for none
	namespace string

	mu     sync.Mutex // guards result
	result Completed
}

func (c *completion) run(ctx context.Context, img images.Image, match platforms.MatchComparer) error {
	children := images.SetChildrenMappedLabels(c.store, images.FilterPlatforms(images.ChildrenHandler(c.store), match),
		nil)
	return images.Dispatch(ctx, images.Handlers(images.HandlerFunc(c.fetch), children), nil, img.Target)
}

// fetch fetches one blob, unless it is there.
func (c *completion) fetch(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if c.only != nil && images.IsLayerType(desc.MediaType) && !c.only[desc.Digest] {
		return nil, images.ErrSkipDesc
	}
	if err := c.hold(ctx, desc); err != nil {
		return nil, err
	}
	_, err := c.store.Info(ctx, desc.Digest)
	if err == nil {
		if err := c.want(ctx, desc); err != nil {
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.result.PresentBytes += desc.Size
		return nil, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	why := c.make(ctx, desc)
	made := why == nil
	if !made {
		if err := c.download(ctx, desc); err != nil && !errdefs.IsNotFound(why) {
			return nil, fmt.Errorf("%w (nor could the daemon make it: %w)", err, why)
		} else if err != nil {
			return nil, err
		}
	}
	if _, err := c.source(ctx, desc); err != nil {
		return nil, fmt.Errorf("note where blob %s is from: %w", desc.Digest, err)
	}
	if err := c.want(ctx, desc); err != nil {
		return nil, err
	}
	blob := CompletedBlob{desc.Digest.String(), desc.MediaType, desc.Size}
	c.mu.Lock()
	defer c.mu.Unlock()
	if made {
		c.result.Made, c.result.MadeBytes = append(c.result.Made, blob), c.result.MadeBytes+desc.Size
	} else {
		c.result.Fetched, c.result.FetchedBytes = append(c.result.Fetched, blob), c.result.FetchedBytes+desc.Size
	}
	return nil, nil
}

// make has the daemon make a layer's blob from its store. The error is a NotFound where it cannot.
func (c *completion) make(ctx context.Context, desc ocispec.Descriptor) error {
	lease, leased := leases.FromContext(ctx)
	if c.daemon == nil || !leased || !images.IsLayerType(desc.MediaType) {
		return errdefs.ErrNotFound
	}
	_, err := c.daemon.MakeBlob(ctx, &dedupv1.MakeBlobRequest{
		Namespace: c.namespace, Digest: desc.Digest.String(), Lease: lease,
	})
	if status.Code(err) == codes.Unimplemented { // an older daemon
		return errdefs.ErrNotFound
	}
	return errgrpc.ToNative(err)
}

// download fetches a blob from the registry.
func (c *completion) download(ctx context.Context, desc ocispec.Descriptor) error {
	if _, err := remotes.FetchHandler(c.store, c.fetcher)(ctx, desc); err != nil {
		if errdefs.IsFailedPrecondition(err) { // other bytes: containerd would go on with them next time
			aerr := c.store.Abort(context.WithoutCancel(ctx), remotes.MakeRefKey(ctx, desc))
			if aerr != nil && !errdefs.IsNotFound(aerr) {
				err = errors.Join(err, aerr)
			}
		}
		return fmt.Errorf("fetch blob %s (%s): %w", desc.Digest, size(desc.Size), err)
	}
	return nil
}

// hold leases a blob before anybody looks whether it is there: else a trim could take away what was.
func (c *completion) hold(ctx context.Context, desc ocispec.Descriptor) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return nil
	}
	resource := leases.Resource{ID: desc.Digest.String(), Type: "content"}
	if err := c.leases.AddResource(ctx, leases.Lease{ID: id}, resource); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("lease blob %s: %w", desc.Digest, err)
	}
	return nil
}

// want notes on a layer's blob that it is wanted for a while: the daemon lets go of it later, and a trim by somebody
// else leaves it.
func (c *completion) want(ctx context.Context, desc ocispec.Descriptor) error {
	if !images.IsLayerType(desc.MediaType) {
		return nil
	}
	until := time.Now().Add(blobs.WantedFor).UTC().Format(time.RFC3339)
	info := content.Info{Digest: desc.Digest, Labels: map[string]string{blobs.LabelWanted: until}}
	if _, err := c.store.Update(ctx, info, "labels."+blobs.LabelWanted); err != nil {
		return fmt.Errorf("note that blob %s is wanted: %w", desc.Digest, err)
	}
	return nil
}

// soFar is how many bytes have arrived.
func (c *completion) soFar(ctx context.Context) int64 {
	running, err := c.store.ListStatuses(ctx)
	if err != nil {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.result.FetchedBytes + c.result.MadeBytes
	for _, s := range running {
		n += s.Offset
	}
	return n
}
