package inventory

import (
	"context"
	"fmt"
	"io"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// addReference asks a registry for an image's manifest and config. Its layers are read later, as they arrive.
func (s *stacks) addReference(ctx context.Context, ref string, opts Options) error {
	var nameOpts []name.Option
	if opts.PlainHTTP {
		nameOpts = append(nameOpts, name.Insecure)
	}
	parsed, err := name.ParseReference(ref, nameOpts...)
	if err != nil {
		return fmt.Errorf("%q is no path that exists, and no image reference: %w: %w", ref, ErrUnknown, err)
	}
	auth := remote.WithAuthFromKeychain(authn.DefaultKeychain)
	if opts.User != "" {
		auth = remote.WithAuth(&authn.Basic{Username: opts.User, Password: opts.Password})
	}
	img, err := remote.Image(parsed, auth, remote.WithContext(ctx), remote.WithPlatform(v1.Platform{
		OS: opts.Platform.OS, Architecture: opts.Platform.Architecture, Variant: opts.Platform.Variant,
	}))
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("config of image %s: %w", ref, err)
	}
	layers, err := img.Layers()
	if err != nil {
		return fmt.Errorf("layers of image %s: %w", ref, err)
	}
	if len(layers) != len(config.RootFS.DiffIDs) {
		return fmt.Errorf("image %s has %d layers and %d diffIDs", ref, len(layers), len(config.RootFS.DiffIDs))
	}
	diffIDs := make([]digest.Digest, len(layers))
	for i, d := range config.RootFS.DiffIDs {
		diffIDs[i] = digest.Digest(d.String())
	}
	return s.add(ref, diffIDs, func(i int, diffID content.DiffID) (Layer, error) {
		hash, err := layers[i].Digest()
		if err != nil {
			return Layer{}, err
		}
		size, err := layers[i].Size()
		if err != nil {
			return Layer{}, err
		}
		return blob(ocispec.Descriptor{Digest: digest.Digest(hash.String()), Size: size}, diffID,
			func(context.Context) (io.ReadCloser, error) {
				return layers[i].Compressed() // of the context that remote.Image was given; it verifies the digest
			}), nil
	})
}
