package control

import (
	"context"
	"errors"
	"io"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// MakeBlob makes a blob again and puts it into the content store.
func (s *Server) MakeBlob(ctx context.Context, req *dedupv1.MakeBlobRequest) (*dedupv1.MakeBlobResponse, error) {
	blob, err := digest.Parse(req.GetDigest())
	if err != nil || req.GetNamespace() == "" || req.GetLease() == "" {
		return nil, status.Error(codes.InvalidArgument, "want a namespace, a lease of it, and the digest of a blob")
	}
	info, err := s.sn.Layers().Recipe(blob)
	if err == nil {
		ctx := namespaces.WithNamespace(ctx, req.GetNamespace())
		err = s.opts.Found.Write(ctx, blob, info.Size, req.GetLease(), func(w io.Writer) error {
			return layer.WriteBlob(ctx, s.sn.Layers(), blob, w)
		})
	}
	switch {
	case err == nil:
		return &dedupv1.MakeBlobResponse{Size: info.Size}, nil
	case ctx.Err() != nil:
		return nil, answer(ctx.Err())
	case errors.Is(err, layer.ErrNoRecipe), errors.Is(err, layer.ErrDamaged), errors.Is(err, recipe.ErrOtherEncoder),
		errors.Is(err, recipe.ErrDamaged):
		return nil, status.Error(codes.NotFound, err.Error())
	}
	return nil, answer(err)
}
