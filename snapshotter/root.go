package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// root is the directory that holds all state: its paths, its lock, its layout, and whether there is room in it.
type root struct {
	dir, runDir string
	stepAt      func(name string) // nil but in tests
	lock        *os.File
}

// viewPrefix names temporary mount points in the run directory.
const viewPrefix = "view-"

// refused is what to do when metadata.db cannot be used.
const refused = "nothing was removed; put the file back from a backup, or set another root and pull the images again " +
	"(`dedupctl fsck` tells what else is damaged)"

// explain adds what to do to an error of the system that a client is about to get.
func (r *root) explain(err *error) { *err = layer.Explain(*err, r.dir) }

// step names a point at which a test may end the process.
func (r *root) step(name string) {
	if r.stepAt != nil {
		r.stepAt(name)
	}
}

func (r *root) path(elem ...string) string {
	return filepath.Join(append([]string{r.dir}, elem...)...)
}

// clearLeftovers unmounts and removes what a killed process left of its temporary mounts.
func (r *root) clearLeftovers() error {
	old, err := filepath.Glob(r.path(lower.ProbePrefix + "*"))
	views, verr := filepath.Glob(filepath.Join(r.runDir, viewPrefix+"*"))
	errs := []error{err, verr}
	for _, dir := range old {
		release, ok := lower.ClaimAbandoned(dir)
		if !ok {
			continue // another process is trying something out in it
		}
		defer release()
		views = append(views, dir)
	}
	for _, dir := range views {
		mounted, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, point := range append(mounted, dir) {
			// What is no mount point says EINVAL.
			_ = unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// lockPatience is how long a start waits for the lock of a root.
const lockPatience = time.Second

func (r *root) takeLock() (err error) {
	if r.lock, err = os.OpenFile(r.path("lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return fmt.Errorf("lock root: %w", err)
	}
	// A process that a daemon has just forked has its lock until it executes another program, also when the daemon has
	// ended: the probe of the kernel forks one.
	for end := time.Now().Add(lockPatience); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(r.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return fmt.Errorf("another daemon serves from %s (stop it, or set another root): %w", r.dir, err)
		}
	}
}

// checkMetadata creates metadata.db in a new store and refuses any other one without, or with a damaged one: it alone
// says which layers and directories are in use, and an empty one would have all of them removed, what running
// containers wrote included.
func (r *root) checkMetadata(ctx context.Context) error {
	path := r.path("metadata.db")
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && len(data) == 0:
		if err := r.refuseData("is missing or empty"); err != nil {
			return err
		}
		return createMetadata(path)
	case err != nil:
		return fmt.Errorf("read metadata.db: %w", err)
	}
	back, err := checkBolt(data)
	if err != nil {
		return fmt.Errorf("%s is damaged: %w: %s", path, err, refused)
	}
	if back {
		log.G(ctx).Warnf("%s is damaged: its last change is lost, and the version before it is used", path)
	}
	return nil
}

// refuseData returns an error when the store holds data.
func (r *root) refuseData(problem string) error {
	for _, dir := range []string{dirSnapshots, "layers"} {
		files, err := os.ReadDir(r.path(dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("look for snapshots: %w", err)
		}
		if len(files) > 0 {
			return fmt.Errorf("%s %s, and %s holds data: %s", r.path("metadata.db"), problem, r.path(dir), refused)
		}
	}
	return nil
}

// checkFormat returns the version of the layout; a new store gets today's.
func (r *root) checkFormat() (version string, err error) {
	b, err := os.ReadFile(r.path("format"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return layoutVersion, r.noteFormat(layoutVersion)
	case err != nil:
		return "", fmt.Errorf("read format: %w", err)
	}
	version = strings.TrimSuffix(string(b), "\n")
	if version != layoutVersion && indexLayout(version) < 0 {
		return "", fmt.Errorf("%s says version %q, this build reads %q: use the build that wrote it, or set another root",
			r.path("format"), strings.TrimSpace(version), layoutVersion)
	}
	return version, nil
}

func (r *root) noteFormat(version string) error {
	return create(r.path("format"), func(path string) error { return os.WriteFile(path, []byte(version+"\n"), 0o600) })
}

// checkRoom refuses a snapshot on a full disk. The kernel mounts an overlay read-only when it has no room for a
// directory of its own, and the container fails far from here.
func (r *root) checkRoom() error {
	const bytes, inodes = 64 << 10, 8
	var st unix.Statfs_t
	if err := unix.Statfs(r.dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", r.dir, err)
	}
	if st.Bfree*uint64(st.Bsize) < bytes || st.Files > 0 && st.Ffree < inodes {
		return fmt.Errorf("%s has %d bytes and %d inodes free: %w", r.dir, st.Bfree*uint64(st.Bsize), st.Ffree, unix.ENOSPC)
	}
	// What a file system keeps for itself is free to statfs alone.
	fd, err := unix.Open(r.path(dirSnapshots), unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err == nil {
		err = errors.Join(unix.Fallocate(fd, 0, 0, bytes), unix.Close(fd))
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%s has no %d bytes left: %w", r.dir, bytes, err)
	}
	return nil // what else may be wrong is found by who needs it
}

// makeDir creates a directory that an overlay mount writes to.
func (r *root) makeDir(dir string, mode os.FileMode) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

func (r *root) upper(id string) string { return r.path(dirSnapshots, id, "fs") }
func (r *root) work(id string) string  { return r.path(dirSnapshots, id, "work") }
