// Package inventory finds out which images a place holds, and reads their layers: the overlayfs snapshotter's root of a
// containerd, a Docker with its overlay2 directory, an OCI layout, or registries.
//
// It only reads. Nothing is mounted, changed or locked; databases that a running containerd holds are copied
// to a temporary file first. Layers are read as streams, and nothing of them is kept.
package inventory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// Options of Read.
type Options struct {
	// Platform is which image of an index is meant; zero is this machine's.
	Platform ocispec.Platform
	// PlainHTTP registries are asked without TLS. Those on loopback and private addresses always are.
	PlainHTTP bool
	// User and Password for registries; where User is "", what `docker login` has stored counts.
	User, Password string
}

// Inventory is what a place holds.
type Inventory struct {
	Kind   string // "containerd's overlayfs", "Docker's overlay2", "OCI layout" or "registry"
	Layers []Layer
	Images []Image
	// Containers are those whose files lie on layers of this place, Writable is what they have written.
	Containers int
	Writable   layer.Usage
	// Blobs are the sizes of the compressed blobs of images' layers: containerd keeps them beside the files.
	Blobs map[digest.Digest]int64
}

// Image is a stack of layers.
type Image struct {
	Names  []string // none for layers that belong to no image
	Layers []int    // places in Inventory.Layers, base first
}

// Layer is one layer as overlayfs keeps it: the same diffID on another parent is another one.
type Layer struct {
	Name   string         // for messages
	DiffID content.DiffID // zero when nobody knows it
	// Stored tells that the layer lies unpacked on the disk, and occupies Now.
	Stored bool
	Now    layer.Usage
	// InUse: a container's files lie on it.
	InUse bool
	// Size is how many bytes there are to be read, or a good guess.
	Size int64
	// Draft reads the layer; read is told about bytes that were read.
	Draft func(ctx context.Context, read func(bytes int64)) (layer.Draft, error)
}

// ErrUnknown is wrapped when a source is none of the known kinds.
var ErrUnknown = errors.New("nothing that can be analysed")

// Read finds out what there is at the sources: paths, or images' references. Those of registries make one inventory
// together.
func Read(ctx context.Context, sources []string, opts Options) (all []*Inventory, err error) {
	if opts.Platform.OS == "" {
		opts.Platform = platforms.DefaultSpec()
	}
	var registry *stacks
	for _, source := range sources {
		fi, err := os.Stat(source)
		var inv *Inventory
		switch {
		case err == nil && fi.IsDir():
			inv, err = readDir(ctx, source, opts)
		case err == nil && fi.Mode().IsRegular():
			inv, err = readTar(ctx, source, opts)
		case err == nil:
			err = fmt.Errorf("%s is neither a directory nor a file: %w", source, ErrUnknown)
		case looksLikePath(source) || !errors.Is(err, os.ErrNotExist):
		default:
			if registry == nil {
				registry = newStacks("registry")
				all = append(all, registry.inv)
			}
			err = registry.addReference(ctx, source, opts)
		}
		if err != nil {
			return nil, err
		}
		if inv != nil {
			all = append(all, inv)
		}
	}
	return all, nil
}

// looksLikePath: no reference begins with a slash or a dot.
func looksLikePath(source string) bool {
	return strings.HasPrefix(source, "/") || strings.HasPrefix(source, ".")
}

// dockersContainerd is where a dockerd keeps the containerd that it starts by itself.
const dockersContainerd = "containerd/daemon/" + overlayfsRoot

// readDir tells places apart by what lies in them.
func readDir(ctx context.Context, dir string, opts Options) (*Inventory, error) {
	has := func(names ...string) bool {
		for _, name := range names {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				return false
			}
		}
		return true
	}
	switch {
	case has("metadata.db", "snapshots"):
		return readOverlayfs(ctx, dir, opts)
	case has(overlayfsRoot):
		return readOverlayfs(ctx, filepath.Join(dir, overlayfsRoot), opts)
	case has("index.json", "blobs"):
		return readLayout(ctx, dirBlobs(filepath.Join(dir, "blobs")), filepath.Join(dir, "index.json"), opts)
	case has("overlay2"):
		return readOverlay2(ctx, filepath.Join(dir, "overlay2"))
	case has(dockersContainerd):
		return readOverlayfs(ctx, filepath.Join(dir, dockersContainerd), opts)
	case has("l") || filepath.Base(dir) == "overlay2":
		return readOverlay2(ctx, dir)
	}
	return nil, fmt.Errorf("%s has no %s (containerd), no overlay2 (Docker; with the containerd image store its "+
		"images are in %s) and no index.json (OCI layout): %w",
		dir, overlayfsRoot, "/var/lib/containerd", ErrUnknown)
}

