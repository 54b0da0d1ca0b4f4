package lower

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// imageMounts are the mounted images of chains. Who mounts or unmounts one is the only one that is busy with its chain.
type imageMounts struct {
	dir    string
	images *Images
	kernel Kernel
	packs  packMounts
	ahead  ahead
	reads  func([]content.PackID) // is called before somebody reads the packs of a shared image
	step   func(name string)
}

// at is where a chain's image is mounted.
func (m *imageMounts) at(n Name) string { return filepath.Join(m.dir, n.Hex()) }

func (m *imageMounts) isMounted(n Name) bool { return isErofs(m.at(n)) }

// mounted tells what lies below who uses a chain, where it is mounted as it should be.
func (m *imageMounts) mounted(n Name) (Below, bool) {
	if !m.isMounted(n) {
		return Below{}, false
	}
	im := m.images.known(n)
	if im == nil || !im.whole || im.damaged || im.shared && !m.packs.areMounted(im.ids()) {
		return Below{}, false
	}
	return m.below(n, im), true
}

// below tells what lies below who uses a chain that is mounted, and has it read ahead.
func (m *imageMounts) below(n Name, im *image) Below {
	b := Below{Chain: m.at(n)}
	var files []string
	if im.shared { // of a private image no pack's metadata is needed
		for _, id := range im.ids() {
			b.Packs = append(b.Packs, m.packs.at(id))
			files = append(files, m.packs.path(id))
		}
		m.reads(im.ids())
	}
	if !m.kernel.Loop { // the cache of a loop device is another
		m.ahead.start(n, m.images.Path(n), files)
	}
	return b
}

// mount mounts an image, and below it, if it is a shared one, its packs.
func (m *imageMounts) mount(n Name) (below Below, err error) {
	im := m.images.known(n)
	if err := m.unmountView(n); err != nil { // it shows the image that was here before
		return below, err
	}
	if err := os.MkdirAll(m.at(n), 0o700); err != nil {
		return below, fmt.Errorf("create mount point: %w", err)
	}
	m.step("chain.mounting")
	if im.shared {
		err = m.packs.mount(n, im.devices)
		m.step("chain.packs")
	}
	if err == nil {
		err = mountImage(m.images.Path(n), m.at(n), im.devices, m.packs.path, from(m.kernel.Loop, im.dense))
	}
	m.step("chain.mounted")
	if err != nil {
		return below, errors.Join(err, m.packs.unmount(n))
	}
	return m.below(n, im), nil
}

func (m *imageMounts) unmount(n Name) error {
	err := errors.Join(m.unmountView(n), unmountAll(m.at(n)))
	m.step("chain.unmounted")
	return errors.Join(err, m.packs.unmount(n))
}
