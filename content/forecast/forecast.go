// Package forecast tells what a store would occupy that held certain images, and what the same images occupy
// as directories, as overlayfs keeps them.
//
// The figures come from the trees that an ingest would write (layer.Draft), and from the chain images that
// would be made of them: both are made for real, and measured. What a file occupies is its size rounded up to blocks
// of 4 KiB; what directories occupy is estimated for ext4.
//
// It stores nothing, and looks at no disk.
package forecast

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Chain is an image's layers, base first, as places in a list of drafts.
type Chain []int

// Store is what a store would occupy.
type Store struct {
	Packs       layer.Usage // payloads
	Trees       layer.Usage
	ChainImages layer.Usage
	Directories layer.Usage
}

// Total is the sum.
func (s Store) Total() layer.Usage {
	return Add(s.Packs, s.Trees, s.ChainImages, s.Directories)
}

// Add adds up.
func Add(all ...layer.Usage) (sum layer.Usage) {
	for _, u := range all {
		sum.Bytes += u.Bytes
		sum.Inodes += u.Inodes
	}
	return sum
}

func file(size int64) layer.Usage { return layer.Usage{Bytes: content.Blocks(size), Inodes: 1} }

// Options are the settings of the store.
type Options struct {
	Fidelity content.Fidelity // content.Exact or content.Python
	Verity   bool             // fs-verity on packs, as ext4 keeps it
	// Private: chain images for page_cache = "private".
	Private bool
	// Dense: packs are dense, where the kernel mounts these (Linux 6.4).
	Dense bool
}

// packs are the packs of a store: one for each draft that brings something new.
type packs struct {
	dense   bool
	devices []erofs.Device
	places  map[content.ObjectID]content.Place
}

// add makes the pack of a tree's new payloads, and returns what it occupies.
func (p *packs) add(entries []*content.Entry, hashed bool) (u layer.Usage, err error) {
	id := content.PackID(len(p.devices) + 1)
	var sizes []int64
	next := int64(content.BlockSize)
	for _, e := range entries {
		if _, known := p.places[e.Object]; e.Object.IsZero() || known {
			continue
		}
		p.places[e.Object] = content.Place{Pack: id, N: uint32(len(sizes)), Offset: next, Size: e.Size}
		next += erofs.Space(e.Size, p.dense)
		sizes = append(sizes, e.Size)
	}
	if len(sizes) == 0 {
		return u, nil
	}
	size, err := erofs.PackSize(sizes, p.dense)
	if err != nil {
		return u, err
	}
	p.devices = append(p.devices, erofs.Device{Pack: id, Tag: content.Sum{}.Hex(),
		Blocks: uint32(size / content.BlockSize)})
	u = file(size)
	if hashed {
		u.Bytes += verity.Space(size)
	}
	return u, nil
}

// Of returns what a store would occupy that held the drafts and the chain images of the chains. Packs are counted as
// they come in; merging small ones later gives back a few blocks each.
func Of(ctx context.Context, opts Options, drafts []layer.Draft, chains []Chain) (s Store, err error) {
	stored := &packs{dense: opts.Dense, places: map[content.ObjectID]content.Place{}}
	seen := map[content.LayerID]bool{}
	for _, d := range drafts {
		t := treeOf(d, opts.Fidelity)
		if seen[t.ID] {
			continue
		}
		seen[t.ID] = true
		s.Trees = Add(s.Trees, file(int64(len(t.File))))
		entries, err := t.Entries()
		if err != nil {
			return s, err
		}
		u, err := stored.add(entries, opts.Verity)
		if err != nil {
			return s, err
		}
		s.Packs = Add(s.Packs, u)
	}
	const nameLen = 13 + len(".erofs")
	n := len(stored.devices)
	s.Directories = layer.Usage{Bytes: directory(n, n*dirent(nameLen)), Inodes: 1} // packs/
	s.ChainImages, err = chainImages(ctx, opts, drafts, chains, stored)
	return s, err
}

func treeOf(d layer.Draft, f content.Fidelity) layer.DraftTree {
	if f == content.Exact {
		return d.Exact
	}
	return d.Python
}

func chainImages(ctx context.Context, opts Options, drafts []layer.Draft, chains []Chain, stored *packs) (layer.Usage,
	error) {
	var distinct []Chain
	seen := map[string]bool{}
	for _, c := range chains {
		name := ""
		for _, i := range c {
			id := treeOf(drafts[i], opts.Fidelity).ID
			name += string(id.Sum[:])
		}
		if !seen[name] {
			seen[name] = true
			distinct = append(distinct, c)
		}
	}
	sizes := make([]int64, len(distinct))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i, c := range distinct {
		g.Go(func() (err error) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			sizes[i], err = chainImage(ctx, opts, drafts, c, stored)
			return err
		})
	}
	err := g.Wait()
	var sum layer.Usage
	for _, n := range sizes {
		sum = Add(sum, file(n))
	}
	return sum, err
}

