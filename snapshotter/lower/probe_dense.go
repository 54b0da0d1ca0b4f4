package lower

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// MountsDense reports whether the kernel mounts dense packs, found out by trying in a private directory below dir,
// which it removes. An error says why it cannot be tried: without root, or where no pack can be mounted.
func MountsDense(dir string) (_ bool, err error) {
	dir, release, err := ProbeDir(dir, ProbePrefix)
	if err != nil {
		return false, err
	}
	defer release()
	p := newProber(dir)
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.write(); err != nil {
		return false, err
	}
	loop := p.needsLoop()
	image, err := p.mount("private", loop)
	if err == nil {
		err = p.check(image)
	}
	if err != nil {
		return false, err
	}
	if err = p.tryDense(loop); runsOut(err) {
		return false, err
	}
	return err == nil, nil
}

// runsOut tells an error that says nothing of what the kernel can do: there is too little of something at the moment.
func runsOut(err error) bool {
	for _, target := range []error{errNoLoop, errNoMount, unix.ENOSPC, unix.ENOMEM, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// tryDense mounts an image with small blocks and its pack, and reads the file in both.
func (p *prober) tryDense(loop bool) error {
	image, err := p.mount("dense", loop)
	if err == nil {
		err = p.check(image)
	}
	if err != nil {
		return err
	}
	pack, err := p.make("mounted-dense-pack")
	if err != nil {
		return err
	}
	d := p.packs[true]
	if err := mountPack(p.path(packFile(true)), pack, d, loop); err != nil {
		return err
	}
	p.mounted = append(p.mounted, pack)
	got, err := os.ReadFile(filepath.Join(pack, erofs.PackPath(d.Pack, 1)))
	if err == nil && !bytes.Equal(got, p.payload) {
		err = errors.New("a dense pack does not show the bytes that it has")
	}
	return err
}
