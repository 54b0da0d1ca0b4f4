package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// fileMetacopy stands in the root since overlays were mounted with metacopy=on. Upper directories of that time may
// hold files without bytes, and overlayfs refuses these, and the directories that they are in, without it: also a
// newer kernel has to go on with it.
const fileMetacopy = "metacopy"

// probeKernel finds out how to mount overlays here.
func (s *store) probeKernel() error {
	if err := linkTo(filepath.Join(s.opts.RunDir, dirChains), s.path(linkMounts)); err != nil {
		return fmt.Errorf("link to where chain images are mounted: %w", err)
	}
	uppers, err := os.ReadDir(s.path(dirSnapshots))
	if err != nil {
		return err
	}
	if len(uppers) == 0 {
		if err := os.Remove(s.path(fileMetacopy)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	_, err = os.Stat(s.path(fileMetacopy))
	marked := err == nil
	if s.kernel, err = lower.Probe(s.opts.Root, s.opts.Verity, s.opts.PageCache, marked); err != nil {
		return err
	}
	if s.opts.noDense != nil {
		s.kernel.NoDense = s.opts.noDense
	}
	if !s.kernel.Metacopy || marked {
		return nil
	}
	return create(s.path(fileMetacopy), func(path string) error { return os.WriteFile(path, nil, 0o600) })
}

// VerityState is "on", or "off: " and why. A container that runs goes on with the pack that it began with, so "on" may
// be followed by how many packs are still without.
func (rep *reports) VerityState() string {
	if rep.kernel.NoVerity != nil {
		return "off: " + rep.kernel.NoVerity.Error()
	}
	if n := rep.layers.Packs().Stats().Plain; n > 0 {
		return fmt.Sprintf("on; packs from before that are without: %d (one goes when no container has an image over it)", n)
	}
	return "on"
}

// OverlayOptions are the options of containers' overlays beside directories, as the kernel was found to need them.
func (rep *reports) OverlayOptions() []string { return rep.kernel.Options() }

// PageCache is what containers share in memory.
func (rep *reports) PageCache() lower.PageCache {
	if rep.kernel.Shared {
		return lower.PageCacheShared
	}
	return lower.PageCachePrivate
}
