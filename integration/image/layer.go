package image

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// LayerOptions describe a blob. The zero value is gzip with OCI's media type.
type LayerOptions struct {
	Compression Compression
	Level       int  // of gzip; 0 is 6
	Docker      bool // docker's media type; zstd has none
	// MediaType overrides the media type, for tests of odd ones.
	MediaType types.MediaType
}

// Layer is a blob file; it implements v1.Layer.
type Layer struct {
	File     string // path of the blob
	Hash     v1.Hash
	Diff     v1.Hash
	Length   int64 // of the blob
	TarSize  int64
	Media    types.MediaType
	compress Compression
}

// NewLayer streams the tar that write produces into a blob file below dir, named by
// its digest ("<dir>/sha256/<hex>", as package registry stores it).
func NewLayer(dir string, opts LayerOptions, write func(io.Writer) error) (*Layer, error) {
	if opts.Compression == "" {
		opts.Compression = Gzip
	}
	if err := os.MkdirAll(filepath.Join(dir, "sha256"), 0o755); err != nil {
		return nil, fmt.Errorf("build layer: %w", err)
	}
	f, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return nil, fmt.Errorf("build layer: %w", err)
	}
	defer os.Remove(f.Name())
	blob, diff := newSum(f), newSum(nil)
	err = compressInto(blob, opts, func(w io.Writer) error {
		diff.w = w
		buffered := bufio.NewWriterSize(diff, 1<<20)
		return errors.Join(write(buffered), buffered.Flush())
	})
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("build layer: %w", err)
	}
	l := &Layer{
		Hash: blob.hash(), Diff: diff.hash(), Length: blob.n, TarSize: diff.n,
		Media: opts.mediaType(), compress: opts.Compression,
	}
	l.File = filepath.Join(dir, "sha256", l.Hash.Hex)
	if err := os.Chmod(f.Name(), 0o644); err != nil {
		return nil, fmt.Errorf("build layer: %w", err)
	}
	if err := os.Rename(f.Name(), l.File); err != nil {
		return nil, fmt.Errorf("build layer: %w", err)
	}
	return l, nil
}

// FromEntries is NewLayer for a list of entries.
func FromEntries(dir string, opts LayerOptions, entries ...Entry) (*Layer, error) {
	return NewLayer(dir, opts, func(w io.Writer) error { return WriteEntries(w, entries) })
}

// FromDir is NewLayer for a directory.
func FromDir(dir string, opts LayerOptions, root string, how DirOptions) (*Layer, error) {
	return NewLayer(dir, opts, func(w io.Writer) error { return WriteDir(w, root, how) })
}

func (o LayerOptions) mediaType() types.MediaType {
	switch {
	case o.MediaType != "":
		return o.MediaType
	case o.Docker && o.Compression == None:
		return types.DockerUncompressedLayer
	case o.Docker:
		return types.DockerLayer
	case o.Compression == None:
		return types.OCIUncompressedLayer
	case o.Compression.zstd():
		return types.OCILayerZStd
	default:
		return types.OCILayer
	}
}

// Digest of the blob.
func (l *Layer) Digest() (v1.Hash, error) { return l.Hash, nil }

// DiffID of the tar.
func (l *Layer) DiffID() (v1.Hash, error) { return l.Diff, nil }

// Size of the blob.
func (l *Layer) Size() (int64, error) { return l.Length, nil }

// MediaType of the blob.
func (l *Layer) MediaType() (types.MediaType, error) { return l.Media, nil }

// Compressed opens the blob.
func (l *Layer) Compressed() (io.ReadCloser, error) { return os.Open(l.File) }

// Uncompressed opens the tar.
func (l *Layer) Uncompressed() (io.ReadCloser, error) {
	f, err := os.Open(l.File)
	if err != nil || l.compress == None {
		return f, err
	}
	if l.compress.zstd() {
		z, err := zstd.NewReader(f)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return readCloser{z, func() error { z.Close(); return f.Close() }}, nil
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return readCloser{z, f.Close}, nil
}

// record is a Layer in a cache's JSON.
type record struct {
	Digest, DiffID  v1.Hash
	Length, TarSize int64
	Media           types.MediaType
	Compression     Compression
}

// Save writes what is needed to Load the layer again, beside its blob.
func (l *Layer) Save(path string) error {
	data, err := json.MarshalIndent(record{l.Hash, l.Diff, l.Length, l.TarSize, l.Media, l.compress}, "", "  ")
	if err != nil {
		return fmt.Errorf("save layer: %w", err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("save layer: %w", err)
	}
	return nil
}

// Load reads what Save wrote; dir is the directory that NewLayer was given.
func Load(dir, path string) (*Layer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load layer: %w", err)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("load layer %s: %w", path, err)
	}
	l := &Layer{Hash: r.Digest, Diff: r.DiffID, Length: r.Length, TarSize: r.TarSize, Media: r.Media,
		compress: r.Compression}
	l.File = filepath.Join(dir, "sha256", r.Digest.Hex)
	if info, err := os.Stat(l.File); err != nil || info.Size() != r.Length {
		return nil, fmt.Errorf("load layer %s: its blob is not whole: %w", path, err)
	}
	return l, nil
}

type readCloser struct {
	io.Reader
	close func() error
}

func (r readCloser) Close() error { return r.close() }

type sum struct {
	w io.Writer
	h hash.Hash
	n int64
}

func newSum(w io.Writer) *sum { return &sum{w: w, h: sha256.New()} }

func (s *sum) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.h.Write(p[:n])
	s.n += int64(n)
	return n, err
}

func (s *sum) hash() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s.h.Sum(nil))}
}
