package bench

import (
	"context"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// Shape of fleet: services on one base, each with its own pip install, in two releases.
const (
	services = 12
	releases = 2
)

// prepareFleet makes the images of a system like self-hosted Sentry. Half of its packages are in every
// service, of the others each service has a third; a release is a new build of all.
func prepareFleet(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	var rounds [][]Image
	if len(s.opts.Images) > 0 {
		if len(s.opts.Images) < 2 {
			return nil, "a fleet needs more than one --image", nil
		}
		r, err := s.registry(ctx)
		if err != nil {
			return nil, "", err
		}
		var all []Image
		for _, ref := range s.opts.Images {
			img, err := s.copyImage(ctx, r, ref)
			if err != nil {
				return nil, "", err
			}
			all = append(all, img)
		}
		return fleet{"fleet", [][]Image{all}}.trial, "", nil
	}
	share := min(1, 0.5*s.opts.Scale)
	base, _, err := s.apps(ctx, 0)
	if err != nil {
		return nil, "", err
	}
	layers, err := cached(ctx, fmt.Sprintf("fleet-1-%g", share), services*releases,
		func(dir string) ([]*image.Layer, error) {
			return s.fleet(ctx, dir, share)
		})
	if err != nil {
		return nil, "", err
	}
	for release := range releases {
		r, err := s.registry(ctx)
		if err != nil {
			return nil, "", err
		}
		var round []Image
		for service := range services {
			img, err := s.serve(ctx, r, fmt.Sprintf("system/service-%d:%d", service, release+1), base,
				layers[release*services+service])
			if err != nil {
				return nil, "", err
			}
			round = append(round, img)
		}
		rounds = append(rounds, round)
	}
	return fleet{"fleet", rounds}.trial, "", nil
}

func (s *stage) fleet(ctx context.Context, dir string, share float64) ([]*image.Layer, error) {
	s.opts.Say(fmt.Sprintf("making the layers of %d services in %d releases (once)", services, releases))
	_, apps, err := s.apps(ctx, 1)
	if err != nil {
		return nil, err
	}
	layers := make([]*image.Layer, services*releases)
	var eg errgroup.Group
	eg.SetLimit(2)
	for build := range layers {
		keep := func(pkg string) bool {
			if !inShare(share, "all", pkg) {
				return false
			}
			return inShare(0.5, "every service", pkg) || inShare(1.0/3, build%services, pkg)
		}
		eg.Go(func() (err error) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			layers[build], err = image.NewLayer(dir, image.LayerOptions{}, func(w io.Writer) error {
				return rebuilt(w, apps[0], build, keep)
			})
			return err
		})
	}
	return layers, eg.Wait()
}

type fleet struct {
	scenario string
	rounds   [][]Image
}

// trial pulls the services of a release one after the other, as an update does.
func (f fleet) trial(ctx context.Context, t *Trial) error {
	var sum cost
	for i, round := range f.rounds {
		if err := settle(round...); err != nil {
			return err
		}
		c, err := t.measure(registriesOf(round...), func() error {
			for _, img := range round {
				if err := t.Pull(ctx, t.Subject.Snapshotter, img.Ref); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		t.record(f.scenario, fmt.Sprintf("pull, release %d", i+1), "s", c.wall.Seconds())
		sum = sum.plus(c)
	}
	t.recordPull(f.scenario, sum)
	return t.recordNode(ctx, f.scenario, sum, slices.Concat(f.rounds...))
}
