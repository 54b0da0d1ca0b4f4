package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// prepareBuild serves one large image. Its trial has BuildKit run steps over it, each of which writes one file, and
// export their layers.
func prepareBuild(ctx context.Context, s *stage) (func(context.Context, *Trial) error, string, error) {
	if _, err := node.BuildBuildKit(ctx, s.opts.Say); err != nil {
		return nil, "BuildKit cannot be built here: " + err.Error(), nil
	}
	img, err := s.app(ctx)
	return func(ctx context.Context, t *Trial) error { return t.build(ctx, img) }, "", err
}

func (t *Trial) build(ctx context.Context, img Image) (err error) {
	if t.Subject.Snapshotter == "erofs" {
		return nil // BuildKit does not know it
	}
	b, err := node.StartBuildKit(ctx, t.Node, t.Subject.Snapshotter)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	t.clients = []int{b.Pid()}
	defer func() { t.clients = nil }()
	dir, err := os.MkdirTemp(t.disk, "build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	write := func(run ...string) error {
		text := "FROM " + img.Ref + "\n" + strings.Join(run, "\n") + "\n"
		return os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644)
	}
	if err := write("RUN true"); err != nil { // pulls the image
		return err
	}
	if _, err := b.Build(ctx, dir); err != nil {
		return err
	}
	var steps []string
	for i := range committedLayers {
		steps = append(steps, fmt.Sprintf("RUN echo step %d > /etc/step-%d", i, i))
	}
	if err := write(steps...); err != nil {
		return err
	}
	for _, part := range []struct {
		what  string
		flags []string
	}{
		{"%d RUN steps", []string{"--no-cache"}},
		{"export of %d layers", []string{"--output", "type=image,name=example.test/made:1"}},
	} {
		c, err := t.measure(nil, func() error {
			_, err := b.Build(ctx, dir, part.flags...)
			return err
		})
		if err != nil {
			return err
		}
		what := fmt.Sprintf(part.what, committedLayers)
		t.record("build", what, "s", c.wall.Seconds())
		t.record("build", what+", CPU", "s", c.cpu.Seconds())
	}
	return nil
}
