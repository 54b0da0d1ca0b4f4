package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Recipes lie in recipes/<sha256 of the blob>-<layer id>. They are no part of a layer: without one its blob comes from
// a registry. So one that is damaged or of no use is removed, and its loss harms nothing. A layer's recipes go with it;
// what a crash leaves behind is removed at Open.

const (
	dirRecipes    = "recipes"
	recipesPrefix = "recipe-"
	// recipeEntry is what an entry of a layer takes in memory while a recipe is made or followed, beside its encoding.
	recipeEntry = 256
)

// ErrNoRecipe is wrapped where no recipe of a blob is kept, or its layer cannot serve.
var ErrNoRecipe = errors.New("no recipe is kept for this blob")

type (
	// keptRecipe is a recipe on the disk.
	keptRecipe struct {
		blob  content.Sum
		layer content.LayerID
		file  int64 // what it occupies
	}
	// recipes makes blobs again.
	recipes struct {
		*health
		budget *budget

		making   sync.Mutex // one at a time: it takes a processor
		countsMu sync.Mutex // guards what follows
		counts   RecipeStats
	}
)

// RecipeStats are what recipes have come to since Open.
type RecipeStats struct {
	// Made were kept. NoEncoder and TooLarge are blobs that cannot be made again, Failed those of which it is not known.
	Made, NoEncoder, TooLarge, Failed int64
	// Followed are blobs that were made, FollowedBytes what they have; Useless are tries that failed.
	Followed, FollowedBytes, Useless int64
}

// BlobInfo is a blob that can be made.
type BlobInfo struct {
	Digest  digest.Digest
	Size    int64
	Layer   content.LayerID
	Created time.Time // of the recipe
}

func recipeName(blob content.Sum, id content.LayerID) string { return blob.Hex() + "-" + id.Hex() }

func parseRecipeName(name string) (r keptRecipe, ok bool) {
	blob, id, _ := strings.Cut(name, "-")
	sum, err := content.ParseSum(blob)
	of, ierr := content.ParseSum(id)
	r = keptRecipe{blob: sum, layer: content.LayerID{Sum: of}}
	return r, err == nil && ierr == nil && recipeName(r.blob, r.layer) == name
}

func (r *recipes) recipePath(blob content.Sum, id content.LayerID) string {
	return r.path(dirRecipes, recipeName(blob, id))
}

// open reads which recipes there are, and removes those without a layer.
func (r *recipes) open() error {
	files, err := os.ReadDir(r.path(dirRecipes))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list recipes: %w", err)
	}
	for _, f := range files {
		k, ok := parseRecipeName(f.Name())
		fi, err := f.Info()
		if ok && err == nil && fi.Mode().IsRegular() && r.layers[k.layer] != nil {
			k.file = content.Blocks(fi.Size())
			r.catalog.recipes.insert(k)
			continue
		}
		if !r.opts.readOnly {
			if err := os.RemoveAll(r.path(dirRecipes, f.Name())); err != nil {
				return fmt.Errorf("remove a recipe without its layer: %w", err)
			}
		}
	}
	return nil
}

// recipeIndex is which recipes are on the disk. The mu of the catalog guards it.
type recipeIndex struct {
	byBlob map[content.Sum][]keptRecipe
	used   Usage // what they occupy
}

func (x *recipeIndex) insert(k keptRecipe) {
	x.drop(k.blob, k.layer)
	x.byBlob[k.blob] = append(x.byBlob[k.blob], k)
	x.used.Bytes, x.used.Inodes = x.used.Bytes+k.file, x.used.Inodes+1
}

func (x *recipeIndex) drop(blob content.Sum, id content.LayerID) {
	for i, k := range x.byBlob[blob] {
		if k.layer == id {
			x.used.Bytes, x.used.Inodes = x.used.Bytes-k.file, x.used.Inodes-1
			x.byBlob[blob] = slices.Delete(slices.Clone(x.byBlob[blob]), i, i+1)
			break
		}
	}
	if len(x.byBlob[blob]) == 0 {
		delete(x.byBlob, blob)
	}
}

// of returns the recipes of a layer.
func (x *recipeIndex) of(id content.LayerID) (list []keptRecipe) {
	for _, all := range x.byBlob {
		for _, k := range all {
			if k.layer == id {
				list = append(list, k)
			}
		}
	}
	return list
}

// removeRecipes removes those of a layer that goes. Under mu. One that stays is removed by the next Open.
func (h *health) removeRecipes(id content.LayerID) {
	for _, k := range h.recipes.of(id) {
		if err := os.Remove(h.path(dirRecipes, recipeName(k.blob, id))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.L.WithError(err).Warn("a recipe stays until the next start")
		}
		h.recipes.drop(k.blob, id)
		h.step("recipe.removed")
	}
}

// RecipeUsage is what all recipes occupy; its inodes are how many there are.
func (r *recipes) RecipeUsage() Usage {
	c := r.catalog
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.recipes.used
}

