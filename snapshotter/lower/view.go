package lower

import (
	"context"
	"errors"
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
	if isOther(at) {
		return at, nil
	}
	options, err := m.kernel.Overlay(Stack{Lower: []string{below.Chain}, Packs: below.Packs})
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("create mount point: %w", err)
	}
	overlay := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	return at, explainMount(at, overlay.Mount(at))
}