func chainImage(ctx context.Context, opts Options, drafts []layer.Draft, c Chain, stored *packs) (int64, error) {
	layers := make([][]*content.Entry, len(c))
	for k, i := range c {
		var err error
		if layers[k], err = treeOf(drafts[i], opts.Fidelity).Entries(); err != nil {
			return 0, err
		}
	}
	root, err := tree.Merge(ctx, layers...)
	if err != nil {
		return 0, fmt.Errorf("merge %d layers: %w", len(c), err)
	}
	used := map[content.PackID]bool{}
	for _, id := range root.Objects() {
		used[stored.places[id].Pack] = true
	}
	devices := slices.DeleteFunc(slices.Clone(stored.devices), func(d erofs.Device) bool { return !used[d.Pack] })
	return erofs.WriteChain(ctx, io.Discard, root, erofs.Options{
		Place:    func(o content.ObjectID) (content.Place, bool) { p, ok := stored.places[o]; return p, ok },
		Packs:    devices,
		Redirect: !opts.Private,
		Dense:    opts.Dense,
	})
}

// Directories returns what the files of a layer occupy as directories of ext4 with inodes of 256 bytes.
func Directories(d layer.Draft) (u layer.Usage, err error) {
	entries, err := d.Exact.Entries()
	if err != nil {
		return u, err
	}
	type names struct{ n, bytes int }
	children := map[string]names{}
	for _, e := range entries {
		if e.Path != "" {
			dir, name := content.SplitPath(e.Path)
			c := children[dir]
			children[dir] = names{c.n + 1, c.bytes + dirent(len(name))}
		}
	}
	for _, e := range entries {
		var bytes int64
		switch e.Kind {
		case content.Hardlink:
			continue
		case content.Dir:
			bytes = directory(children[e.Path].n, children[e.Path].bytes)
		case content.Regular:
			bytes = content.Blocks(e.Size)
		case content.Symlink:
			if len(e.Target) >= fastSymlink {
				bytes = content.BlockSize
			}
		}
		u = Add(u, layer.Usage{Bytes: bytes + xattrs(e.Xattrs), Inodes: 1})
	}
	return u, nil
}

// What ext4 keeps in an inode of 256 bytes (Documentation/filesystems/ext4 of the kernel).
const (
	fastSymlink = 60 // a shorter target needs no block
	// inlineXattrs is what is left of the inode behind its fields, in bytes.
	inlineXattrs = 256 - 160 - 4
)

func xattrs(list []content.Xattr) int64 {
	need := 4 // an empty entry ends the list
	for _, x := range list {
		need += 16 + (len(x.Name)+3)&^3 + (len(x.Value)+3)&^3 // the name's prefix is a number; a few bytes too many
	}
	if len(list) == 0 || need <= inlineXattrs {
		return 0
	}
	return content.BlockSize
}

// dirent is the length of a directory entry of ext4, in bytes.
func dirent(name int) int { return (8 + name + 3) &^ 3 }

// directory is what a directory with n entries of so many bytes together occupies. Beyond one block it is a tree of
// hashes, whose leaves are split in halves: ln 2 of them is used on average.
func directory(n, bytes int) int64 {
	const room = content.BlockSize - 12 // a checksum ends each block
	if bytes+dirent(1)+dirent(2) <= room {
		return content.BlockSize
	}
	leaves := math.Round(float64(bytes) / (room * math.Ln2))
	return content.BlockSize * (1 + int64(max(2, leaves)))
}

// Prefix is a directory of images in whose files, all below it included, there are duplicates.
type Prefix struct {
	Path  string
	Bytes int64 // of the blocks that duplicates occupy: every copy but the first
	Files int64
	Rest  bool // parts of it are prefixes of their own, and not counted here
	// Parts are the largest directories in it, where it is one that holds packages; their paths are theirs within it.
	Parts []Prefix
}

// rows is how many prefixes Duplicates returns at most, and parts how many parts of one.
const (
	rows  = 12
	parts = 6
)

// Duplicates tells where the files lie that are there more than once, pairs of Python's bytecode and source counted as
// content.Python stores them: the largest prefixes, each without what others of them name, most bytes first, and the
// sum of all. copies tells for each draft how many directories have its files.
func Duplicates(drafts []layer.Draft, copies []int) (top []Prefix, all Prefix, err error) {
	root := &folder{}
	seen := map[content.ObjectID]bool{}
	for i, d := range drafts {
		entries, err := d.Python.Entries()
		if err != nil {
			return nil, all, err
		}
		for _, e := range entries {
			if e.Kind != content.Regular || e.Size == 0 {
				continue
			}
			more := int64(copies[i])
			if id := identity(e); !seen[id] {
				seen[id] = true
				more--
			}
			if more > 0 {
				root.add(e.Path, more, more*content.Blocks(e.Size))
			}
		}
	}
	all = Prefix{Bytes: root.bytes, Files: root.files}
	return largest(root.report("", max(root.bytes/50, 1)), rows), all, nil
}

// largest sorts prefixes by their bytes and returns the first few.
func largest(list []Prefix, n int) []Prefix {
	slices.SortStableFunc(list, func(a, b Prefix) int { return cmp.Compare(b.Bytes, a.Bytes) })
	return list[:min(n, len(list))]
}
