package bench

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Shape of scale; fullScale is the scale at which there are 2,000 layers, 1,000,000 objects and
// 10,000 snapshots.
const (
	fullScale      = 50
	filesPerLayer  = 500
	layersPerImage = 10
)

type scaled struct {
	first, second []Image // the same layers in two registries
	layers        int
	snapshots     int
}

func prepareScale(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	count := max(1, int(2000/fullScale/layersPerImage*s.opts.Scale)) * layersPerImage
	sc := scaled{layers: count, snapshots: max(10, int(10000/fullScale*s.opts.Scale))}
	layers, err := cached(ctx, fmt.Sprintf("scale-1-%d", count), count, func(dir string) ([]*image.Layer, error) {
		s.opts.Say(fmt.Sprintf("making %d layers of %d files (once)", count, filesPerLayer))
		var made []*image.Layer
		for i := range count {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			l, err := image.NewLayer(dir, image.LayerOptions{Level: 1}, func(w io.Writer) error { return smallFiles(w, i) })
			if err != nil {
				return nil, err
			}
			made = append(made, l)
		}
		return made, nil
	})
	if err != nil {
		return nil, "", err
	}
	for _, into := range []*[]Image{&sc.first, &sc.second} {
		r, err := s.registry(ctx)
		if err != nil {
			return nil, "", err
		}
		for part := range slices.Chunk(layers, layersPerImage) {
			img, err := s.serve(ctx, r, fmt.Sprintf("many/files:%d", len(*into)), part...)
			if err != nil {
				return nil, "", err
			}
			*into = append(*into, img)
		}
	}
	return sc.trial, "", nil
}

// smallFiles writes files of 1.1 to 4 KiB that no other layer has.
func smallFiles(w io.Writer, layer int) error {
	random := rand.New(rand.NewPCG(uint64(layer), 1))
	tw := tar.NewWriter(w)
	text := make([]byte, 4096)
	for i := range filesPerLayer {
		for j := range text {
			text[j] = "abcdefghijklmnop"[random.Uint32()&15]
		}
		p := text[:1100+random.IntN(len(text)-1100)]
		h := &tar.Header{
			Name: fmt.Sprintf("layer-%d/dir-%d/file-%d", layer, i%20, i), Typeflag: tar.TypeReg, Mode: 0o644,
			Size: int64(len(p)), ModTime: image.DefaultTime,
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := tw.Write(p); err != nil {
			return err
		}
	}
	return tw.Close()
}

func (sc scaled) trial(ctx context.Context, t *Trial) error {
	if err := settle(sc.first...); err != nil {
		return err
	}
	pullAll := func(list []Image) func() error {
		return func() error {
			for _, img := range list {
				if err := t.Pull(ctx, t.Subject.Snapshotter, img.Ref); err != nil {
					return err
				}
			}
			return nil
		}
	}
	c, err := t.measure(registriesOf(sc.first...), pullAll(sc.first))
	if err != nil {
		return err
	}
	per := 1 / float64(sc.layers)
	t.record("scale", "ingest, per layer", "s", c.wall.Seconds()*per)
	t.recordUsed("scale", c)
	if c, err = t.measure(registriesOf(sc.second...), pullAll(sc.second)); err != nil {
		return err
	}
	t.record("scale", "known image, per layer", "s", c.wall.Seconds()*per)
	key, err := sc.snapshotCalls(ctx, t)
	if err != nil {
		return err
	}
	if err := t.restarted(ctx, "scale", key); err != nil {
		return err
	}
	var resident int64
	for _, pid := range t.pids() {
		peak, err := node.PeakMemory(pid)
		if err != nil {
			return err
		}
		resident += peak
	}
	t.record("scale", "memory after a restart", "bytes", float64(resident))
	return sc.collect(ctx, t)
}

// snapshotCalls makes the snapshots, and asks for the mounts of each.
func (sc scaled) snapshotCalls(ctx context.Context, t *Trial) (string, error) {
	ctx, done, err := t.Client().WithLease(ctx)
	if err != nil {
		return "", fmt.Errorf("take a lease: %w", err)
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	var parents []string
	for _, img := range sc.first {
		chain, err := t.ChainID(ctx, img.Ref)
		if err != nil {
			return "", err
		}
		parents = append(parents, chain)
	}
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	var keys []string
	prepare, err := timed(sc.snapshots, func(i int) error {
		keys = append(keys, node.NewID("scale"))
		// A root for the garbage collector: they outlive the lease.
		root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "bench"})
		_, err := sn.Prepare(ctx, keys[i], parents[i%len(parents)], root)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("prepare: %w", err)
	}
	mounts, err := timed(sc.snapshots, func(i int) error {
		_, err := sn.Mounts(ctx, keys[i])
		return err
	})
	if err != nil {
		return "", fmt.Errorf("mounts: %w", err)
	}
	for _, call := range []struct {
		name string
		took []time.Duration
	}{{"Prepare", prepare}, {"Mounts", mounts}} {
		t.record("scale", call.name+", median", "s", call.took[len(call.took)/2].Seconds())
		t.record("scale", call.name+", 99th percentile", "s", call.took[len(call.took)*99/100].Seconds())
	}
	return keys[0], nil
}

// timed calls fn n times and returns how long each call took, sorted.
func timed(n int, fn func(i int) error) ([]time.Duration, error) {
	var all []time.Duration
	for i := range n {
		start := time.Now()
		if err := fn(i); err != nil {
			return nil, err
		}
		all = append(all, time.Since(start))
	}
	slices.Sort(all)
	return all, nil
}

// collect removes everything and waits for containerd's garbage collector.
func (sc scaled) collect(ctx context.Context, t *Trial) error {
	sn := t.Client().SnapshotService(t.Subject.Snapshotter)
	var active []string
	err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindActive {
			active = append(active, info.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	if len(active) < sc.snapshots {
		return fmt.Errorf("%d of %d snapshots are left after a restart", len(active), sc.snapshots)
	}
	start := time.Now()
	for _, key := range active {
		if err := sn.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove snapshot: %w", err)
		}
	}
	t.record("scale", "Remove, mean", "s", time.Since(start).Seconds()/float64(len(active)))
	all := slices.Concat(sc.first, sc.second)
	start = time.Now()
	var errs []error
	for i, img := range all {
		var opts []images.DeleteOpt
		if i == len(all)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		errs = append(errs, t.Client().ImageService().Delete(ctx, img.Ref, opts...))
	}
	t.record("scale", "garbage collection", "s", time.Since(start).Seconds())
	return errors.Join(errs...)
}
