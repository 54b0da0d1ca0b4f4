package control

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// Images lists the images whose files are stored here.
func (s *Server) Images(ctx context.Context, _ *dedupv1.ImagesRequest) (*dedupv1.ImagesResponse, error) {
	images, leased, err := s.opts.Catalog.Images(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, answer(ctx.Err())
		}
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	refs := make([]snapshotter.ImageRef, len(images))
	for i, img := range images {
		refs[i] = snapshotter.ImageRef{Namespace: img.Namespace, Chains: img.Chains}
	}
	others := make([]snapshotter.ImageRef, len(leased))
	for i, l := range leased {
		others[i] = snapshotter.ImageRef{Namespace: l.Namespace, Chains: l.Chains}
	}
	usage, err := s.sn.Images(ctx, refs, others)
	if err != nil {
		return nil, answer(err)
	}
	resp := &dedupv1.ImagesResponse{}
	for i, img := range images {
		u := usage[i]
		resp.Images = append(resp.Images, &dedupv1.Image{
			Namespace: img.Namespace, Names: img.Names, Target: img.Target.String(),
			Layers: int64(u.Layers), Entries: u.Entries, LogicalBytes: u.Bytes,
			StoredBytes: u.Stored.Bytes, StoredInodes: u.Stored.Inodes,
			ExclusiveBytes: u.Exclusive.Bytes, ExclusiveInodes: u.Exclusive.Inodes,
			FreedBytes: u.Freed.Bytes, FreedInodes: u.Freed.Inodes,
			BlobBytes: img.Blobs, FreedBlobBytes: img.FreedBlobs, Users: int64(u.Users),
		})
	}
	return resp, nil
}
