package bench

import (
	"context"
	"fmt"
	"slices"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
)

// preparePython makes ten images with a real pip install each: five services in two releases. All layers differ, so
// that sharing whole layers saves nothing: what overlayfs needs is what any snapshotter needs that shares no files.
func preparePython(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	if len(s.opts.Images) > 0 {
		return nil, "it has images of its own", nil
	}
	set, err := inputs.Open(s.opts.Say)
	if err != nil {
		return nil, "", err
	}
	base, err := set.Debian(ctx)
	if err != nil {
		return nil, "", err
	}
	all, err := set.Fleet(ctx)
	if err != nil {
		return nil, "", err
	}
	rounds := make([][]Image, 2)
	for i := range rounds {
		r, err := s.registry(ctx)
		if err != nil {
			return nil, "", err
		}
		for _, release := range all {
			if release.Number != i+1 {
				continue
			}
			img, err := s.serve(ctx, r, fmt.Sprintf("system/%s:%d", release.Service, release.Number), base, release.Layer)
			if err != nil {
				return nil, "", err
			}
			rounds[i] = append(rounds[i], img)
		}
	}
	return func(ctx context.Context, t *Trial) error {
		if err := (fleet{"python", rounds}).trial(ctx, t); err != nil {
			return err
		}
		return readTogether(ctx, t, "python", slices.Concat(rounds...), nil)
	}, "", nil
}