// RecipeStats returns the counts at this moment.
func (r *recipes) RecipeStats() RecipeStats {
	r.countsMu.Lock()
	defer r.countsMu.Unlock()
	return r.counts
}

func (r *recipes) count(change func(*RecipeStats)) {
	r.countsMu.Lock()
	defer r.countsMu.Unlock()
	change(&r.counts)
}

// HasRecipe reports whether the store may make a blob: a recipe is kept, and its layer is in service.
func (r *recipes) HasRecipe(blob digest.Digest) bool {
	_, ok := r.recipeOf(blob, false)
	return ok
}

// recipeOf finds a recipe whose layer is in service, and with hold takes a hold of that.
func (c *catalog) recipeOf(blob digest.Digest, hold bool) (keptRecipe, bool) {
	sum, err := content.ParseSum(blob.String())
	if err != nil {
		return keptRecipe{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.recipes.byBlob[sum] {
		if st := c.layers[k.layer]; st != nil && st.damage == nil && st.holds > 0 {
			if hold {
				st.hold()
			}
			return k, true
		}
	}
	return keptRecipe{}, false
}

// tarOf finds the layer of a diffID, holds it, and tells how long the tar is.
func (c *catalog) tarOf(d content.DiffID) (id content.LayerID, size int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok = c.diffs[diffKey{c.fidelity, d}]
	st := c.layers[id]
	if !ok || st == nil {
		return id, 0, false
	}
	at := slices.IndexFunc(st.facts.Tars, func(t tree.Tar) bool { return t.DiffID == d })
	if at < 0 {
		return id, 0, false
	}
	st.hold()
	return id, st.facts.Tars[at].Size, true
}

// MakeRecipe keeps what it takes to make a blob of the layer d again. It makes the blob once, and keeps nothing when
// that is another one. b.Open is called several times. The error wraps recipe.ErrNoEncoder or recipe.ErrTooLarge for
// a blob that cannot be made again.
func MakeRecipe(ctx context.Context, s *Store, d content.DiffID, b Blob) error {
	sum, err := content.ParseSum(b.Digest.String())
	if err != nil {
		return fmt.Errorf("recipe of blob %s: %w: not a sha256", b.Digest, recipe.ErrNoEncoder)
	}
	id, size, ok := s.tarOf(d)
	if !ok {
		return fmt.Errorf("recipe of blob %s: no layer has diffID %s", b.Digest, d.Digest())
	}
	defer s.Release(id)
	s.recipes.making.Lock()
	defer s.recipes.making.Unlock()
	if s.HasRecipe(b.Digest) {
		return nil
	}
	of := recipe.Blob{Sum: sum, Size: b.Size, TarSize: size, Open: func() (io.ReadCloser, error) {
		r, err := b.Open(ctx)
		// Not as a file: a child process would read it, and look like a client that does.
		return struct{ io.ReadCloser }{r}, err
	}}
	err = atLowPriority(func() error { return s.recipes.make(ctx, id, of) })
	s.recipes.count(func(st *RecipeStats) {
		switch {
		case err == nil:
			st.Made++
		case errors.Is(err, recipe.ErrNoEncoder):
			st.NoEncoder++
		case errors.Is(err, recipe.ErrTooLarge):
			st.TooLarge++
		case ctx.Err() == nil:
			st.Failed++
		}
	})
	if err != nil {
		return fmt.Errorf("recipe of blob %s: %w", b.Digest, s.explain(err))
	}
	return nil
}

func (r *recipes) make(ctx context.Context, id content.LayerID, b recipe.Blob) error {
	if err := r.checkRoom(ctx, 0); err != nil {
		return err
	}
	mem, err := r.budget.share(ctx, false)
	if err != nil {
		return err
	}
	defer mem.end()
	l, err := r.read(ctx, id, mem)
	if err != nil {
		return err
	}
	var size int64
	tmp, err := r.stageFile(recipesPrefix, true, func(f *os.File) error {
		if _, err := recipe.Make(ctx, f, b, l, mem.keep); err != nil {
			return err
		}
		if size, err = f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		rec, err := recipe.Read(f)
		if err != nil {
			return err
		}
		defer rec.Close()
		if err := rec.Build(ctx, io.Discard, l); err != nil {
			if errors.Is(err, recipe.ErrOtherBytes) { // what it began with was the same
				err = fmt.Errorf("%w: %w", recipe.ErrNoEncoder, err)
			}
			return err
		}
		fi, err := f.Stat()
		if err == nil {
			size = fi.Size()
		}
		return err
	})
	if err != nil {
		return err
	}
	r.step("recipe.staged")
	return r.install(tmp, keptRecipe{b.Sum, id, content.Blocks(size)})
}

// install moves a staged recipe to its place.
func (r *recipes) install(tmp string, k keptRecipe) error {
	err := os.Mkdir(r.path(dirRecipes), 0o700)
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err == nil {
		r.catalog.mu.Lock() // or the layer could go in between
		err = os.Rename(tmp, r.recipePath(k.blob, k.layer))
		if err == nil {
			r.catalog.recipes.insert(k)
		}
		r.catalog.mu.Unlock()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("keep a recipe: %w", err), os.Remove(tmp))
	}
	r.step("recipe.renamed")
	return errors.Join(syncDir(r.path(dirRecipes)), syncDir(r.root))
}

// read reads a layer for a recipe.
func (r *recipes) read(ctx context.Context, id content.LayerID, mem *share) (l recipe.Layer, err error) {
	if err := r.InService(id); err != nil {
		return l, err
	}
	f, err := r.Facts(id)
	if err != nil {
		return l, err
	}
	encoded, err := tree.Length(r.treePath(id), id)
	if err == nil {
		err = mem.keep(f.Entries*recipeEntry + encoded)
	}
	var entries []*content.Entry
	if err == nil {
		_, entries, err = tree.Read(r.treePath(id), id)
	}
	if isDamage(err) {
		r.harm(ctx, id, Damage{Tree: err})
	}
	if err != nil {
		return l, fmt.Errorf("read layer %s: %w", id, err)
	}
	return recipe.Layer{ID: id, Entries: entries, ReadAt: r.objects.ReadAt}, nil
}

// Recipe returns what is known of a blob that can be made; the error wraps ErrNoRecipe.
func (r *recipes) Recipe(blob digest.Digest) (BlobInfo, error) {
	k, ok := r.recipeOf(blob, false)
	if !ok {
		return BlobInfo{}, fmt.Errorf("blob %s: %w", blob, ErrNoRecipe)
	}
	f, rec, err := r.begin(k)
	if err != nil {
		return BlobInfo{}, err
	}
	defer f.Close()
	defer rec.Close()
	fi, err := f.Stat()
	if err != nil {
		return BlobInfo{}, err
	}
	return BlobInfo{Digest: blob, Size: rec.Size, Layer: k.layer, Created: fi.ModTime()}, rec.Check()
}

// Recipes returns the blobs whose recipes are kept and whose layers are in service, sorted.
func (r *recipes) Recipes() (list []digest.Digest) {
	r.catalog.mu.RLock()
	for blob, all := range r.catalog.recipes.byBlob {
		for _, k := range all {
			if st := r.layers[k.layer]; st != nil && st.damage == nil {
				list = append(list, blob.Digest())
				break
			}
		}
	}
	r.catalog.mu.RUnlock()
	slices.Sort(list)
	return list
}

// begin opens a recipe. One that is damaged is removed.
func (r *recipes) begin(k keptRecipe) (*os.File, *recipe.Recipe, error) {
	f, err := os.Open(r.recipePath(k.blob, k.layer))
	if err != nil {
		return nil, nil, fmt.Errorf("open recipe of blob %s: %w", k.blob.Digest(), err)
	}
	rec, err := recipe.Read(f)
	if err == nil && (rec.Blob != k.blob || rec.Header.Layer != k.layer) {
		rec.Close()
		err = fmt.Errorf("%w: it is another blob's", recipe.ErrDamaged)
	}
	if err != nil {
		f.Close()
		r.discard(k, err)
		return nil, nil, fmt.Errorf("recipe of blob %s: %w", k.blob.Digest(), err)
	}
	return f, rec, nil
}

// discard removes a recipe that is damaged.
func (r *recipes) discard(k keptRecipe, why error) {
	if !errors.Is(why, recipe.ErrDamaged) || r.opts.readOnly {
		return
	}
	log.L.WithError(why).Warnf("removed a recipe: blob %s can come only from its registry", k.blob.Digest())
	r.catalog.mu.Lock()
	defer r.catalog.mu.Unlock()
	_ = os.Remove(r.recipePath(k.blob, k.layer))
	r.catalog.recipes.drop(k.blob, k.layer)
}

// orphanRecipes finds those without a layer, and removes them if asked to.
func (h *health) orphanRecipes(remove bool) (findings []Finding, err error) {
	files, err := os.ReadDir(h.path(dirRecipes))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for orphans: %w", err)
	}
	for _, f := range files {
		h.mu.Lock()
		k, ok := parseRecipeName(f.Name())
		known := ok && slices.ContainsFunc(h.recipes.byBlob[k.blob], func(o keptRecipe) bool { return o.layer == k.layer })
		fi, err := f.Info()
		if !known && remove {
			_ = os.RemoveAll(h.path(dirRecipes, f.Name()))
		}
		h.mu.Unlock()
		if !known && err == nil {
			findings = append(findings, Finding{Kind: Orphan, Path: h.path(dirRecipes, f.Name()),
				Problem: "the layer of this recipe is not here", Bytes: content.Blocks(fi.Size())})
		}
	}
	return findings, nil
}
