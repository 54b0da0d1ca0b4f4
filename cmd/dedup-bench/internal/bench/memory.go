package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const (
	nearEqual = 10               // images that the memory scenario reads
	idle      = 10 * time.Second // from the last read until the page cache is looked at once more
)

// prepareMemory makes images of one pip install as ten builds would: other owners and times, and a
// file that says which build it is.
func prepareMemory(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	r, err := s.registry(ctx)
	if err != nil {
		return nil, "", err
	}
	var images []Image
	for _, ref := range s.opts.Images {
		img, err := s.copyImage(ctx, r, ref)
		if err != nil {
			return nil, "", err
		}
		images = append(images, img)
	}
	if len(images) > 0 {
		return memory{images}.trial, "", nil
	}
	share := min(1, 0.5*s.opts.Scale)
	layers, err := cached(ctx, fmt.Sprintf("memory-3-%g", share), nearEqual, func(dir string) ([]*image.Layer, error) {
		return s.nearEqual(ctx, dir, share)
	})
	if err != nil {
		return nil, "", err
	}
	for i, l := range layers {
		img, err := s.serve(ctx, r, fmt.Sprintf("near/equal:%d", i), l)
		if err != nil {
			return nil, "", err
		}
		images = append(images, img)
	}
	return memory{images}.trial, "", nil
}

func (s *stage) nearEqual(ctx context.Context, dir string, share float64) ([]*image.Layer, error) {
	s.opts.Say(fmt.Sprintf("making %d near-equal layers (once)", nearEqual))
	_, apps, err := s.apps(ctx, 1)
	if err != nil {
		return nil, err
	}
	layers := make([]*image.Layer, nearEqual)
	var eg errgroup.Group
	eg.SetLimit(2)
	for i := range layers {
		eg.Go(func() (err error) {
			layers[i], err = image.NewLayer(dir, image.LayerOptions{}, func(w io.Writer) error {
				return rebuilt(w, apps[0], i, func(pkg string) bool { return inShare(share, pkg) })
			})
			return err
		})
	}
	return layers, eg.Wait()
}

type memory struct{ images []Image }

// trial reads all files of writable mounts of all images, as containers would, while all
// are mounted, and asks the kernel how much memory that has filled.
func (m memory) trial(ctx context.Context, t *Trial) error {
	for _, img := range m.images {
		if err := t.Pull(ctx, t.Subject.Snapshotter, img.Ref); err != nil {
			return err
		}
	}
	return readTogether(ctx, t, "memory", m.images, nil)
}

// look is what the kernel says of its memory at one moment, in bytes. charged and packs are parts of the page cache:
// what this process brought in, and what dedup's packs hold of it.
type look struct {
	info           map[string]int64
	charged, packs float64
}

func lookAt(t *Trial, c *charged) (l look, err error) {
	if l.info, err = meminfo(); err != nil {
		return l, err
	}
	if l.packs, err = t.packsCached(); err != nil || c == nil {
		return l, err
	}
	l.charged, err = c.bytes()
	return l, err
}

// grown is by how much some lines of meminfo have grown.
func (l look) grown(before map[string]int64, names ...string) (sum float64) {
	for _, name := range names {
		sum += float64(l.info[name] - before[name])
	}
	return max(0, sum)
}

// cached is what the page cache has grown by. With c, it is what c was charged with.
func (l look) cached(before map[string]int64, c *charged) float64 {
	if c != nil {
		return l.charged
	}
	return l.grown(before, "Cached")
}

// readTogether is the part of trial after the pulls. It looks at the page cache at the last read, and again when all
// images have been idle for a while.
func readTogether(ctx context.Context, t *Trial, scenario string, images []Image, c *charged) error {
	if err := dropCaches("3"); err != nil {
		return err
	}
	if err := sleep(ctx, background); err != nil {
		return err
	}
	before, err := meminfo()
	if err != nil {
		return err
	}
	dropped, err := cachesDropped()
	if err != nil {
		return err
	}
	var seconds float64
	var last, later look
	var next func(i int) error
	next = func(i int) error {
		if i == len(images) {
			if last, err = lookAt(t, c); err != nil {
				return err
			}
			if err = sleep(ctx, idle); err != nil {
				return err
			}
			later, err = lookAt(t, c)
			return err
		}
		return t.Active(ctx, t.Subject.Snapshotter, images[i].Ref, func(root string) error {
			start := time.Now()
			if err := walk(ctx, root, make([]byte, 256<<10)); err != nil {
				return err
			}
			seconds += time.Since(start).Seconds()
			return next(i + 1)
		})
	}
	if err := next(0); err != nil {
		return err
	}
	again, err := cachesDropped()
	if err != nil {
		return err
	}
	if again != dropped {
		t.opts.Say(scenario + ": no figure of the page cache: another process dropped it meanwhile")
	} else {
		t.record(scenario, "page cache", "bytes", later.cached(before, c))
		t.record(scenario, "page cache, at the last read", "bytes", last.cached(before, c))
		if last.packs > 0 {
			t.record(scenario, "page cache, at the last read: the packs' own pages", "bytes", last.packs)
		}
	}
	t.record(scenario, "buffers", "bytes", last.grown(before, "Buffers"))
	t.record(scenario, "kernel objects", "bytes", last.grown(before, "Slab"))
	t.record(scenario, "reading all", "s", seconds)
	return nil
}

// packsCached returns what dedup's packs hold of the page cache. The file systems in them hold most of it a second
// time, and the daemon has the kernel forget these pages within seconds.
func (t *Trial) packsCached() (bytes float64, err error) {
	if t.Subject.Snapshotter != node.Snapshotter || t.Subject.Socket != "" {
		return 0, nil
	}
	packs, err := filepath.Glob(filepath.Join(t.DedupRoot(), "packs", "*.erofs"))
	if err != nil {
		return 0, err
	}
	for _, path := range packs {
		f, err := os.Open(path)
		if err != nil {
			return 0, err
		}
		var c unix.Cachestat_t
		err = unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &c, 0) // a range without a length is the whole file
		_ = f.Close()
		if errors.Is(err, unix.ENOSYS) { // before Linux 6.5
			return 0, nil
		}
		if err != nil {
			return 0, fmt.Errorf("pages of %s in memory: %w", path, err)
		}
		bytes += float64(c.Cache) * float64(os.Getpagesize())
	}
	return bytes, nil
}

// cachesDropped counts how often somebody had the kernel drop the page cache, "" where it does not count.
func cachesDropped() (string, error) {
	data, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return "", fmt.Errorf("read memory figures: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if count, ok := strings.CutPrefix(line, "drop_pagecache "); ok {
			return count, nil
		}
	}
	return "", nil
}

// meminfo returns /proc/meminfo in bytes.
func meminfo() (map[string]int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, fmt.Errorf("read memory figures: %w", err)
	}
	m := map[string]int64{}
	for line := range strings.Lines(string(data)) {
		var name string
		var kb int64
		if n, _ := fmt.Sscanf(line, "%s %d kB", &name, &kb); n == 2 {
			m[strings.TrimSuffix(name, ":")] = kb << 10
		}
	}
	return m, nil
}
