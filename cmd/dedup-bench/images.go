package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
)

// demoImage is an image that can be served.
type demoImage struct {
	name   string // repository:tag
	layers []*image.Layer
	image  v1.Image
}

// demoImages builds the two application images: the same Debian layer, as FROM gives
// it, and a pip install each.
func demoImages(ctx context.Context, p *progress) ([]demoImage, error) {
	set, err := inputs.Open(p.say)
	if err != nil {
		return nil, err
	}
	base, err := set.Debian(ctx)
	if err != nil {
		return nil, err
	}
	var images []demoImage
	for n := 1; n <= 2; n++ {
		app, err := set.App(ctx, n)
		if err != nil {
			return nil, err
		}
		d := demoImage{name: fmt.Sprintf("team-%d/app:v%d", n, n), layers: []*image.Layer{base, app}}
		d.image, err = image.New(image.Options{
			Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"python3"},
		}, d.layers...)
		if err != nil {
			return nil, err
		}
		images = append(images, d)
	}
	return images, nil
}

// served is an image in a registry of its own.
type served struct {
	demoImage
	ref      string
	registry *bench.Registry
}

// serve starts one registry for each image and pushes the image to it.
func serve(ctx context.Context, dir string, images []demoImage) (_ []served, err error) {
	var all []served
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(all))
		}
	}()
	for i, img := range images {
		home := filepath.Join(dir, fmt.Sprintf("registry-%d", i+1))
		if err := image.Seed(home, img.layers...); err != nil {
			return all, err
		}
		r, err := bench.StartRegistry(ctx, home)
		if err != nil {
			return all, err
		}
		s := served{demoImage: img, ref: r.Addr + "/" + img.name, registry: r}
		all = append(all, s)
		if err := image.Push(ctx, s.ref, img.image); err != nil {
			return all, err
		}
	}
	return all, nil
}

func closeAll(all []served) error {
	var errs []error
	for _, s := range all {
		errs = append(errs, s.registry.Close())
	}
	return errors.Join(errs...)
}

// warm reads an image's blobs into the page cache: a registry is remote in real life,
// its disk is not what a pull waits for.
func (s served) warm() error {
	for _, l := range s.layers {
		if err := bench.Warm(l.File); err != nil {
			return err
		}
	}
	return nil
}
