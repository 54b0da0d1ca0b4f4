package main

import (
	"context"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/inventory"
	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/forecast"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Analysis is what `analyze --json` prints. Sizes are in bytes, as the file system accounts them.
type Analysis struct {
	Sources []AnalysisSource `json:"sources"`
	Images  []AnalysisImage  `json:"images"`
	// Layers are those that overlayfs keeps, one for each parent; DiffIDs the different ones among them.
	Layers  int64 `json:"layers"`
	DiffIDs int64 `json:"diff_ids"`

	// What the images' files occupy now, and if each was stored once: by layer, by file, and with Python's
	// bytecode made equal. The last is what dedup stores by default.
	Now    AnalysisUsage `json:"now"`
	Layer  AnalysisUsage `json:"layer"`
	File   AnalysisStore `json:"file"`
	Python AnalysisStore `json:"python"`

	// Dense: packs are as a kernel has them that mounts blocks of 512 bytes. Assumed says why that could not be tried
	// here; "" where it was.
	Dense   bool   `json:"dense"`
	Assumed string `json:"assumed,omitempty"`

	// InUse is the part of Now on which containers lie: it stays until they are made anew.
	InUse      AnalysisUsage `json:"in_use"`
	Containers int64         `json:"containers"`
	Writable   AnalysisUsage `json:"writable"` // what the containers have written: it stays where it is

	// Blobs are the compressed blobs of the layers, which containerd keeps beside the files, whichever snapshotter it
	// uses; blobs = "drop" has dedup's removed once they are stored.
	Blobs AnalysisUsage `json:"blobs"`

	// Lowerdirs is how many directories an overlay mount of an image stacks; with dedup it is always two.
	DeepestLowerdirs int64 `json:"deepest_lowerdirs"`
	DeepImages       int64 `json:"deep_images"` // those with more than 100

	Duplicates    []AnalysisPrefix `json:"duplicates"`
	AllDuplicates AnalysisPrefix   `json:"all_duplicates"`
	LeftOut       []AnalysisError  `json:"left_out"`
}

// AnalysisSource is a place that was looked at.
type AnalysisSource struct {
	Kind   string `json:"kind"`
	Images int64  `json:"images"`
	Layers int64  `json:"layers"`
}

// AnalysisImage is one image.
type AnalysisImage struct {
	Names  []string `json:"names"` // none for layers without an image
	Layers int64    `json:"layers"`
	// Bytes and Inodes are what its layers occupy now, those that it shares too.
	AnalysisUsage
}

// AnalysisUsage is disk space.
type AnalysisUsage struct {
	Bytes  int64 `json:"bytes"`
	Inodes int64 `json:"inodes"`
}

// AnalysisStore is what a store would occupy.
type AnalysisStore struct {
	AnalysisUsage
	Packs       AnalysisUsage `json:"packs"`
	Trees       AnalysisUsage `json:"trees"`
	ChainImages AnalysisUsage `json:"chain_images"`
	Directories AnalysisUsage `json:"directories"`
}

// AnalysisPrefix is a directory whose files are there more than once, without what other prefixes name.
type AnalysisPrefix struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"` // of all copies but one
	Files int64  `json:"files"`
	Rest  bool   `json:"rest,omitempty"` // parts of it are listed by themselves, and not counted here
	// Parts are the largest directories in one that holds packages.
	Parts []AnalysisPrefix `json:"parts,omitempty"`
}

func prefix(p forecast.Prefix) AnalysisPrefix {
	out := AnalysisPrefix{Path: p.Path, Bytes: p.Bytes, Files: p.Files, Rest: p.Rest}
	for _, part := range p.Parts {
		out.Parts = append(out.Parts, prefix(part))
	}
	return out
}

// AnalysisError is a layer that could not be read; the images that have it are not counted.
type AnalysisError struct {
	Images []string `json:"images"`
	Error  string   `json:"error"`
}

// deepStack is more lower directories than a mount's options have room for without tricks.
const deepStack = 100

