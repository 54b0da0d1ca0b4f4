package lower

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ProbePrefix names directories below the root in which something is tried out.
const ProbePrefix = "probe-"

// ProbeDir makes such a directory. Until release is called, or the process ends, no daemon that starts takes it for
// one that a dead process has left: `dedupctl doctor` looks at a root while its daemon comes up.
func ProbeDir(parent, pattern string) (dir string, release func(), err error) {
	for range 1000 {
		if dir, err = os.MkdirTemp(parent, pattern); err != nil {
			return "", nil, err
		}
		f, err := lockDir(dir, unix.LOCK_EX)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", nil, errors.Join(err, os.Remove(dir))
		}
		if err != nil {
			continue
		}
		if _, err := os.Lstat(dir); err == nil {
			return dir, func() { _ = f.Close() }, nil
		}
		_ = f.Close() // a daemon was faster, and has removed it
	}
	return "", nil, fmt.Errorf("make a directory in %s: something removes it again and again", parent)
}

// ClaimAbandoned tells whether nothing uses a directory of ProbeDir any more, and keeps it so until release is called.
func ClaimAbandoned(dir string) (release func(), ok bool) {
	f, err := lockDir(dir, unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, os.ErrNotExist):
		return nil, false
	case err != nil: // no directory
		return func() {}, true
	}
	return func() { _ = f.Close() }, true
}

func lockDir(dir string, how int) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
		}
	}
}
