package bench

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Image is one that a registry on loopback serves.
type Image struct {
	Ref      string
	Blobs    []string // files of its layers
	Tars     int64    // bytes of its layers uncompressed; 0 where not known
	registry *Registry
}

func registriesOf(images ...Image) []*Registry {
	var all []*Registry
	for _, img := range images {
		if !slices.Contains(all, img.registry) {
			all = append(all, img.registry)
		}
	}
	return all
}

// stage holds what the trials of a group share: registries with images.
type stage struct {
	opts       Options
	dir        string
	release    func() // of dir
	registries []*Registry
	// limit measures what no subject can do without; nil where there is no such thing.
	limit func(context.Context) ([]report.Sample, error)
}

func newStage(opts Options) (*stage, error) {
	dir, release, err := newOwned(opts.Tmp, stagePattern)
	if err != nil {
		return nil, fmt.Errorf("make a work directory: %w", err)
	}
	return &stage{opts: opts, dir: dir, release: release}, nil
}

func (s *stage) close() error {
	var errs []error
	for _, r := range s.registries {
		errs = append(errs, r.Close())
	}
	errs = append(errs, os.RemoveAll(s.dir))
	s.release()
	return errors.Join(errs...)
}

// registry starts another one.
func (s *stage) registry(ctx context.Context) (*Registry, error) {
	r, err := StartRegistry(ctx, filepath.Join(s.dir, fmt.Sprintf("registry-%d", len(s.registries)+1)))
	if err != nil {
		return nil, err
	}
	s.registries = append(s.registries, r)
	return r, nil
}

var env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// serve builds an image of layers and pushes it.
func (s *stage) serve(ctx context.Context, r *Registry, repository string, layers ...*image.Layer) (Image, error) {
	if err := image.Seed(r.Dir, layers...); err != nil {
		return Image{}, err
	}
	built, err := image.New(image.Options{Env: env, Cmd: []string{"/bin/sh"}}, layers...)
	if err != nil {
		return Image{}, err
	}
	img := Image{Ref: r.Addr + "/" + repository, registry: r}
	for _, l := range layers {
		img.Blobs = append(img.Blobs, filepath.Join(r.Dir, "sha256", l.Hash.Hex))
		img.Tars += l.TarSize
	}
	return img, image.Push(ctx, img.Ref, built)
}

// app serves one large image, from a registry of its own.
func (s *stage) app(ctx context.Context) (Image, error) {
	r, err := s.registry(ctx)
	if err != nil {
		return Image{}, err
	}
	base, apps, err := s.apps(ctx, 1)
	if err != nil {
		return Image{}, err
	}
	return s.serve(ctx, r, "team-1/app:v1", base, apps[0])
}

// copyImage copies an image that a user named into a registry on loopback, so that a
// network is not what is measured.
func (s *stage) copyImage(ctx context.Context, r *Registry, ref string) (Image, error) {
	parsed, err := name.ParseReference(ref)
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	s.opts.Say("copying " + ref + " into a registry on loopback")
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	from, err := remote.Image(parsed, remote.WithContext(ctx), remote.WithPlatform(platform),
		remote.WithAuthFromKeychain(authn.DefaultKeychain))
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	layers, err := from.Layers()
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	repository := strings.ToLower(parsed.Context().RepositoryStr())
	img := Image{Ref: r.Addr + "/" + repository + ":" + tagOf(parsed), registry: r}
	for _, l := range layers {
		digest, err := l.Digest()
		if err != nil {
			return Image{}, fmt.Errorf("image %s: %w", ref, err)
		}
		img.Blobs = append(img.Blobs, filepath.Join(r.Dir, "sha256", digest.Hex))
	}
	return img, image.Push(ctx, img.Ref, from)
}

func tagOf(ref name.Reference) string {
	if tag, ok := ref.(name.Tag); ok {
		return tag.TagStr()
	}
	return "pinned"
}

// warmImage is a small image with a shell.
func (s *stage) warmImage(ctx context.Context) (Image, error) {
	entries, err := inputs.Busybox(ctx, s.opts.Say)
	if err != nil {
		return Image{}, err
	}
	layer, err := image.FromEntries(filepath.Join(s.dir, "warm"), image.LayerOptions{}, entries...)
	if err != nil {
		return Image{}, err
	}
	r, err := s.registry(ctx)
	if err != nil {
		return Image{}, err
	}
	return s.serve(ctx, r, "warm/up:1", layer)
}

func cached(ctx context.Context, key string, count int, build func(dir string) ([]*image.Layer, error)) ([]*image.Layer,
	error) {
	cache, err := node.CacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "bench", key)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cache layers: %w", err)
	}
	unlock, err := node.Lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	path := func(i int) string { return filepath.Join(dir, fmt.Sprintf("layer-%d.json", i)) }
	var layers []*image.Layer
	for i := range count {
		l, err := image.Load(dir, path(i))
		if err != nil {
			break
		}
		layers = append(layers, l)
	}
	if len(layers) == count {
		return layers, nil
	}
	if layers, err = build(dir); err != nil {
		return nil, err
	}
	for i, l := range layers {
		if err := l.Save(path(i)); err != nil {
			return nil, err
		}
	}
	return layers, nil
}

// eachMember calls fn with the members of a layer, in order.
func eachMember(l *image.Layer, fn func(h *tar.Header, tr *tar.Reader) error) (err error) {
	r, err := l.Uncompressed()
	if err != nil {
		return fmt.Errorf("read layer: %w", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read layer: %w", err)
		}
		if err := fn(h, tr); err != nil {
			return err
		}
	}
}