// analysis computes an Analysis.
type analysis struct {
	layers []inventory.Layer
	images []inventory.Image
	// draftOf tells which draft is a layer's; layers with one diffID share it.
	draftOf []int
	drafts  []layer.Draft
	errs    []error // by draft

	total int64        // bytes to be read
	read  atomic.Int64 // so far
	done  atomic.Bool  // all was read
	out   Analysis
}

func usage(u layer.Usage) AnalysisUsage { return AnalysisUsage{u.Bytes, u.Inodes} }

func store(s forecast.Store) AnalysisStore {
	return AnalysisStore{usage(s.Total()), usage(s.Packs), usage(s.Trees), usage(s.ChainImages), usage(s.Directories)}
}

// newAnalysis joins inventories.
func newAnalysis(all []*inventory.Inventory) *analysis {
	a := &analysis{}
	byDiffID := map[content.DiffID]int{}
	n := 0
	var writable layer.Usage
	for _, inv := range all {
		a.out.Sources = append(a.out.Sources, AnalysisSource{inv.Kind, int64(len(inv.Images)), int64(len(inv.Layers))})
		a.out.Containers += int64(inv.Containers)
		writable = forecast.Add(writable, inv.Writable)
		for _, img := range inv.Images {
			layers := make([]int, len(img.Layers))
			for i, at := range img.Layers {
				layers[i] = at + len(a.layers)
			}
			a.images = append(a.images, inventory.Image{Names: img.Names, Layers: layers})
		}
		a.layers = append(a.layers, inv.Layers...)
	}
	a.out.Writable = usage(writable)
	blobs := map[digest.Digest]int64{}
	for _, inv := range all {
		maps.Copy(blobs, inv.Blobs)
	}
	for _, size := range blobs {
		a.out.Blobs.Bytes += content.Blocks(size)
		a.out.Blobs.Inodes++
	}
	for _, l := range a.layers {
		at, known := byDiffID[l.DiffID]
		if !known || l.DiffID.IsZero() {
			at, n = n, n+1
			a.total += l.Size
			byDiffID[l.DiffID] = at
		}
		a.draftOf = append(a.draftOf, at)
	}
	a.drafts, a.errs = make([]layer.Draft, n), make([]error, n)
	return a
}

// readAll drafts every different layer. What cannot be read is noted; an error is returned only when ctx ends.
func (a *analysis) readAll(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(min(8, max(2, runtime.GOMAXPROCS(0)))) // a registry has other clients too
	started := make([]bool, len(a.drafts))
	for i, l := range a.layers {
		at := a.draftOf[i]
		if started[at] {
			continue
		}
		started[at] = true
		g.Go(func() error {
			if ctx.Err() == nil {
				a.drafts[at], a.errs[at] = l.Draft(ctx, func(n int64) { a.read.Add(n) })
			}
			return context.Cause(ctx)
		})
	}
	defer a.done.Store(true)
	return g.Wait()
}

// leaveOut takes images away whose layers could not be read, and the layers that nobody else has.
func (a *analysis) leaveOut() {
	keep := make([]bool, len(a.layers))
	var images []inventory.Image
	for _, img := range a.images {
		bad := slices.IndexFunc(img.Layers, func(i int) bool { return a.errs[a.draftOf[i]] != nil })
		if bad >= 0 {
			err := a.errs[a.draftOf[img.Layers[bad]]]
			a.out.LeftOut = append(a.out.LeftOut, AnalysisError{append([]string{}, img.Names...), err.Error()})
			continue
		}
		images = append(images, img)
		for _, i := range img.Layers {
			keep[i] = true
		}
	}
	place, layers, draftOf := make([]int, len(a.layers)), []inventory.Layer(nil), []int(nil)
	for i, l := range a.layers {
		if keep[i] {
			place[i] = len(layers)
			layers, draftOf = append(layers, l), append(draftOf, a.draftOf[i])
		}
	}
	for _, img := range images {
		for k, i := range img.Layers {
			img.Layers[k] = place[i]
		}
	}
	a.images, a.layers, a.draftOf = images, layers, draftOf
}

