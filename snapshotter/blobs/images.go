package blobs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	ctdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

const (
	// maxJSON is the largest manifest or config that is looked at, in bytes. containerd's own limit is 8 MiB.
	maxJSON = 8 << 20
	// maxLayers is more than any kernel or registry lets an image have.
	maxLayers = 4096
	// labelConfig is what containerd puts on a manifest once it has found the config in it.
	labelConfig = "containerd.io/gc.ref.content.config"
)

// Image is one manifest with its config.
type Image struct {
	Manifest digest.Digest
	Config   digest.Digest
	Layers   []ocispec.Descriptor // base first
	DiffIDs  []content.DiffID     // of Layers
	Chains   []content.ChainID    // of Layers
}

// images are the images of one namespace, as far as anybody has asked. They are looked up anew when an
// answer is not found, which is once for an image that is being pulled.
type images struct {
	refreshing sync.Mutex

	mu         sync.Mutex // guards what follows
	byManifest map[digest.Digest]*Image
	byChain    map[content.ChainID][]place
	byBlob     map[digest.Digest][]*Image
}

// place is where a chain stands in an image.
type place struct {
	image *Image
	i     int
}

func (s *Store) imagesOf(namespace string) *images {
	s.mu.Lock()
	defer s.mu.Unlock()
	im := s.images[namespace]
	if im == nil {
		im = &images{byManifest: map[digest.Digest]*Image{}}
		s.images[namespace] = im
	}
	return im
}

func (im *images) chain(c content.ChainID) []place {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.byChain[c]
}

func (im *images) blob(d digest.Digest) []*Image {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.byBlob[d]
}

// places returns where a chain stands in the images of the caller's namespace; nothing when there is none,
// or containerd does not answer.
func (s *Store) places(ctx context.Context, chain content.ChainID) ([]place, error) {
	_, ns, err := outgoing(ctx)
	if err != nil || s.silent() {
		return nil, err
	}
	im := s.imagesOf(ns)
	if found := im.chain(chain); len(found) > 0 {
		return found, nil
	}
	if err := s.refresh(ctx, im); err != nil {
		return nil, fmt.Errorf("images of namespace %s: %w", ns, err)
	}
	return im.chain(chain), nil
}

// DiffID tells from the images of the caller's namespace which layer a chainID ends in. It
// follows from the hashes: any image that has the chainID has the same diffID there.
func (s *Store) DiffID(ctx context.Context, chain content.ChainID) (d content.DiffID, ok bool, err error) {
	found, err := s.places(ctx, chain)
	if len(found) > 0 {
		d, ok = found[0].image.DiffIDs[found[0].i], true
	}
	return d, ok, err
}

// Images returns all images of the caller's namespace, also those that are not unpacked.
func (s *Store) Images(ctx context.Context) (list []*Image, err error) {
	_, ns, err := outgoing(ctx)
	if err != nil {
		return nil, err
	}
	im := s.imagesOf(ns)
	if err := s.refresh(ctx, im); err != nil {
		return nil, fmt.Errorf("images of namespace %s: %w", ns, err)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, img := range im.byManifest {
		if img != nil {
			list = append(list, img)
		}
	}
	return list, nil
}

// Below returns an image of the caller's namespace that has a chain, with the place of the layer that ends it.
func (s *Store) Below(ctx context.Context, chain content.ChainID) (p Part, ok bool, err error) {
	found, err := s.places(ctx, chain)
	if len(found) > 0 {
		p, ok = Part{found[0].image, found[0].i}, true
	}
	return p, ok, err
}

func (s *Store) Find(ctx context.Context, chain content.ChainID, hint digest.Digest) (b layer.Blob, ok bool,
	err error) {
	places, err := s.places(ctx, chain)
	if err != nil {
		return b, false, err
	}
	seen := map[digest.Digest]bool{}
	for _, p := range places {
		desc := p.image.Layers[p.i]
		if seen[desc.Digest] || !archive.KnownMediaType(desc.MediaType) {
			continue
		}
		seen[desc.Digest] = true
		if b, err = s.Blob(ctx, desc); !errdefs.IsNotFound(err) {
			return b, err == nil, err
		}
	}
	if hint == "" || len(places) > 0 || s.silent() {
		return b, false, nil
	}
	b, err = s.Blob(ctx, ocispec.Descriptor{Digest: hint})
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return b, false, nil
	}
	return b, err == nil, err
}

// With returns the images of the caller's namespace that have this blob as a layer.
func (s *Store) With(ctx context.Context, blob digest.Digest) ([]*Image, error) {
	_, ns, err := outgoing(ctx)
	if err != nil {
		return nil, err
	}
	im := s.imagesOf(ns)
	if found := im.blob(blob); len(found) > 0 {
		return found, nil
	}
	if err := s.refresh(ctx, im); err != nil {
		return nil, fmt.Errorf("images of namespace %s: %w", ns, err)
	}
	return im.blob(blob), nil
}

