package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
)

// create makes a file under another name, and gives it its own only when it is durable: a power cut in between
// would leave one that is empty, or full of zeros, and the store would not open any more.
func create(path string, write func(path string) error) (err error) {
	tmp := path + ".new"
	defer func() {
		if err != nil {
			err = fmt.Errorf("create %s: %w", path, err)
		}
	}()
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := write(tmp); err != nil {
		return err
	}
	if err := fsync(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return fsync(filepath.Dir(path))
}

func fsync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// secureRoot has root be its owner's alone: who can write to it can change what containers run, who can read it
// sees all their files. A directory that holds other things is not changed, but refused where others can write to
// it.
func secureRoot(root string) error {
	fi, err := os.Stat(root)
	if err != nil {
		return fmt.Errorf("look at root: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if uid := os.Geteuid(); ok && int(st.Uid) != uid {
		return fmt.Errorf("%s belongs to uid %d, who could change what containers run: chown %d %s, or set another root",
			root, st.Uid, uid, root)
	}
	if fi.Mode().Perm()&0o077 == 0 {
		return nil
	}
	files, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("look at root: %w", err)
	}
	_, err = os.Stat(filepath.Join(root, "format"))
	ours := err == nil
	for _, f := range files {
		if !ours && f.Name() != "lost+found" { // which every ext4 has
			if fi.Mode().Perm()&0o022 == 0 {
				return nil
			}
			return fmt.Errorf("%s has mode %#o and holds other files: set root to a directory of its own, such as %s/dedup",
				root, fi.Mode().Perm(), root)
		}
	}
	return os.Chmod(root, 0o700)
}

// createMetadata makes an empty metadata.db with all that storage and the sum of seals need in it: one without is none
// of ours.
func createMetadata(path string) error {
	return create(path, func(path string) error {
		ms, err := storage.NewMetaStore(path)
		if err != nil {
			return err
		}
		m := &metaDB{ms}
		err = m.update(context.Background(), func(ctx context.Context) error {
			if _, err := txOf(ctx).CreateBucket(bucketOurs); err != nil {
				return err
			}
			if _, err := createSnapshot(ctx, snapshots.KindActive, "first", "", nil); err != nil {
				return err
			}
			_, _, err := removeSnapshot(ctx, "first")
			return err
		})
		return errors.Join(err, m.close())
	})
}
