package blobs

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

const (
	// arrivalPoll is how often a blob that is on its way is looked at for more.
	arrivalPoll = 2 * time.Millisecond
	// arrivalStall is how long a download may stand still before nobody waits for it any more. containerd's own Apply
	// comes when it is whole, however long that takes.
	arrivalStall = time.Minute
	// maxRef is more than any name of a download that containerd gives.
	maxRef = 4096
)

// Arriving finds a layer's blob that containerd downloads right now for the caller's namespace, as a blob that is read
// while it grows: reading waits for more, and ends with layer.ErrUnverified unless all of it was what the digest says.
// progress is called whenever more has arrived. It works where the content store is a directory of this node.
func (s *Store) Arriving(ctx context.Context, desc ocispec.Descriptor, progress func()) (layer.Blob, bool) {
	ctx, ns, err := outgoing(ctx)
	if err != nil || desc.Digest.Validate() != nil || desc.Size <= 0 {
		return layer.Blob{}, false
	}
	root := s.directory(ctx)
	if root == "" {
		return layer.Blob{}, false
	}
	dir := ingestOf(filepath.Join(root, "ingest"), ns, desc.Digest)
	if dir == "" {
		return layer.Blob{}, false
	}
	if fi, err := os.Lstat(filepath.Join(dir, "data")); err != nil || !fi.Mode().IsRegular() {
		return layer.Blob{}, false // nothing has arrived, or it has just become whole
	}
	return layer.Blob{
		Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size, Ahead: true, Arriving: true,
		Open: func(ctx context.Context) (io.ReadCloser, error) {
			f, err := os.Open(filepath.Join(dir, "data"))
			if err != nil {
				return nil, fmt.Errorf("%w: %w", layer.ErrUnverified, err) // it has just become whole, or was given up
			}
			return &arrival{ctx: ctx, f: f, desc: desc, h: desc.Digest.Algorithm().Hash(), progress: progress}, nil
		},
	}, true
}

// ingestOf finds the directory of a running download. containerd keeps one for each, whose file ref says
// <namespace>/<sequence>/<what is downloaded>, and that ends in the digest.
func ingestOf(ingests, namespace string, blob digest.Digest) string {
	dirs, err := os.ReadDir(ingests)
	if err != nil {
		return ""
	}
	for _, d := range dirs {
		dir := filepath.Join(ingests, d.Name())
		f, err := os.Open(filepath.Join(dir, "ref"))
		if err != nil {
			continue
		}
		ref, err := io.ReadAll(io.LimitReader(f, maxRef))
		f.Close()
		if err == nil && strings.HasPrefix(string(ref), namespace+"/") && strings.HasSuffix(string(ref), "-"+blob.String()) {
			return dir
		}
	}
	return ""
}

// arrival reads a file that grows.
type arrival struct {
	ctx      context.Context
	f        *os.File
	desc     ocispec.Descriptor
	h        hash.Hash
	n        int64
	progress func()
}

func (a *arrival) Read(p []byte) (int, error) {
	for moved := time.Now(); ; {
		if a.n == a.desc.Size {
			return 0, a.verdict()
		}
		n, err := a.f.Read(p[:min(int64(len(p)), a.desc.Size-a.n)])
		if n > 0 {
			a.h.Write(p[:n])
			a.n += int64(n)
			a.progress()
			return n, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, fmt.Errorf("%w: %w", layer.ErrUnverified, err)
		}
		if fi, err := a.f.Stat(); err != nil || fi.Size() < a.n || time.Since(moved) > arrivalStall {
			return 0, fmt.Errorf("%w: the download of %s was given up after %d bytes", layer.ErrUnverified, a.desc.Digest, a.n)
		}
		select {
		case <-time.After(arrivalPoll):
		case <-a.ctx.Done():
			return 0, context.Cause(a.ctx)
		}
	}
}

// Verify reads what a decompressor had no use for, and returns nil only when all of it was what the digest says.
func (a *arrival) Verify() error {
	_, err := io.Copy(io.Discard, struct{ io.Reader }{a})
	return err
}

func (a *arrival) verdict() error {
	if got := digest.NewDigest(a.desc.Digest.Algorithm(), a.h); got != a.desc.Digest {
		return fmt.Errorf("%w: what arrives for %s is %s", layer.ErrUnverified, a.desc.Digest, got)
	}
	return io.EOF
}

func (a *arrival) Close() error { return a.f.Close() }
