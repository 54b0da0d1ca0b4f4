package lower

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/containerd/log"
)

// lingerMost is how many chains stay mounted for a while after their last users: each takes mounts, and loop devices
// where the kernel mounts no files.
const lingerMost = 64

// lingering is a chain that stays mounted for a while.
type lingering struct {
	since time.Time     // when its last user went
	end   chan struct{} // closed when it goes at once
}

// Leave releases a chain whose last user has gone, if nobody uses it again for a while: a container that follows finds
// its files in memory. It goes earlier when many have been left since, and at once when it keeps old packs. failed is
// told what Release returns.
func (c *Chains) Leave(n Name, failed func(error)) {
	u := c.Users
	l, waits := u.leave(n)
	if c.Images.isStale(n) { // what becomes stale from here on, DropStale finds left
		u.end(n)
	}
	u.takeIdle(lingerMost) // each has somebody who releases it
	if waits {
		return
	}
	release := func(ctx context.Context) {
		u.mu.Lock()
		if u.left[n] == l {
			delete(u.left, n)
		}
		u.mu.Unlock()
		if err := c.Release(ctx, n); err != nil {
			failed(err)
		}
	}
	started := c.opts.Background(func(stop context.Context) {
		for {
			u.mu.Lock()
			left := time.Until(l.since.Add(c.opts.Linger))
			u.mu.Unlock()
			if left <= 0 {
				break
			}
			select {
			case <-time.After(left):
				continue
			case <-l.end:
			case <-stop.Done():
			}
			break
		}
		release(context.WithoutCancel(stop))
	})
	if !started {
		release(context.Background())
	}
}

// leave notes that a chain stays mounted for a while from now on. waits tells that somebody is to release it already.
func (u *Users) leave(n Name) (l *lingering, waits bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l, waits = u.left[n]
	if !waits {
		l = &lingering{end: make(chan struct{})}
		u.left[n] = l
	}
	l.since = time.Now()
	return l, waits
}

// takeIdle ends the time of chains that only stay mounted for who may come, until so many are left, and returns them.
// Those that were used last stay.
func (u *Users) takeIdle(stay int) (gone []Name) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.left) <= stay {
		return nil
	}
	for n := range u.left {
		if len(u.users[n]) == 0 && u.busy[n] == nil {
			gone = append(gone, n)
		}
	}
	slices.SortFunc(gone, func(a, b Name) int { return u.left[a].since.Compare(u.left[b].since) })
	gone = gone[:max(0, len(gone)-stay)]
	for _, n := range gone {
		u.endLocked(n)
	}
	return gone
}

// unmount unmounts a chain that the caller is busy with and nobody uses. It stays mounted for nobody any more.
func (c *Chains) unmount(n Name) error {
	c.Users.end(n)
	return c.mounts.unmount(n)
}

// end ends the time of a chain that stays mounted for a while, if it does.
func (u *Users) end(n Name) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.endLocked(n)
}

func (u *Users) endLocked(n Name) {
	if l := u.left[n]; l != nil {
		close(l.end)
		delete(u.left, n)
	}
}

// mount mounts the image of a chain that the caller is busy with. Where the machine has no loop device or no mount
// left, those that only stay mounted for who may come give theirs up.
func (c *Chains) mount(ctx context.Context, n Name) (Below, error) {
	below, err := c.mounts.mount(n)
	if !isShort(err) {
		return below, err
	}
	idle := c.Users.takeIdle(0)
	if len(idle) == 0 {
		return below, err
	}
	log.G(ctx).WithError(err).Warnf("%d images without containers are unmounted before their time", len(idle))
	var errs []error
	for _, other := range idle { // nobody who is busy with one of them waits for this one: idle ones are not busy
		errs = append(errs, c.Release(ctx, other))
	}
	if err := errors.Join(errs...); err != nil {
		log.G(ctx).WithError(err).Warn("chain images stay mounted until the next cleanup")
	}
	return c.mounts.mount(n)
}

// isShort tells that the machine has no more of what a mount takes. The image is as good as ever.
func isShort(err error) bool { return errors.Is(err, errNoLoop) || errors.Is(err, errNoMount) }
