package layer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// veritySpread is how many more workers an ingest has when each file is written to the disk, tree of hashes and all, before the
// next one begins: they wait for the disk, not for a processor.
const veritySpread = 8

// Verity reports whether objects have fs-verity.
func (s *Store) Verity() bool { return s.opts.Verity }

// Digests returns fs-verity's digests of objects of layers that the caller holds. Objects that came in while Options.Verity was off
// get it now, and are read for that. What is damaged takes its layers out of service, and the error wraps ErrDamaged.
func (s *Store) Digests(ctx context.Context, ids []content.ObjectID) (map[content.ObjectID]verity.Digest, error) {
	var mu sync.Mutex // guards digests
	digests := make(map[content.ObjectID]verity.Digest, len(ids))
	added, err := s.digestAll(ctx, ids, func(id content.ObjectID, d verity.Digest) {
		mu.Lock()
		defer mu.Unlock()
		digests[id] = d
	})
	if errors.Is(err, object.ErrDamaged) {
		s.blame(ctx)
		s.saveDamaged(ctx)
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err == nil && added {
		err = s.keepVerity()
	}
	if err != nil {
		return nil, fmt.Errorf("fs-verity of objects: %w", s.explain(err))
	}
	return digests, nil
}

// keepVerity makes the fs-verity that verified objects were given survive a power cut: the chain images that name their digests
// do, and without it the kernel would refuse the files.
func (s *Store) keepVerity() error {
	if !s.opts.Verity {
		return nil
	}
	return s.Sync()
}

// digestAll asks for many digests side by side, and says whether any object had none before.
func (s *Store) digestAll(ctx context.Context, ids []content.ObjectID, take func(content.ObjectID, verity.Digest)) (added bool, err error) {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	var some atomic.Bool
	for range min(len(ids), ingestWorkers(true)) {
		g.Go(func() error {
			buf := sync.OnceValue(object.NewVerifyBuffer) // most need none
			for {
				i := next.Add(1) - 1
				if i >= int64(len(ids)) || ctx.Err() != nil {
					return context.Cause(ctx)
				}
				d, added, err := s.objects.Digest(ctx, ids[i], buf)
				if added {
					some.Store(true)
				}
				if err != nil {
					return err
				}
				take(ids[i], d)
			}
		})
	}
	err = g.Wait()
	return some.Load(), err
}
