package layer

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/log"
)

const (
	// quiet is how long nothing comes in or goes before packs are merged: it is not to get in the way of a pull.
	quiet = 2 * time.Second
	// latest is when they are merged though something does.
	latest = time.Minute
	// dropAfter is how long after that the kernel forgets the pages of the packs' own files. Before it they help the first
	// container of a new image; then they are held a second time by the file systems in the packs.
	dropAfter = 10 * time.Second
	// dropEvery is how often it forgets those that reads have brought in since.
	dropEvery = 5 * time.Minute
	// moveEvery is how often it looks whether overlays from before the upgrade have gone.
	moveEvery = 5 * time.Minute
)

// keeper merges packs and drops their pages in the background.
type keeper struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func (s *Store) startKeeper() {
	ctx, cancel := context.WithCancel(context.Background())
	s.keeper = keeper{cancel: cancel}
	s.keeper.wg.Go(func() { s.keep(ctx) })
	s.wakeKeeper()
}

// wakeKeeper tells that packs have come or lost something.
func (p *packed) wakeKeeper() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (k *keeper) stop() {
	if k.cancel != nil {
		k.cancel()
		k.wg.Wait()
	}
}

func (s *Store) keep(ctx context.Context) {
	var woken time.Time // the first time since the last merge
	merge, drop, move := time.NewTimer(quiet), time.NewTimer(dropAfter), time.NewTimer(moveEvery)
	defer merge.Stop()
	defer drop.Stop()
	defer move.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
			if woken.IsZero() {
				woken = time.Now()
			}
			merge.Reset(max(0, min(quiet, time.Until(woken.Add(latest)))))
			drop.Reset(quiet + dropAfter)
		case <-merge.C:
			woken = time.Time{}
			if err := s.Compact(ctx); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("packs are not merged: the next try is when a layer comes or goes")
			}
		case <-drop.C:
			s.objects.Packs().DropCache()
			drop.Reset(dropEvery)
		case <-move.C:
			if s.oldLeft() {
				s.moveRest(ctx)
				move.Reset(moveEvery)
			}
		}
	}
}

// moveRest goes on with the upgrade: room may have come, and old overlays gone.
func (s *Store) moveRest(ctx context.Context) {
	err := s.moveOld(ctx)
	if err == nil {
		err = s.heal(ctx, s.Sync)
	}
	if err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("upgrade: what is left in objects/ is tried again later")
	}
}

// Compact merges packs that are small, or mostly dead, until the policy is content. The daemon does it in the
// background.
func (p *packed) Compact(ctx context.Context) error {
	if !p.compactor.Needed() {
		return nil
	}
	if err := p.hasRoom(0); err != nil {
		return err
	}
	return p.explain(p.compactor.Compact(ctx))
}
