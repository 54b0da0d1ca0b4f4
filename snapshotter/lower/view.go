package lower

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// viewSuffix ends the name of the directory beside an image's mount point in which View shows it.
const viewSuffix = ".view"

func (m *imageMounts) viewPoint(n Name) string { return m.at(n) + viewSuffix }

func (m *imageMounts) unmountView(n Name) error { return unmountEach(m.viewPoint(n), isOther) }

// ImageOf returns where the image is mounted that a directory of View shows; any other directory it returns as it is.
func ImageOf(dir string) string { return strings.TrimSuffix(dir, viewSuffix) }

// View returns a directory with all that lies below the snapshots of a chain, given the mount point of its image, which
// somebody uses. Over a shared image that is an overlay, mounted from the first view on for as long as the image is:
// clients bind it, and none needs to know which options such an overlay has to have.
func (c *Chains) View(ctx context.Context, mountPoint string) (dir string, err error) {
	sum, err := content.ParseSum(filepath.Base(mountPoint))
	n := Name{sum}
	if err != nil || c.MountPoint(n) != mountPoint {
		return "", fmt.Errorf("view %s: no chain image is mounted there", mountPoint)
	}
	done, err := c.Users.acquire(ctx, n)
	if err != nil {
		return "", err
	}
	defer done()
	return c.mounts.view(n)
}

// view mounts, if need be, and returns what View does.
func (m *imageMounts) view(n Name) (dir string, err error) {
	below, ok := m.mounted(n)
	if !ok {
		return "", fmt.Errorf("view %s: the chain image is not mounted any more", m.at(n))
	}
	if len(below.Packs) == 0 {
		return below.Chain, nil
	}
	at := m.viewPoint(n)
	return at, m.kernel.MountView(at, Stack{Lower: []string{below.Chain}, Packs: below.Packs})
}

// MountView mounts an overlay to read from, unless it is mounted there.
func (k Kernel) MountView(at string, s Stack) error {
	if isOther(at) {
		return nil
	}
	options, err := k.Overlay(s)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(at, 0o700); err != nil {
		return fmt.Errorf("create mount point: %w", err)
	}
	overlay := mount.Mount{Type: "overlay", Source: "overlay", Options: labelled(options)}
	return explainMount(at, overlay.Mount(at))
}

// UnmountView takes back what MountView did, if it did.
func UnmountView(at string) error { return unmountEach(at, isOther) }
