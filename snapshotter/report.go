package snapshotter

import (
	"context"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// ChainReport counts chain images.
type ChainReport struct {
	Images int // on the disk
	Mounts int
	Packs  int         // packs that are mounted below shared images
	Usage  layer.Usage // of the images; with their directory when it is measured
}

// Chains reports on the chain images at this moment; measure looks at what they occupy anew.
func (rep *reports) Chains(ctx context.Context, measure bool) (r ChainReport, err error) {
	names, err := rep.chains.List()
	if err != nil {
		return r, err
	}
	for _, n := range names {
		if rep.chains.Images.Has(n) {
			r.Images++
		}
		if rep.chains.IsMounted(n) {
			r.Mounts++
		}
	}
	r.Usage, r.Packs = rep.chains.Images.Usage(), rep.chains.PackMounts()
	if measure {
		r.Usage, err = layer.DiskUsage(ctx, rep.path(dirChains))
	}
	return r, err
}

// IdleMounts returns the mount points of chain images that no container and no view uses. One is
// unmounted some time after the last use, so that one which stays was left by a crash.
func (rep *reports) IdleMounts() ([]string, error) {
	names, err := rep.chains.List()
	if err != nil {
		return nil, err
	}
	var idle []string
	for _, n := range names {
		if rep.chains.IsMounted(n) && !rep.chains.Users.IsKept(n) {
			idle = append(idle, rep.chains.MountPoint(n))
		}
	}
	return idle, nil
}
