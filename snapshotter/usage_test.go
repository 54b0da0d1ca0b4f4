package snapshotter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// The usages of all snapshots add up to what the disk holds, whatever came and went, also after a restart in
// order and one that was not.
func TestUsageAddsUp(t *testing.T) {
	needRoot(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	root := t.TempDir()
	s := open(t, root)
	ctx := ns(t, "one")
	noise := func() string {
		b := make([]byte, 1+r.IntN(300_000))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return string(b)
	}
	shared := []string{noise(), noise(), noise(), noise()}
	var names []string
	for i := range 40 {
		files := map[string]string{fmt.Sprintf("own-%d", i): noise()}
		for j, data := range shared {
			if r.IntN(2) == 0 {
				files[fmt.Sprintf("shared-%d", j)] = data
			}
		}
		name, _ := unpack(t, s, fmt.Sprintf("pull-%d", i), "", layerTar(t, files), nil)
		names = append(names, name)
		if len(names) > 5 && r.IntN(2) == 0 {
			gone := r.IntN(len(names))
			if err := s.Remove(ctx, names[gone]); err != nil {
				t.Fatal(err)
			}
			names = slices.Delete(names, gone, gone+1)
		}
		if i%10 != 9 {
			continue
		}
		view := fmt.Sprint("view-", i)
		if _, err := s.View(ctx, view, names[0]); err != nil { // builds a chain image
			t.Fatal(err)
		}
		if err := s.Remove(ctx, view); err != nil {
			t.Fatal(err)
		}
		if i > 10 {
			if err := stop(s); err != nil {
				t.Fatal(err)
			}
			if i > 20 { // as after a crash
				if err := os.Remove(filepath.Join(root, "clean")); err != nil {
					t.Fatal(err)
				}
			}
			s = open(t, root)
		}
		addsUp(t, s, ctx)
	}
}

func addsUp(t *testing.T, s *Snapshotter, ctx context.Context) {
	t.Helper()
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	s.wg.Wait()
	s.layers.Wait()
	var sum snapshots.Usage
	err := s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		u, err := s.Usage(ctx, info.Name)
		sum.Add(u)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	disk, err := layer.DiskUsage(ctx, filepath.Join(s.opts.Root, "objects"), filepath.Join(s.opts.Root, "layers"), filepath.Join(s.opts.Root, "chains"))
	if err != nil {
		t.Fatal(err)
	}
	if off := float64(sum.Size)/float64(disk.Bytes) - 1; off < -0.01 || off > 0.01 {
		t.Errorf("snapshots use %d bytes, the disk holds %d: %.1f %% off", sum.Size, disk.Bytes, 100*off)
	}
	if off := float64(sum.Inodes)/float64(disk.Inodes) - 1; off < -0.02 || off > 0.02 {
		t.Errorf("snapshots use %d inodes, the disk holds %d", sum.Inodes, disk.Inodes)
	}
}
