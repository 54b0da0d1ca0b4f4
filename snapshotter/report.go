package snapshotter

import (
	"context"
	"os"
	"slices"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// ChainReport counts chain images.
type ChainReport struct {
	Images int // on the disk
	Mounts int
	Usage  layer.Usage // of the images; with their directory when it is measured
}

// Chains reports on the chain images at this moment; measure looks at what they occupy anew.
func (s *Snapshotter) Chains(ctx context.Context, measure bool) (r ChainReport, err error) {
	names, err := s.chains.list()
	if err != nil {
		return r, err
	}
	for _, n := range names {
		if s.chains.hasImage(n) {
			r.Images++
		}
		if s.chains.isMounted(n) {
			r.Mounts++
		}
	}
	r.Usage = s.chains.usage()
	if measure {
		r.Usage, err = layer.DiskUsage(ctx, s.path(dirChains))
	}
	return r, err
}

func (c *chains) hasImage(n chainName) bool {
	_, err := os.Stat(c.image(n))
	return err == nil
}

// OverlayOptions are the options of every overlay mount, as the kernel was found to need them.
func (s *Snapshotter) OverlayOptions() []string { return slices.Clone(s.kernel.options) }

// IdleMounts returns the mount points of chain images that no container and no view uses. Whoever used one last
// unmounts it, so that one which stays was left by a crash.
func (s *Snapshotter) IdleMounts() ([]string, error) {
	names, err := s.chains.list()
	if err != nil {
		return nil, err
	}
	var idle []string
	for _, n := range names {
		if s.chains.isMounted(n) && s.chains.idle(n) {
			idle = append(idle, s.chains.mountPoint(n))
		}
	}
	return idle, nil
}

func (c *chains) idle(n chainName) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.users[n]) == 0 && c.busy[n] == nil
}
