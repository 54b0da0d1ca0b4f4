package control

import (
	"context"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
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
		DamagedLayers: int64(len(s.sn.Layers().Damaged())),
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
	return resp, nil
}
