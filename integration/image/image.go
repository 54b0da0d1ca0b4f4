package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Options of an image. The zero value is an OCI image for this architecture.
type Options struct {
	Docker     bool // docker's media types
	Env        []string
	Entrypoint []string
	Cmd        []string
	Labels     map[string]string
	User       string
	Volumes    []string
	Platform   v1.Platform // the zero value is this one
}

// New stacks layers, the first one lowest.
func New(opts Options, layers ...*Layer) (v1.Image, error) {
	manifest, config := types.OCIManifestSchema1, types.OCIConfigJSON
	if opts.Docker {
		manifest, config = types.DockerManifestSchema2, types.DockerConfigJSON
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, manifest), config)
	adds := make([]mutate.Addendum, len(layers))
	for i, l := range layers {
		adds[i] = mutate.Addendum{Layer: l, MediaType: l.Media}
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Variant = "linux", runtime.GOARCH, opts.Platform.Variant
	if opts.Platform.Architecture != "" {
		file.OS, file.Architecture = opts.Platform.OS, opts.Platform.Architecture
	}
	file.Config = v1.Config{
		Env: opts.Env, Entrypoint: opts.Entrypoint, Cmd: opts.Cmd, Labels: opts.Labels, User: opts.User,
	}
	for _, volume := range opts.Volumes {
		if file.Config.Volumes == nil {
			file.Config.Volumes = map[string]struct{}{}
		}
		file.Config.Volumes[volume] = struct{}{}
	}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, fmt.Errorf("build image: %w", err)
	}
	return img, nil
}

// NewIndex is one image for several platforms, with the layers that a function returns for each.
func NewIndex(opts Options, platforms []v1.Platform, layers func(i int) []*Layer) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for i, p := range platforms {
		opts.Platform = p
		img, err := New(opts, layers(i)...)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index, nil
}

// PushIndex pushes an image for several platforms to a plain-HTTP registry.
func PushIndex(ctx context.Context, ref string, index v1.ImageIndex) error {
	parsed, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	if err := remote.WriteIndex(parsed, index, remote.WithContext(ctx), remote.WithJobs(1)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

// Push pushes an image to a plain-HTTP registry.
func Push(ctx context.Context, ref string, img v1.Image) error {
	parsed, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	if err := remote.Write(parsed, img, remote.WithContext(ctx), remote.WithJobs(1)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

// Seed puts layers' blobs straight into the directory of a registry, by hard links where
// the file system allows. A push then finds them there and sends none of their bytes.
func Seed(registryDir string, layers ...*Layer) error {
	for _, l := range layers {
		to := filepath.Join(registryDir, "sha256", l.Hash.Hex)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return fmt.Errorf("seed registry: %w", err)
		}
		err := os.Link(l.File, to)
		if err == nil || errors.Is(err, fs.ErrExist) {
			continue
		}
		if err := copyBlob(l.File, to); err != nil {
			return fmt.Errorf("seed registry: %w", err)
		}
	}
	return nil
}

func copyBlob(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	return errors.Join(copyFile(f, from, info.Size()), f.Close())
}
