package control

import (
	"context"

	"github.com/containerd/log"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// Doctor is what only the daemon itself can see of its surroundings.
func (s *Server) Doctor(ctx context.Context, _ *dedupv1.DoctorRequest) (*dedupv1.DoctorResponse, error) {
	idle, err := s.sn.IdleMounts()
	if err != nil {
		return nil, answer(err)
	}
	resp := &dedupv1.DoctorResponse{
		Version: s.opts.Version, Root: s.opts.Root, RunDir: s.opts.RunDir, ContainerdAddress: s.opts.ContainerdAddress,
		OverlayOptions: s.sn.OverlayOptions(), IdleMounts: idle,
		DamagedLayers: int64(len(s.sn.Layers().Damaged())), Blobs: s.opts.Blobs,
	}
	if err := s.sn.Layers().Room(); err != nil {
		resp.Refuses = err.Error()
	}
	if resp.ContainerdVersion, err = s.opts.Catalog.Version(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, answer(ctx.Err())
		}
		resp.ContainerdError = err.Error()
	}
	if resp.LostImages, err = s.lostImages(ctx); err != nil {
		log.G(ctx).WithError(err).Debug("look for images that are lost")
	}
	if plan, err := s.opts.Trimmer.Plan(ctx, blobs.TrimOptions{Survey: true, Fetched: true}); err != nil {
		log.G(ctx).WithError(err).Debug("look for blobs that could go")
	} else {
		resp.DroppableBlobs, resp.DroppableBytes = int64(plan.Blobs), plan.Bytes
	}
	return resp, nil
}

// lostImages are those that containerd has unpacked here, and of which no layer is here.
func (s *Server) lostImages(ctx context.Context) (lost []string, err error) {
	images, err := s.imageLayers(ctx)
	if err != nil {
		return nil, err
	}
	for _, img := range images {
		if len(img.layers) == 0 && len(img.names.Names) > 0 {
			lost = append(lost, img.names.Namespace+"/"+img.names.Names[0])
		}
	}
	return lost, nil
}
