package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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

// createMetadata makes an empty metadata.db with all that storage and the sum of seals need in it: one without is none of ours.
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
