package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// ErrUnfinished is wrapped by Look where only a daemon can finish what an older one began.
var ErrUnfinished = errors.New("an upgrade is not finished")

// Look opens the store below opts.Root to check it while no daemon serves it. Nothing on the disk changes, and no
// ingest may follow. live are the layers that snapshots refer to; others are orphans, unless opts say otherwise.
func Look(ctx context.Context, opts Options, live []content.LayerID) (_ *Store, err error) {
	opts.readOnly = true
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if s.rootFd, err = unix.Open(s.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open store %s: %w", s.root, err)
	}
	suspect, err := s.suspectSince()
	if err != nil {
		return nil, err
	}
	if err := s.openPacks(suspect); err != nil {
		return nil, err
	}
	holds := map[content.LayerID]int{}
	for _, id := range live {
		holds[id]++
	}
	if _, err := s.load(ctx, holds, time.Time{}); err != nil {
		return nil, err
	}
	if err := s.recipes.open(); err != nil {
		return nil, err
	}
	if _, err := s.objects.Settle(true); err != nil {
		return nil, err
	}
	for _, id := range s.objects.Bad() {
		if _, err := os.Lstat(s.path(dirObjects, id.Path())); err == nil {
			return nil, fmt.Errorf("%s holds payloads that no pack has yet: %w; start the daemon once",
				s.path(dirObjects), ErrUnfinished)
		}
	}
	return s, nil
}