// directory makes a Layer of a directory that overlay mounts use; whole is what goes with it.
func directory(ctx context.Context, name, upper, whole string, diffID content.DiffID) (Layer, error) {
	now, err := diskUsage(ctx, whole)
	if err != nil {
		return Layer{}, fmt.Errorf("measure %s: %w", whole, err)
	}
	return Layer{
		Name: name, DiffID: diffID, Stored: true, Now: now, Size: now.Bytes,
		Draft: func(ctx context.Context, read func(int64)) (layer.Draft, error) {
			return layer.DraftDir(ctx, upper, diffID, read)
		},
	}, nil
}

// diskUsage returns what a directory and all below it occupy. It stays on its file system: a running container's merged
// view is mounted beside its files.
func diskUsage(ctx context.Context, root string) (u layer.Usage, err error) {
	var top unix.Stat_t
	if err := unix.Lstat(root, &top); err != nil {
		return u, err
	}
	seen := map[uint64]bool{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		switch {
		case errors.Is(err, os.ErrNotExist) && path != root:
			return nil // removed meanwhile
		case err != nil:
			return err
		case st.Dev != top.Dev:
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case st.Nlink > 1 && !d.IsDir():
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		u.Bytes += st.Blocks * 512 // stat(2): in units of 512 bytes, whatever the block size
		u.Inodes++
		return nil
	})
	return u, err
}

// blob makes a Layer of a blob.
func blob(desc ocispec.Descriptor, diffID content.DiffID, open func(context.Context) (io.ReadCloser, error)) Layer {
	return Layer{
		Name: desc.Digest.String(), DiffID: diffID, Size: desc.Size,
		Draft: func(ctx context.Context, read func(int64)) (layer.Draft, error) {
			r, err := open(ctx)
			if err != nil {
				return layer.Draft{}, fmt.Errorf("open blob %s: %w", desc.Digest, err)
			}
			defer r.Close()
			d, err := layer.DraftBlob(ctx, desc.Digest, counting{r, read})
			if err == nil && d.DiffID != diffID {
				err = fmt.Errorf("blob %s has the diffID %s, and its image says %s", desc.Digest, d.DiffID.Digest(),
					diffID.Digest())
			}
			return d, err
		},
	}
}

type counting struct {
	r    io.Reader
	read func(int64)
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.read(int64(n))
	return n, err
}

// stacks adds images to an inventory, each layer of which is there once on each parent.
type stacks struct {
	inv  *Inventory
	at   map[content.ChainID]int
	tops map[content.ChainID]int // images by all of their layers
}

func newStacks(kind string) *stacks {
	inv := &Inventory{Kind: kind, Blobs: map[digest.Digest]int64{}}
	return &stacks{inv, map[content.ChainID]int{}, map[content.ChainID]int{}}
}

func (s *stacks) add(name string, diffIDs []digest.Digest, makeLayer func(i int, diffID content.DiffID) (Layer,
	error)) error {
	var chain content.ChainID
	var stack []int
	for i, text := range diffIDs {
		sum, err := content.ParseSum(text.String())
		if err != nil {
			return fmt.Errorf("image %s: diffID: %w", name, err)
		}
		diffID := content.DiffID{Sum: sum}
		chain = chain.Chain(diffID)
		at, ok := s.at[chain]
		if !ok {
			l, err := makeLayer(i, diffID)
			if err != nil {
				return fmt.Errorf("image %s: %w", name, err)
			}
			at = len(s.inv.Layers)
			s.inv.Layers = append(s.inv.Layers, l)
			s.inv.Blobs[digest.Digest(l.Name)] = l.Size
			s.at[chain] = at
		}
		stack = append(stack, at)
	}
	if len(stack) == 0 {
		return nil
	}
	top, ok := s.tops[chain]
	if !ok {
		top = len(s.inv.Images)
		s.inv.Images = append(s.inv.Images, Image{Layers: stack})
		s.tops[chain] = top
	}
	if name != "" {
		s.inv.Images[top].Names = append(s.inv.Images[top].Names, name)
	}
	return nil
}
