package inventory

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// maxIndex is the largest index.json that is read, in bytes.
const maxIndex = 8 << 20

// blobStore is where an OCI layout or a containerd keeps blobs.
type blobStore interface {
	ctdcontent.Provider
	open(digest.Digest) (io.ReadCloser, error)
}

// dirBlobs is a directory blobs/, with blobs/<algorithm>/<hex>.
type dirBlobs string

func (d dirBlobs) path(dgst digest.Digest) (string, error) {
	if err := dgst.Validate(); err != nil { // it becomes a path
		return "", fmt.Errorf("digest %q: %w", dgst, err)
	}
	return filepath.Join(string(d), dgst.Algorithm().String(), dgst.Encoded()), nil
}

func (d dirBlobs) open(dgst digest.Digest) (io.ReadCloser, error) {
	p, err := d.path(dgst)
	if err != nil {
		return nil, err
	}
	return os.Open(p)
}

// ReaderAt implements content.Provider.
func (d dirBlobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (ctdcontent.ReaderAt, error) {
	p, err := d.path(desc.Digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(p)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return fileAt{f, fi.Size(), f.Close}, nil
}

// fileAt implements content.ReaderAt.
type fileAt struct {
	io.ReaderAt
	size  int64
	close func() error
}

func (f fileAt) Size() int64  { return f.size }
func (f fileAt) Close() error { return f.close() }

// tarBlobs are the blobs of an OCI layout in a tar that can be read at any place.
type tarBlobs struct {
	file *os.File
	at   map[string]*io.SectionReader // by name
}

func (t tarBlobs) find(dgst digest.Digest) (*io.SectionReader, error) {
	if err := dgst.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", dgst, err)
	}
	s := t.at["blobs/"+dgst.Algorithm().String()+"/"+dgst.Encoded()]
	if s == nil {
		return nil, fmt.Errorf("blob %s: %w", dgst, os.ErrNotExist)
	}
	return s, nil
}

func (t tarBlobs) open(dgst digest.Digest) (io.ReadCloser, error) {
	s, err := t.find(dgst)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(io.NewSectionReader(s, 0, s.Size())), nil
}

// ReaderAt implements content.Provider.
func (t tarBlobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (ctdcontent.ReaderAt, error) {
	s, err := t.find(desc.Digest)
	if err != nil {
		return nil, err
	}
	return fileAt{s, s.Size(), func() error { return nil }}, nil
}

// readTar reads an OCI layout in a tar, as `docker save` and `ctr image export` write it. The file stays open until the
// process ends: blobs are read later.
func readTar(ctx context.Context, name string, opts Options) (_ *Inventory, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	t := tarBlobs{f, map[string]*io.SectionReader{}}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%s is no tar (a compressed one has to be decompressed first): %w: %w", name, ErrUnknown, err)
		}
		at, err := f.Seek(0, io.SeekCurrent) // archive/tar reads whole blocks, and none ahead
		if err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeReg {
			t.at[path.Clean(h.Name)] = io.NewSectionReader(f, at, h.Size)
		}
	}
	if t.at["index.json"] == nil {
		return nil, fmt.Errorf("%s has no index.json, so it is no OCI layout (docker save writes one since version 25): %w",
			name, ErrUnknown)
	}
	return readIndex(ctx, t, t.at["index.json"], name, opts)
}

func readLayout(ctx context.Context, store blobStore, indexPath string, opts Options) (*Inventory, error) {
	f, err := os.Open(indexPath)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readIndex(ctx, store, f, filepath.Dir(indexPath), opts)
}

func readIndex(ctx context.Context, store blobStore, r io.Reader, source string, opts Options) (*Inventory, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxIndex))
	if err != nil {
		return nil, fmt.Errorf("read index of %s: %w", source, err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("read index of %s: %w: %w", source, ErrUnknown, err)
	}
	s := newStacks("OCI layout")
	for _, desc := range index.Manifests {
		name := desc.Annotations["io.containerd.image.name"]
		if name == "" {
			name = desc.Annotations[ocispec.AnnotationRefName]
		}
		if name == "" {
			name = desc.Digest.String()
		}
		if err := s.addImage(ctx, store, name, desc, opts); err != nil {
			return nil, fmt.Errorf("%s: %w", source, err)
		}
	}
	return s.inv, nil
}

func (s *stacks) addImage(ctx context.Context, store blobStore, name string, target ocispec.Descriptor,
	opts Options) error {
	manifest, diffIDs, err := manifestOf(ctx, store, target, opts.Platform)
	if err != nil {
		return fmt.Errorf("image %s: %w", name, err)
	}
	return s.add(name, diffIDs, func(i int, diffID content.DiffID) (Layer, error) {
		desc := manifest.Layers[i]
		return blob(desc, diffID, func(context.Context) (io.ReadCloser, error) { return store.open(desc.Digest) }), nil
	})
}

func manifestOf(ctx context.Context, store ctdcontent.Provider, target ocispec.Descriptor,
	platform ocispec.Platform) (m ocispec.Manifest, diffIDs []digest.Digest, err error) {
	if m, err = images.Manifest(ctx, store, target, platforms.Only(platform)); err != nil {
		return m, nil, err
	}
	if diffIDs, err = images.RootFS(ctx, store, m.Config); err != nil {
		return m, nil, err
	}
	var layers []ocispec.Descriptor
	for _, l := range m.Layers {
		if images.IsLayerType(l.MediaType) {
			layers = append(layers, l)
		}
	}
	if m.Layers = layers; len(layers) != len(diffIDs) {
		return m, nil, fmt.Errorf("manifest %s has %d layers, and its config %d diffIDs", target.Digest, len(layers),
			len(diffIDs))
	}
	return m, diffIDs, nil
}
