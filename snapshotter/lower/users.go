package lower

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// Users are the snapshots that may be mounted over a chain, and who is busy with it. Safe for concurrent use.
type Users struct {
	mu sync.Mutex // guards what follows
	// users are the ids of active snapshots and views, by chain, and the way back.
	users map[Name]map[string]bool
	byID  map[string]Name
	// busy chains are being built, mounted or unmounted; the channel is closed after.
	busy map[Name]chan struct{}
	// left are the chains that stay mounted for a while after their last users, see Chains.Leave.
	left map[Name]*lingering
}

func newUsers() *Users {
	return &Users{users: map[Name]map[string]bool{}, byID: map[string]Name{}, busy: map[Name]chan struct{}{},
		left: map[Name]*lingering{}}
}

// Use notes that a snapshot may be mounted over a chain.
func (u *Users) Use(n Name, id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.users[n] == nil {
		u.users[n] = map[string]bool{}
	}
	u.users[n][id] = true
	u.byID[id] = n
}

// Unuse takes a snapshot's use back. orphaned tells that it was the last: the caller releases the
// chain. busy tells that it would have to wait for somebody who builds it.
func (u *Users) Unuse(id string) (n Name, orphaned, busy bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	n, ok := u.byID[id]
	if !ok {
		return n, false, false
	}
	delete(u.byID, id)
	delete(u.users[n], id)
	if len(u.users[n]) > 0 {
		return n, false, false
	}
	delete(u.users, n)
	return n, true, u.busy[n] != nil
}

// IsUsed tells whether a snapshot may be mounted over a chain, or somebody is busy with it.
func (u *Users) IsUsed(n Name) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.users[n]) > 0 || u.busy[n] != nil
}

// IsKept tells whether a chain is used, or stays mounted for a while since its last user went.
func (u *Users) IsKept(n Name) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, left := u.left[n]
	return left || len(u.users[n]) > 0 || u.busy[n] != nil
}

// IsLeft tells whether a chain stays mounted for a while since its last user went.
func (u *Users) IsLeft(n Name) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, left := u.left[n]
	return left && len(u.users[n]) == 0
}

// of returns the ids of the snapshots that may be mounted over a chain.
func (u *Users) of(n Name) (ids []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Sorted(maps.Keys(u.users[n]))
}

// ifUnused calls fn for a chain that has no users, while nobody else is busy with it.
func (u *Users) ifUnused(ctx context.Context, n Name, fn func() error) error {
	done, err := u.acquire(ctx, n)
	if err != nil {
		return err
	}
	defer done()
	u.mu.Lock()
	used := len(u.users[n]) > 0
	u.mu.Unlock()
	if used {
		return nil
	}
	return fn()
}

// acquire waits until nobody else is busy with a chain, and returns how to let go.
func (u *Users) acquire(ctx context.Context, n Name) (release func(), err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for u.busy[n] != nil {
		done := u.busy[n]
		u.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			err = fmt.Errorf("wait for chain image %s: %w", n, context.Cause(ctx))
		}
		u.mu.Lock()
		if err != nil {
			return nil, err
		}
	}
	done := make(chan struct{})
	u.busy[n] = done
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.busy, n)
		close(done)
	}, nil
}
