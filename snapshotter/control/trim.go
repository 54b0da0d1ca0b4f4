package control

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// Trim lets go of the blobs of layers that are stored here.
func (s *Server) Trim(ctx context.Context, req *dedupv1.TrimRequest) (*dedupv1.TrimResponse, error) {
	plan, err := s.opts.Trimmer.Settle(ctx, blobs.TrimOptions{
		Namespace: req.GetNamespace(), Images: req.GetImages(), LastCopy: req.GetLastCopy(), Fetched: req.GetFetched(),
		Survey: req.GetDryRun(), Wait: time.Duration(req.GetWaitSeconds()) * time.Second,
		NoRecipes: req.GetNoRecipes(),
	})
	if err == nil && !req.GetDryRun() {
		plan, err = s.opts.Trimmer.Execute(ctx, plan)
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, answer(ctx.Err())
		}
		code := codes.FailedPrecondition
		if errdefs.IsNotFound(err) {
			code = codes.NotFound
		}
		return nil, status.Error(code, err.Error())
	}
	resp := &dedupv1.TrimResponse{FreedBlobs: int64(plan.Blobs), FreedBytes: plan.Bytes}
	for _, i := range plan.Images {
		resp.Images = append(resp.Images, &dedupv1.TrimmedImage{
			Namespace: i.Namespace, Names: i.Names, Manifest: i.Manifest.String(), Layers: int64(i.Layers),
			Blobs: int64(i.Blobs), BlobBytes: i.Bytes, KeptBlobs: int64(i.KeptBlobs), KeptBytes: i.KeptBytes, Kept: i.Kept,
			Recipes: int64(i.Recipes),
		})
	}
	return resp, nil
}
