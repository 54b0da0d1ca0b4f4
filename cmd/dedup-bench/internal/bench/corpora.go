package bench

import (
	"context"
	"errors"
	"fmt"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// corpusPrefix begins the names of the scenarios that measure one corpus each.
const corpusPrefix = "corpus-"

// CorporaScenarios are the scenarios over kinds of images that nobody chose for dedup. They download some
// gigabytes once, so "all" leaves them out.
func CorporaScenarios() (names []string) {
	for _, name := range inputs.Corpora() {
		names = append(names, corpusPrefix+name)
	}
	return names
}

func corporaGroups() (all []group) {
	for _, name := range inputs.Corpora() {
		all = append(all, group{[]string{corpusPrefix + name}, 15,
			func(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
				return prepareCorpus(ctx, s, name)
			}})
	}
	return all
}

// corpus is the images of one kind, in the order in which a node gets them.
type corpus struct {
	scenario string
	about    inputs.Corpus
	images   []Image // one for each of about.Versions
}

func prepareCorpus(ctx context.Context, s *stage, name string) (func(context.Context, *Trial) error, string, error) {
	if len(s.opts.Images) > 0 {
		return nil, "it has images of its own", nil
	}
	set, err := inputs.Open(s.opts.Say)
	if err != nil {
		return nil, "", err
	}
	about, err := set.Corpus(ctx, name)
	if errors.Is(err, node.ErrMissing) {
		return nil, err.Error(), nil
	}
	if err != nil {
		return nil, "", err
	}
	c := corpus{scenario: corpusPrefix + name, about: about}
	for i, v := range about.Versions {
		r, err := s.registry(ctx)
		if err != nil {
			return nil, "", err
		}
		img, err := s.serve(ctx, r, fmt.Sprintf("team/%s:%d", name, i+1), v.Layers...)
		if err != nil {
			return nil, "", err
		}
		c.images = append(c.images, img)
	}
	return c.trial, "", nil
}

// trial pulls the images one after the other and starts each, then reads all of all of them.
func (c corpus) trial(ctx context.Context, t *Trial) (err error) {
	var sum cost
	for i, img := range c.images {
		what := c.about.Versions[i].What
		cost, err := t.pull(ctx, img)
		if err != nil {
			return err
		}
		t.record(c.scenario, what+": pull", "s", cost.wall.Seconds())
		if cost.hasUsed {
			t.record(c.scenario, what+": disk added", "bytes", float64(cost.used.Bytes))
			t.record(c.scenario, what+": inodes added", "inodes", float64(cost.used.Inodes))
		}
		sum = sum.plus(cost)
		if c.about.Versions[i].NoStart {
			continue
		}
		if err := c.start(ctx, t, img, what); err != nil {
			return err
		}
	}
	t.record(c.scenario, "all: pull", "s", sum.wall.Seconds())
	if sum.hasUsed {
		t.record(c.scenario, "all: disk", "bytes", float64(sum.used.Bytes))
		t.record(c.scenario, "all: inodes", "inodes", float64(sum.used.Inodes))
	}
	t.record(c.scenario, "all: disk, with the content store", "bytes", float64(sum.disk.Bytes))
	group, err := newCharged()
	if err != nil {
		return err
	}
	if group != nil {
		defer func() { err = errors.Join(err, group.close()) }()
	}
	return readTogether(ctx, t, c.scenario, c.images, group)
}

// start runs the service's command once, with nothing cached.
func (c corpus) start(ctx context.Context, t *Trial, img Image, what string) error {
	if len(c.about.Command) == 0 {
		return nil
	}
	if err := dropCaches("3"); err != nil {
		return err
	}
	d, err := t.firstOutput(ctx, img, c.about.Command...)
	if err != nil {
		return fmt.Errorf("start %s: %w", what, err)
	}
	t.record(c.scenario, what+": start, cold", "s", d.Seconds())
	return nil
}
