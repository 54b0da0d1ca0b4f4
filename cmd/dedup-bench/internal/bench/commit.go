package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Shape of commit.
const (
	changedFiles    = 1000
	committedLayers = 10 // one file each, one over the other
)

// prepareCommit serves one large image. Its trial changes files as a container or a step of a build does, and makes
// layers of that.
func prepareCommit(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	img, err := s.app(ctx)
	return func(ctx context.Context, t *Trial) error { return t.commit(ctx, img) }, "", err
}

func (t *Trial) commit(ctx context.Context, img Image) error {
	if t.Subject.Snapshotter == "erofs" {
		return nil // its differ takes no other's parents
	}
	if err := t.Pull(ctx, t.Subject.Snapshotter, img.Ref); err != nil {
		return err
	}
	chain, err := t.ChainID(ctx, img.Ref)
	if err != nil {
		return err
	}
	ctx, done, err := t.Client().WithLease(ctx)
	if err != nil {
		return fmt.Errorf("take a lease: %w", err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	parent, err := t.container(ctx, chain, func(root string) error { return appendTo(root, changedFiles) })
	if err != nil {
		return err
	}
	err = t.layersOf(fmt.Sprintf("%d changed files", changedFiles), func() error {
		_, err := t.commitContainer(ctx, parent, chain)
		return err
	})
	if err != nil {
		return err
	}
	if err := t.oneFileCommits(ctx, chain); err != nil {
		return err
	}
	return t.oneFileSteps(ctx, chain)
}

// layersOf measures the making of layers.
func (t *Trial) layersOf(what string, fn func() error) error {
	if err := dropCaches("1"); err != nil {
		return err
	}
	c, err := t.measure(nil, fn)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	t.record("commit", what, "s", c.wall.Seconds())
	t.record("commit", what+", CPU", "s", c.cpu.Seconds())
	return nil
}

// container makes a writable snapshot in which change has done its work.
func (t *Trial) container(ctx context.Context, parent string, change func(root string) error) (key string, err error) {
	key = node.NewID("changed")
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	if _, err := sn.Prepare(ctx, key, parent); err != nil {
		return "", fmt.Errorf("make a snapshot: %w", err)
	}
	mounts, err := sn.Mounts(ctx, key) // as clients do: Prepare may answer before all is there
	if err != nil {
		return "", fmt.Errorf("make a snapshot: %w", err)
	}
	return key, t.WithMounts(mounts, change)
}

// commitContainer does what `nerdctl commit` does: writes a layer of the changes, and unpacks it over the parent.
func (t *Trial) commitContainer(ctx context.Context, key, parent string) (name string, err error) {
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	desc, err := rootfs.CreateDiff(ctx, key, sn, t.Client().DiffService())
	if err != nil {
		return "", fmt.Errorf("write a layer: %w", err)
	}
	extract := node.NewID("extract-commit")
	mounts, err := sn.Prepare(ctx, extract, parent)
	if err != nil {
		return "", fmt.Errorf("make a snapshot: %w", err)
	}
	if _, err := t.Client().DiffService().Apply(ctx, desc, mounts); err != nil {
		return "", fmt.Errorf("unpack a layer: %w", err)
	}
	name = node.NewID("committed")
	return name, sn.Commit(ctx, name, extract)
}

// oneFileCommits changes a file and commits, again and again.
func (t *Trial) oneFileCommits(ctx context.Context, chain string) error {
	return t.layersOf(fmt.Sprintf("%d commits of one file", committedLayers), func() error {
		parent := chain
		for i := range committedLayers {
			key, err := t.container(ctx, parent, oneFile(i))
			if err != nil {
				return err
			}
			if parent, err = t.commitContainer(ctx, key, parent); err != nil {
				return err
			}
		}
		return nil
	})
}

// oneFileSteps commits snapshots one over the other, and then writes a layer of each, as the export of a build does.
func (t *Trial) oneFileSteps(ctx context.Context, chain string) error {
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	names := []string{chain}
	for i := range committedLayers {
		key, err := t.container(ctx, names[i], oneFile(i))
		if err != nil {
			return err
		}
		names = append(names, node.NewID("step"))
		if err := sn.Commit(ctx, names[i+1], key); err != nil {
			return fmt.Errorf("commit a step: %w", err)
		}
	}
	return t.layersOf(fmt.Sprintf("export of %d layers of one file", committedLayers), func() error {
		for i := range committedLayers {
			var sides [2][]mount.Mount
			for j, parent := range []string{names[i], names[i+1]} {
				mounts, err := sn.View(ctx, node.NewID("view"), parent)
				if err != nil {
					return fmt.Errorf("view a step: %w", err)
				}
				sides[j] = mounts
			}
			gzip := diff.WithMediaType(ocispec.MediaTypeImageLayerGzip)
			_, err := t.Client().DiffService().Compare(ctx, sides[0], sides[1], gzip)
			if err != nil {
				return fmt.Errorf("write a layer: %w", err)
			}
		}
		return nil
	})
}

func oneFile(i int) func(root string) error {
	return func(root string) error {
		return os.WriteFile(filepath.Join(root, "etc", fmt.Sprintf("step-%d", i)), fmt.Appendln(nil, "step", i), 0o644)
	}
}

var errEnough = errors.New("enough")

// appendTo changes the first files of a root file system, by name.
func appendTo(root string, count int) error {
	err := filepath.WalkDir(filepath.Join(root, "usr"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("changed\n")
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if count--; count == 0 {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) {
		return errors.Join(err, fmt.Errorf("%d files too few to change below %s/usr", count, root))
	}
	return nil
}