// compute fills the result from the drafts.
func (a *analysis) compute(ctx context.Context, verity bool) error {
	a.leaveOut()
	if err := a.now(); err != nil {
		return err
	}
	a.countImages()
	copies := make([]int, len(a.drafts))
	for _, at := range a.draftOf {
		copies[at]++
	}
	var drafts []layer.Draft
	var times []int
	place := make([]int, len(a.drafts))
	for at, n := range copies {
		if n > 0 {
			place[at] = len(drafts)
			drafts, times = append(drafts, a.drafts[at]), append(times, n)
		}
	}
	var chains []forecast.Chain
	for _, img := range a.images {
		var c forecast.Chain
		for _, i := range img.Layers {
			c = append(c, place[a.draftOf[i]])
		}
		chains = append(chains, c)
	}
	for f, into := range map[content.Fidelity]*AnalysisStore{content.Exact: &a.out.File, content.Python: &a.out.Python} {
		s, err := forecast.Of(ctx, forecast.Options{Fidelity: f, Verity: verity, Dense: a.out.Dense}, drafts, chains)
		if err != nil {
			return err
		}
		*into = store(s)
	}
	top, all, err := forecast.Duplicates(drafts, times)
	a.out.AllDuplicates = prefix(all)
	a.out.Duplicates = []AnalysisPrefix{}
	for _, p := range top {
		a.out.Duplicates = append(a.out.Duplicates, prefix(p))
	}
	return err
}

// tryKernel finds out what packs this kernel mounts. Where it cannot be tried, they are those of most kernels.
func (a *analysis) tryKernel() {
	dense, err := lower.MountsDense(os.TempDir())
	if err != nil {
		dense, a.out.Assumed = true, err.Error()
	}
	a.out.Dense = dense
}

// now counts what the layers occupy, all of them and each different one once.
func (a *analysis) now() error {
	var now, once, inUse layer.Usage
	seen := map[content.LayerID]bool{}
	for i := range a.layers {
		l, d := &a.layers[i], a.drafts[a.draftOf[i]]
		if !l.Stored {
			var err error
			if l.Now, err = forecast.Directories(d); err != nil {
				return err
			}
		}
		now = forecast.Add(now, l.Now)
		if !seen[d.Exact.ID] {
			seen[d.Exact.ID] = true
			once = forecast.Add(once, l.Now)
		}
		if l.InUse {
			inUse = forecast.Add(inUse, l.Now)
		}
	}
	a.out.Layers, a.out.DiffIDs = int64(len(a.layers)), int64(len(seen))
	a.out.Now, a.out.Layer, a.out.InUse = usage(now), usage(once), usage(inUse)
	return nil
}

func (a *analysis) countImages() {
	a.out.Images = []AnalysisImage{}
	for _, img := range a.images {
		var sum layer.Usage
		for _, i := range img.Layers {
			sum = forecast.Add(sum, a.layers[i].Now)
		}
		depth := int64(len(img.Layers))
		a.out.Images = append(a.out.Images, AnalysisImage{append([]string{}, img.Names...), depth, usage(sum)})
		a.out.DeepestLowerdirs = max(a.out.DeepestLowerdirs, depth)
		if depth > deepStack {
			a.out.DeepImages++
		}
	}
	if a.out.LeftOut == nil {
		a.out.LeftOut = []AnalysisError{}
	}
}

func analyze(ctx context.Context, sources []string, opts inventory.Options, verity bool,
	started func(*analysis)) (Analysis, error) {
	all, err := inventory.Read(ctx, sources, opts)
	if err != nil {
		return Analysis{}, err
	}
	a := newAnalysis(all)
	a.tryKernel()
	started(a)
	if err := a.readAll(ctx); err != nil {
		return Analysis{}, err
	}
	return a.out, a.compute(ctx, verity)
}
