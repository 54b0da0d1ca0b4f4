package control

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
	"google.golang.org/grpc"
)

// progressEvery is how often a check tells how far it is.
const progressEvery = 200 * time.Millisecond

// Check verifies what is stored.
func (s *Server) Check(req *dedupv1.CheckRequest, stream grpc.ServerStreamingServer[dedupv1.CheckResponse]) error {
	ctx := stream.Context()
	var last time.Time
	var stage string
	opts := snapshotter.CheckOptions{Repair: req.GetRepair(), Progress: func(now string, done, total int64) {
		if now == stage && done < total && time.Since(last) < progressEvery {
			return
		}
		last, stage = time.Now(), now
		// A client that has gone ends ctx.
		_ = stream.Send(&dedupv1.CheckResponse{Answer: &dedupv1.CheckResponse_Progress{
			Progress: &dedupv1.CheckProgress{Stage: now, Done: done, Total: total},
		}})
	}}
	check := s.sn.Check
	if req.GetKnownOnly() {
		check = s.sn.CheckKnown
	}
	found, err := check(ctx, opts)
	if err != nil {
		return answer(err)
	}
	for _, f := range s.findings(ctx, found) {
		if err := stream.Send(&dedupv1.CheckResponse{Answer: &dedupv1.CheckResponse_Finding{Finding: f}}); err != nil {
			return err
		}
	}
	return nil
}

// GC removes what nothing uses.
func (s *Server) GC(ctx context.Context, req *dedupv1.GCRequest) (*dedupv1.GCResponse, error) {
	found, err := s.sn.GC(ctx, snapshotter.GCOptions{DryRun: req.GetDryRun(), Chains: req.GetChainImages()})
	if err != nil {
		return nil, answer(err)
	}
	return &dedupv1.GCResponse{Removed: s.findings(ctx, found)}, nil
}

// findings names the images that each finding harms.
func (s *Server) findings(ctx context.Context, found []snapshotter.Finding) []*dedupv1.Finding {
	return Findings(ctx, s.opts.Catalog, s.sn.LayersOf, found)
}

// Findings names the images that each finding harms. layersOf is that of the store.
func Findings(
	ctx context.Context, catalog *blobs.Catalog, layersOf layersOf, found []snapshotter.Finding,
) []*dedupv1.Finding {
	var images []imageLayers
	if slices.ContainsFunc(found, snapshotter.Finding.Damaged) {
		var err error
		if images, err = listImages(ctx, catalog, layersOf); err != nil {
			log.G(ctx).WithError(err).Warn("look for the images that have the damaged layers")
		}
	}
	out := make([]*dedupv1.Finding, 0, len(found))
	for _, f := range found {
		m := &dedupv1.Finding{
			Kind: string(f.Kind), Path: f.Path, Problem: f.Problem, Damaged: f.Damaged(), Fixed: f.Fixed,
			Hint: f.Hint, Bytes: f.Bytes, Snapshots: f.Snapshots,
		}
		for _, img := range images {
			if img.has(f) {
				m.Images = append(m.Images, img.names)
			}
		}
		out = append(out, m)
	}
	return out
}

// imageLayers is an image of containerd with what it consists of.
type imageLayers struct {
	names  *dedupv1.ImageNames
	ref    snapshotter.ImageRef
	layers []content.LayerID
}

// has tells whether a finding concerns the image.
func (i imageLayers) has(f snapshotter.Finding) bool {
	return slices.ContainsFunc(f.Harmed(), func(id content.LayerID) bool { return slices.Contains(i.layers, id) }) ||
		slices.ContainsFunc(f.Snapshots, i.ref.Keeps)
}

// layersOf returns the layers that each image keeps in a store.
type layersOf = func(context.Context, []snapshotter.ImageRef) ([][]content.LayerID, error)

// imageLayers lists containerd's images.
func (s *Server) imageLayers(ctx context.Context) ([]imageLayers, error) {
	return listImages(ctx, s.opts.Catalog, s.sn.LayersOf)
}

func listImages(ctx context.Context, catalog *blobs.Catalog, layersOf layersOf) ([]imageLayers, error) {
	images, _, err := catalog.Images(ctx)
	if err != nil {
		return nil, err
	}
	refs := make([]snapshotter.ImageRef, len(images))
	for i, img := range images {
		refs[i] = snapshotter.ImageRef{Namespace: img.Namespace, Chains: img.Chains}
	}
	layers, err := layersOf(ctx, refs)
	if err != nil {
		return nil, err
	}
	out := make([]imageLayers, len(images))
	for i, img := range images {
		out[i] = imageLayers{&dedupv1.ImageNames{Namespace: img.Namespace, Names: img.Names}, refs[i], layers[i]}
	}
	return out, nil
}
