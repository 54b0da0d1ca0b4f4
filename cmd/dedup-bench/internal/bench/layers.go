package bench

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// Shape of layers100. The published case has 12.4 GB in 100 layers, of which 3.1 GB are different.
const (
	layerCount = 100
	imageCount = 10 // pulled at once, with layerCount/imageCount layers each
	redundancy = 4  // layers that hold the same file
	// uniqueBytes at scale 1, a 50th of the published case.
	uniqueBytes = 3.1e9 / 50
)

func prepareLayers(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	key := fmt.Sprintf("layers100-1-%g", s.opts.Scale)
	layers, err := cached(ctx, key, layerCount, func(dir string) ([]*image.Layer, error) { return s.makeLayers(ctx, dir) })
	if err != nil {
		return nil, "", err
	}
	r, err := s.registry(ctx)
	if err != nil {
		return nil, "", err
	}
	var images []Image
	for i := range imageCount {
		part := layers[i*layerCount/imageCount : (i+1)*layerCount/imageCount]
		img, err := s.serve(ctx, r, fmt.Sprintf("many/layers:%d", i), part...)
		if err != nil {
			return nil, "", err
		}
		images = append(images, img)
	}
	return func(ctx context.Context, t *Trial) error { return t.pullTogether(ctx, "layers100", images) }, "", nil
}

// pullTogether measures the pull of images that start at the same time.
func (t *Trial) pullTogether(ctx context.Context, scenario string, images []Image) error {
	if err := settle(images...); err != nil {
		return err
	}
	c, err := t.measure(registriesOf(images...), func() error {
		eg, ctx := errgroup.WithContext(ctx)
		for _, img := range images {
			eg.Go(func() error { return t.Pull(ctx, t.Subject.Snapshotter, img.Ref) })
		}
		return eg.Wait()
	})
	if err != nil {
		return err
	}
	t.recordPull(scenario, c)
	return nil
}

// payload is a regular file of the inputs, in a spool.
type payload struct {
	header tar.Header
	at     int64
	copy   int // 0: as it is; above: with a few bytes more, so that it is another file
}

// makeLayers deals the files of the Debian and the pip layer out: each to four layers, with another
// mtime in each.
func (s *stage) makeLayers(ctx context.Context, dir string) ([]*image.Layer, error) {
	s.opts.Say(fmt.Sprintf("making %d layers (once)", layerCount))
	base, apps, err := s.apps(ctx, 1)
	if err != nil {
		return nil, err
	}
	spool, err := os.CreateTemp(s.dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("make layers: %w", err)
	}
	defer spool.Close()
	files, total, err := spoolFiles(spool, base, apps[0])
	if err != nil {
		return nil, err
	}
	files = sized(files, total, int64(uniqueBytes*s.opts.Scale))
	dealt := make([][]payload, layerCount)
	for _, f := range files {
		h := fnv.New64a()
		fmt.Fprint(h, f.header.Name, f.copy)
		at := h.Sum64()
		for i := range uint64(redundancy) { // never the same layer twice, and no fixed groups of four
			n := (at + i*(1+at/layerCount%(layerCount/redundancy))) % layerCount
			dealt[n] = append(dealt[n], f)
		}
	}
	layers := make([]*image.Layer, layerCount)
	var eg errgroup.Group
	eg.SetLimit(2)
	for i := range layers {
		eg.Go(func() (err error) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			layers[i], err = image.NewLayer(dir, image.LayerOptions{}, func(w io.Writer) error {
				return writePayloads(w, spool, dealt[i], i)
			})
			return err
		})
	}
	return layers, eg.Wait()
}

func spoolFiles(spool *os.File, layers ...*image.Layer) (files []payload, total int64, err error) {
	w := bufio.NewWriterSize(spool, 1<<20)
	for _, l := range layers {
		err := eachMember(l, func(h *tar.Header, tr *tar.Reader) error {
			if h.Typeflag != tar.TypeReg {
				return nil
			}
			files = append(files, payload{header: *h, at: total})
			n, err := io.Copy(w, tr)
			total += n
			return err
		})
		if err != nil {
			return nil, 0, err
		}
	}
	return files, total, w.Flush()
}

// sized takes every n-th file, or all of them several times over, until there are so many bytes.
func sized(files []payload, total, want int64) []payload {
	var out []payload
	for n := 0; want > 0; n++ {
		share := min(1, float64(want)/float64(total))
		taken := 0.0
		for _, f := range files {
			if taken += share; taken < 1 {
				continue
			}
			taken--
			f.copy = n
			out = append(out, f)
		}
		want -= total
	}
	return out
}

func writePayloads(w io.Writer, spool io.ReaderAt, files []payload, layer int) error {
	tw := tar.NewWriter(w)
	for _, f := range files {
		h := f.header
		var more string
		if f.copy > 0 {
			more = fmt.Sprintf("copy %d\n", f.copy)
			h.Name = fmt.Sprintf("copy-%d/%s", f.copy, h.Name)
		}
		h.ModTime = image.DefaultTime.Add(time.Duration(layer) * time.Second)
		h.Size += int64(len(more))
		if err := tw.WriteHeader(&h); err != nil {
			return fmt.Errorf("write %s: %w", h.Name, err)
		}
		_, err := io.Copy(tw, io.NewSectionReader(spool, f.at, f.header.Size))
		_, err2 := io.WriteString(tw, more)
		if err := errors.Join(err, err2); err != nil {
			return fmt.Errorf("write %s: %w", h.Name, err)
		}
	}
	return tw.Close()
}
