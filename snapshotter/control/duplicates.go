package control

import (
	"context"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

const (
	defaultRows = 20
	maxRows     = 1000
)

// Duplicates tells where what is stored once and used many times comes from.
func (s *Server) Duplicates(ctx context.Context, req *dedupv1.DuplicatesRequest) (*dedupv1.DuplicatesResponse, error) {
	limit := int(req.GetLimit())
	switch {
	case limit == 0:
		limit = defaultRows
	case limit > maxRows:
		return nil, status.Errorf(codes.InvalidArgument, "limit %d: at most %d rows", limit, maxRows)
	}
	d, err := s.sn.Layers().Duplicates(ctx, limit)
	if err != nil {
		return nil, answer(err)
	}
	return &dedupv1.DuplicatesResponse{Paths: rows(d.Paths), Types: rows(d.Types), Packages: rows(d.Packages)}, nil
}

func rows(list []layer.Duplicate) []*dedupv1.DuplicateRow {
	out := make([]*dedupv1.DuplicateRow, 0, len(list))
	for _, d := range list {
		out = append(out, &dedupv1.DuplicateRow{
			Name:      strings.ToValidUTF8(d.Name, "\uFFFD"), // a path may be any bytes
			UsedFiles: d.Files, UsedBytes: d.Used, Objects: d.Objects, StoredBytes: d.Stored,
		})
	}
	return out
}
