package inventory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
)

// databases writes what a containerd has at root, and returns the overlayfs root.
func databases(t *testing.T, root string) string {
	t.Helper()
	dir := filepath.Join(root, overlayfsRoot)
	for _, d := range []string{filepath.Join(dir, "snapshots"), filepath.Dir(filepath.Join(root, metadataDB))} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	ms, err := storage.NewMetaStore(filepath.Join(dir, "metadata.db"))
	if err != nil {
		t.Fatal(err)
	}
	err = ms.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		parent := ""
		for i := range 40 {
			key, name := fmt.Sprintf("default/%d/extract", i), fmt.Sprintf("default/%d/%s", i, digest.FromString(fmt.Sprint(i)))
			sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent)
			if err != nil {
				return err
			}
			if _, err := storage.CommitActive(ctx, key, name, snapshots.Usage{}); err != nil {
				return err
			}
			parent = name
			if err := os.MkdirAll(filepath.Join(dir, "snapshots", sn.ID, "fs"), 0o700); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || ms.Close() != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(root, metadataDB), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	store := metadata.NewImageStore(metadata.NewDB(db, nil, nil))
	for i := range 40 {
		img := images.Image{Name: fmt.Sprint("image-", i),
			Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}}
		if _, err := store.Create(namespaces.WithNamespace(t.Context(), "default"), img); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// The same databases are found from wherever one may point.
func TestReadPlaces(t *testing.T) {
	docker := t.TempDir()
	root := filepath.Join(docker, "containerd/daemon")
	dir := databases(t, root)
	for _, source := range []string{docker, root, dir} {
		all, err := Read(t.Context(), []string{source}, Options{})
		if err != nil || len(all) != 1 || len(all[0].Layers) != 40 || all[0].Kind != "containerd's overlayfs" {
			t.Errorf("%s: %+v, %v", source, all, err)
		}
	}
	if _, err := Read(t.Context(), []string{filepath.Join(docker, "containerd")}, Options{}); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
}

// A database that is damaged, as a full or a dying disk leaves it, is an error and no crash.
func TestDamagedDatabases(t *testing.T) {
	root := t.TempDir()
	dir := databases(t, root)
	inv, err := readOverlayfs(t.Context(), dir, Options{})
	if err != nil || len(inv.Layers) != 40 || len(inv.Images) != 1 || len(inv.Images[0].Layers) != 40 {
		t.Fatal(inv, err)
	}
	for _, path := range []string{filepath.Join(dir, "metadata.db"), filepath.Join(root, metadataDB)} {
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for name, bad := range map[string][]byte{
			"short":       whole[:100],
			"zeros":       append(append([]byte(nil), whole[:2*4096]...), make([]byte, len(whole)-2*4096)...),
			"no database": bytes.Repeat([]byte("no database "), 5000),
		} {
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := readOverlayfs(t.Context(), dir, Options{}); err == nil ||
				!strings.Contains(err.Error(), filepath.Base(path)) {
				t.Errorf("%s, %s: %v", filepath.Base(path), name, err)
			}
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A database that another process writes to is copied whole.
func TestCopyDB(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			_ = db.Update(func(tx *bbolt.Tx) error {
				b, err := tx.CreateBucketIfNotExists([]byte("b"))
				if err == nil {
					err = b.Put(fmt.Append(nil, i%50), make([]byte, 3000))
				}
				return err
			})
		}
	}()
	for range 20 {
		copied := filepath.Join(dir, "copy")
		if err := copyDB(t.Context(), path, copied); err != nil {
			t.Fatal(err)
		}
		c, err := bbolt.Open(copied, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = c.View(func(tx *bbolt.Tx) error {
			for err := range tx.Check() {
				return err
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		_ = c.Close()
	}
	close(stop)
	<-stopped
}
