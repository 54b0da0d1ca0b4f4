package lower

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// erofsMagic is the kernel's EROFS_SUPER_MAGIC_V1.
const erofsMagic = 0xE0F5E1E2

// IsMounted reports whether a chain's image is mounted where its users look for it.
func (c *Chains) IsMounted(n Name) bool {
	var st unix.Statfs_t
	return unix.Statfs(c.MountPoint(n), &st) == nil && int64(st.Type) == erofsMagic
}

func (c *Chains) mountImage(n Name) error {
	if err := os.MkdirAll(c.MountPoint(n), 0o700); err != nil {
		return fmt.Errorf("create mount point: %w", err)
	}
	c.opts.Step("chain.mounting")
	_, err := mountErofs(c.Image(n), c.MountPoint(n), c.opts.Loop)
	c.opts.Step("chain.mounted")
	return err
}

// mountErofs mounts an image from its file where the kernel can (6.12), else, or if asked to, from a loop device.
func mountErofs(image, target string, asked bool) (loop bool, err error) {
	if err = unix.ENOTBLK; !asked {
		err = unix.Mount(image, target, "erofs", unix.MS_RDONLY, "")
	}
	if errors.Is(err, unix.ENOTBLK) {
		m := mount.Mount{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}
		loop, err = true, m.Mount(target)
	}
	if errors.Is(err, unix.ENOSPC) { // it is not about space, and must not look so
		return loop, fmt.Errorf("mount %s: this machine has too many mounts: raise fs.mount-max", image)
	}
	if err != nil {
		return loop, fmt.Errorf("mount %s: %w", image, err)
	}
	return loop, nil
}

func (c *Chains) unmount(n Name) error {
	for c.IsMounted(n) {
		if err := unix.Unmount(c.MountPoint(n), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount chain image %s: %w", n, err)
		}
	}
	c.opts.Step("chain.unmounted")
	if err := os.Remove(c.MountPoint(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}
