package lower

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// packMounts are the packs below mounted shared images, each mounted once.
type packMounts struct {
	dir  string
	path func(content.PackID) string // of its file
	loop bool

	mu sync.Mutex // guards what follows, and is held while one is mounted
	// users are the chains whose image was mounted over a pack since the chain was last unmounted.
	users map[content.PackID]map[Name]bool
}

// at is where a pack is mounted.
func (p *packMounts) at(id content.PackID) string { return filepath.Join(p.dir, id.String()) }

// note tells that a chain is mounted over packs.
func (p *packMounts) note(n Name, ids []content.PackID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range ids {
		p.noteLocked(n, id)
	}
}

func (p *packMounts) noteLocked(n Name, id content.PackID) {
	if p.users[id] == nil {
		p.users[id] = map[Name]bool{}
	}
	p.users[id][n] = true
}

// mount makes sure that packs are mounted for a chain.
func (p *packMounts) mount(n Name, devices []erofs.Device) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range devices {
		at := p.at(d.Pack)
		p.noteLocked(n, d.Pack)
		if isErofs(at) {
			continue
		}
		if err := os.MkdirAll(at, 0o700); err != nil {
			return fmt.Errorf("create mount point: %w", err)
		}
		if err := mountPack(p.path(d.Pack), at, d, p.loop); err != nil {
			return err
		}
	}
	return nil
}

// areMounted reports whether all packs are.
func (p *packMounts) areMounted(ids []content.PackID) bool {
	for _, id := range ids {
		if !isErofs(p.at(id)) {
			return false
		}
	}
	return true
}

// unmount gives up a chain's use of packs, and unmounts those that have no other.
func (p *packMounts) unmount(n Name) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for id, users := range p.users {
		if !users[n] {
			continue
		}
		if delete(users, n); len(users) == 0 {
			delete(p.users, id)
			errs = append(errs, unmountAll(p.at(id)))
		}
	}
	return errors.Join(errs...)
}

// clear unmounts what nobody has noted a use of.
func (p *packMounts) clear() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	dirs, err := os.ReadDir(p.dir)
	if err != nil {
		return fmt.Errorf("list mounted packs: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		if id, ok := content.ParsePackID(dir.Name()); ok && len(p.users[id]) == 0 {
			errs = append(errs, unmountAll(p.at(id)))
		}
	}
	return errors.Join(errs...)
}

// count is how many packs are mounted.
func (p *packMounts) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.users)
}