// Above returns the images of a namespace that have a chain, each with the place of the layer that ends it, from what
// has been looked up before, without asking containerd.
func (s *Store) Above(namespace string, chain content.ChainID) (found []Part) {
	for _, p := range s.imagesOf(namespace).chain(chain) {
		found = append(found, Part{p.image, p.i})
	}
	return found
}

// Part is an image and the place of one of its layers.
type Part struct {
	*Image
	At int
}

// Ends tells from what has been looked up before, without asking containerd, whether a chain is all of
// an image, or only a part of one. Both are false for one that no image was seen with.
func (s *Store) Ends(namespace string, chain content.ChainID) (whole, part bool) {
	for _, p := range s.imagesOf(namespace).chain(chain) {
		if p.i == len(p.image.Layers)-1 {
			whole = true
		} else {
			part = true
		}
	}
	return whole, part
}

// refresh reads the manifests that are new since the last time, and forgets those that are gone.
func (s *Store) refresh(ctx context.Context, im *images) error {
	im.refreshing.Lock()
	defer im.refreshing.Unlock()
	out, _, err := outgoing(ctx)
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(out, answerTimeout)
	defer cancel()
	var all []ctdcontent.Info
	err = s.content.Walk(short, func(info ctdcontent.Info) error {
		all = append(all, info)
		return nil
	}, `labels."`+labelConfig+`"`)
	if err != nil {
		return s.noAnswer(ctx, short, err)
	}
	next := make(map[digest.Digest]*Image, len(all))
	for _, info := range all {
		if old, ok := im.byManifest[info.Digest]; ok { // only refresh changes the map
			next[info.Digest] = old
			continue
		}
		img, err := s.read(ctx, info)
		if err != nil && !errors.Is(err, errSenseless) {
			continue // its config may be on its way
		}
		if err != nil {
			log.G(ctx).WithError(err).Debugf("leave out manifest %s", info.Digest)
		}
		next[info.Digest] = img // nil for one that makes no sense
	}
	byChain, byBlob := map[content.ChainID][]place{}, map[digest.Digest][]*Image{}
	for _, img := range next {
		if img == nil {
			continue
		}
		for i, c := range img.Chains {
			byChain[c] = append(byChain[c], place{img, i})
			if d := img.Layers[i].Digest; !slices.Contains(byBlob[d], img) {
				byBlob[d] = append(byBlob[d], img)
			}
		}
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.byManifest, im.byChain, im.byBlob = next, byChain, byBlob
	return nil
}

// errSenseless is wrapped where reading again would give the same.
var errSenseless = errors.New("no image of layers")

// read reads a manifest and its config.
func (s *Store) read(ctx context.Context, info ctdcontent.Info) (*Image, error) {
	var manifest ocispec.Manifest
	if err := s.decode(ctx, info, &manifest); err != nil {
		return nil, err
	}
	if len(manifest.Layers) == 0 || len(manifest.Layers) > maxLayers ||
		!ctdimages.IsConfigType(manifest.Config.MediaType) {
		return nil, fmt.Errorf("%d layers, config of type %q: %w", len(manifest.Layers), manifest.Config.MediaType,
			errSenseless)
	}
	if manifest.Config.Digest.Validate() != nil {
		return nil, fmt.Errorf("config %q: %w", manifest.Config.Digest, errSenseless)
	}
	configInfo, err := s.info(ctx, manifest.Config.Digest)
	if err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := s.decode(ctx, configInfo, &config); err != nil {
		return nil, err
	}
	img := &Image{Manifest: info.Digest, Config: manifest.Config.Digest, Layers: manifest.Layers}
	if len(config.RootFS.DiffIDs) != len(img.Layers) {
		return nil, fmt.Errorf("%d layers and %d diffIDs: %w", len(img.Layers), len(config.RootFS.DiffIDs), errSenseless)
	}
	var chain content.ChainID
	for i, text := range config.RootFS.DiffIDs {
		sum, err := content.ParseSum(text.String())
		if err != nil || img.Layers[i].Digest.Validate() != nil {
			return nil, fmt.Errorf("layer %q, diffID %q: %w", img.Layers[i].Digest, text, errSenseless)
		}
		d := content.DiffID{Sum: sum}
		chain = chain.Chain(d)
		img.DiffIDs, img.Chains = append(img.DiffIDs, d), append(img.Chains, chain)
	}
	return img, nil
}

func (s *Store) decode(ctx context.Context, info ctdcontent.Info, into any) error {
	if info.Size > maxJSON {
		return fmt.Errorf("%d bytes of JSON: %w", info.Size, errSenseless)
	}
	r, err := s.open(ctx, info)
	if err != nil {
		return err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxJSON))
	if err != nil {
		return fmt.Errorf("read %s: %w", info.Digest, err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("decode %s: %w: %w", info.Digest, errSenseless, err)
	}
	return nil
}
