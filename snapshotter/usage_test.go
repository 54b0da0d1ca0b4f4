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
	disk, err := layer.DiskUsage(ctx, filepath.Join(s.opts.Root, "packs"), filepath.Join(s.opts.Root, "layers"),
		filepath.Join(s.opts.Root, "chains"))
	if err != nil {
		t.Fatal(err)
	}
	if off := float64(sum.Size)/float64(disk.Bytes) - 1; off < -0.01 || off > 0.01 {
		t.Errorf("snapshots use %d bytes, the disk holds %d: %.1f %% off", sum.Size, disk.Bytes, 100*off)
	}
	// Some directories are not counted, and rounding is: there are few inodes.
	if off := sum.Inodes - disk.Inodes; off < -4 || off > 4 {
		t.Errorf("snapshots use %d inodes, the disk holds %d", sum.Inodes, disk.Inodes)
	}
}

// CRI asks for the usage of a committed snapshot once, when it first sees it. What it adds up is what the disk holds
// nevertheless, while images that share much come in.
func TestUsageIsAskedOnce(t *testing.T) {
	needRoot(t)
	s := open(t, t.TempDir())
	ctx := ns(t, "k8s.io")
	told := map[string]int64{}
	look := func() {
		t.Helper()
		s.wg.Wait()
		err := s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
			if _, ok := told[info.Name]; ok {
				return nil
			}
			u, err := s.Usage(ctx, info.Name)
			told[info.Name] = u.Size
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var sum int64
		for _, n := range told {
			sum += n
		}
		disk, err := layer.DiskUsage(ctx, filepath.Join(s.opts.Root, "packs"), filepath.Join(s.opts.Root, "layers"),
			filepath.Join(s.opts.Root, "chains"))
		if err != nil {
			t.Fatal(err)
		}
		if off := float64(sum)/float64(disk.Bytes) - 1; off < -0.01 || off > 0.01 {
			t.Errorf("%d snapshots were said to use %d bytes, the disk holds %d: %.1f %% off", len(told), sum, disk.Bytes,
				100*off)
		}
	}
	var tops []string
	shared := map[string]string{}
	for i := range 50 {
		shared[fmt.Sprint("shared-", i)] = noiseOf(uint64(i), 200_000)
	}
	for i := range 8 {
		base, _ := unpack(t, s, "k8s.io", "", layerTar(t, map[string]string{"base": noiseOf(100, 2_000_000)}), nil)
		files := map[string]string{"own": noiseOf(uint64(1000+i), 500_000)} // of a rebuild
		for name, data := range shared {
			files[name] = data
		}
		top, _ := unpack(t, s, "k8s.io", base, layerTar(t, files), nil)
		tops = append(tops, top)
		if i%3 == 0 { // somebody else has the same
			unpack(t, s, "other", "", layerTar(t, map[string]string{"base": noiseOf(100, 2_000_000)}), nil)
		}
		if i > 3 { // the first, who had most of what all share, go
			if err := s.Remove(ctx, tops[i-4]); err != nil {
				t.Fatal(err)
			}
			delete(told, tops[i-4])
			s.layers.Wait()
		}
		if i == 5 {
			if err := stop(s); err != nil {
				t.Fatal(err)
			}
			s = open(t, s.opts.Root)
		}
		if i < 4 || i == 7 {
			look()
		}
	}
}

func noiseOf(seed uint64, size int) string {
	r := rand.New(rand.NewPCG(seed, 4))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}
