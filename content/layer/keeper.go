package layer

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

const (
	// quiet is how long nothing comes in or goes before packs are merged: it is not to get in the way of a pull.
	quiet = 2 * time.Second
	// latest is when they are merged though something does.
	latest = time.Minute
	// freshFor is how long the kernel keeps the pages of a new pack's own file once a container reads it: it finds them
	// in memory. From then on what has been read of them is held a second time, by the file system in the pack.
	freshFor = 3 * time.Second
	// dropSoon is how long after a container began to read packs the kernel forgets such pages. It does so again each
	// time that twice as long has gone by, and at least every dropEvery.
	dropSoon  = time.Second
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

// Reads tells that somebody is about to read packs that are mounted, each by itself. It returns at once.
func (s *Store) Reads(packs []content.PackID) {
	s.objects.Packs().NoteReads(packs)
	select {
	case s.reads <- struct{}{}:
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
	merge, move := time.NewTimer(quiet), time.NewTimer(moveEvery)
	drop := newBackoff(dropEvery, dropEvery)
	defer merge.Stop()
	defer drop.timer.Stop()
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
		case <-s.reads:
			drop.within(dropSoon)
		case <-merge.C:
			woken = time.Time{}
			if err := s.Compact(ctx); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("packs are not merged: the next try is when a layer comes or goes")
			}
		case <-drop.timer.C:
			now := time.Now()
			s.objects.Packs().DropCache(now.Add(-freshFor), now.Add(-dropEvery))
			drop.next()
		case <-move.C:
			if s.oldLeft() {
				s.moveRest(ctx)
				move.Reset(moveEvery)
			}
		}
	}
}

// backoff is a timer that takes twice as long each time, up to a limit, until it is told to hurry.
type backoff struct {
	timer     *time.Timer
	gap, most time.Duration
	at        time.Time
}

func newBackoff(gap, most time.Duration) *backoff {
	return &backoff{time.NewTimer(gap), gap, most, time.Now().Add(gap)}
}

func (b *backoff) next() { b.set(min(2*b.gap, b.most)) }

// within has the timer end in no more than gap, and begin anew with that.
func (b *backoff) within(gap time.Duration) {
	if b.gap = min(b.gap, gap); time.Until(b.at) > gap {
		b.set(gap)
	}
}

func (b *backoff) set(gap time.Duration) {
	b.gap, b.at = gap, time.Now().Add(gap)
	b.timer.Reset(gap)
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
