package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Finding is one thing in the store that is not as it should be.
type Finding struct {
	Kind FindingKind
	// Path of the file.
	Path string
	// Problem in words.
	Problem string
	// Layers that are out of service because of it.
	Layers []content.LayerID
	// Bytes that it occupies, for what nothing uses.
	Bytes int64
}

// FindingKind says what is damaged, or of no use.
type FindingKind string

const (
	DamagedObject FindingKind = "object"
	DamagedTree   FindingKind = "tree"
	// DamagedPack: what the file says of itself is damaged. Payloads in it may be whole, and are copied out of it.
	DamagedPack FindingKind = "pack"
	Orphan      FindingKind = "orphan"
)

// Check compares every tree and every object with its name, reading them from the disk, and looks for files that
// nothing names. What is damaged is out of service from then on, and what was and is whole again, back in it. Others
// may use the store meanwhile. progress hears, from one goroutine at a time, how many of how many bytes have been read.
func (h *health) Check(ctx context.Context, progress func(done, total int64)) ([]Finding, error) {
	var findings []Finding
	objectBytes, _ := h.objects.Packs().Used()
	h.mu.RLock()
	total := objectBytes + h.trees.Bytes
	h.mu.RUnlock()
	var mu sync.Mutex
	var done int64
	read := func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		done += n
		progress(min(done, total), total)
	}
	if err := h.checkTrees(ctx, read); err != nil {
		return nil, err
	}
	packs, err := h.objects.Packs().Check(ctx)
	if err != nil {
		return nil, fmt.Errorf("verify packs: %w", h.explain(err))
	}
	if err := h.verifyObjects(ctx, h.objects.IDs(), read); err != nil {
		return nil, fmt.Errorf("verify objects: %w", h.explain(err))
	}
	if len(packs) > 0 {
		h.wakeKeeper() // to copy what is whole in them
	}
	for _, p := range packs {
		findings = append(findings, Finding{Kind: DamagedPack, Path: p.Path, Problem: p.Err.Error()})
	}
	h.blame(ctx)
	if err := h.heal(ctx, h.Sync); err != nil {
		log.G(ctx).WithError(err).Warn("layers that are whole again stay out of service")
	}
	h.saveDamaged(ctx)
	findings = append(findings, h.Findings()...)
	orphans, err := h.orphans(ctx, false)
	return append(findings, orphans...), err
}

// checkTrees verifies all trees.
func (h *health) checkTrees(ctx context.Context, read func(int64)) error {
	for _, l := range h.List() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		objects, err := h.verifyTree(l.ID)
		switch {
		case err == nil:
			h.restore(l.ID, objects)
		case isDamage(err):
			h.harm(ctx, l.ID, Damage{Tree: err})
		default:
			return fmt.Errorf("verify layer %s: %w", l.ID, h.explain(err))
		}
		if fi, err := os.Stat(h.treePath(l.ID)); err == nil {
			read(content.Blocks(fi.Size()))
		}
	}
	return nil
}

// LookAgain verifies once more what is known to be damaged of a layer, and heals it if it is not any more: a disk may
// not have answered for a while.
func (h *health) LookAgain(ctx context.Context, id content.LayerID) error {
	d, damaged := h.Damaged()[id]
	if !damaged {
		return nil
	}
	if d.Tree != nil {
		if objects, err := h.verifyTree(id); err == nil {
			h.restore(id, objects)
		}
	}
	if err := h.verifyObjects(ctx, d.Objects, func(int64) {}); err != nil {
		return fmt.Errorf("verify layer %s: %w", id, h.explain(err))
	}
	return h.heal(ctx, h.Sync)
}

// restore notes that a tree that was damaged is whole again, for instance from a backup. heal does the rest.
func (h *health) restore(id content.LayerID, objects []content.ObjectID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.layers[id]
	if st == nil || st.damage == nil || st.damage.Tree == nil {
		return
	}
	facts, _, err := tree.ReadFacts(h.treePath(id), id)
	fi, serr := os.Stat(h.treePath(id))
	if err != nil || serr != nil {
		return
	}
	again := *st
	h.forget(id, st)
	if !again.counted {
		h.objects.Load(objects)
	}
	again.counted, again.facts = true, facts
	again.damage = &Damage{Objects: again.damage.Objects}
	h.insert(id, &again, fi.Size())
}

// verifyObjects compares objects with their names, several at a time.
func (p *packed) verifyObjects(ctx context.Context, ids []content.ObjectID, read func(int64)) error {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	// Reading past the page cache waits for the disk, so more than one for each processor.
	for range min(len(ids), 2*runtime.GOMAXPROCS(0)) {
		g.Go(func() error {
			buf := object.NewVerifyBuffer()
			for {
				i := next.Add(1) - 1
				if i >= int64(len(ids)) {
					return nil
				}
				n, err := p.objects.Verify(ctx, ids[i], buf)
				if err != nil && !errors.Is(err, object.ErrDamaged) {
					return err
				}
				read(content.Blocks(n))
			}
		})
	}
	return g.Wait()
}

// Findings tells what is known to be damaged, sorted by path.
func (h *health) Findings() (findings []Finding) {
	byObject := map[content.ObjectID][]content.LayerID{}
	for id, d := range h.Damaged() {
		if d.Tree != nil {
			findings = append(findings, Finding{Kind: DamagedTree, Path: h.treePath(id), Problem: d.Tree.Error(),
				Layers: []content.LayerID{id}})
		}
		for _, o := range d.Objects {
			byObject[o] = append(byObject[o], id)
		}
	}
	for o, layers := range byObject {
		path, problem := h.objects.Where(o)
		slices.SortFunc(layers, func(a, b content.LayerID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) })
		findings = append(findings, Finding{Kind: DamagedObject, Path: path, Problem: problem, Layers: layers})
	}
	slices.SortFunc(findings, func(a, b Finding) int { return strings.Compare(a.Path, b.Path) })
	return findings
}

// orphans looks for files that nothing names, and removes them if asked to.
func (h *health) orphans(ctx context.Context, remove bool) (findings []Finding, err error) {
	files, err := os.ReadDir(h.path(dirLayers))
	if err != nil {
		return nil, fmt.Errorf("look for orphans: %w", err)
	}
	for _, f := range files {
		sum, err := content.ParseSum(f.Name())
		h.mu.Lock()
		known := err == nil && h.layers[content.LayerID{Sum: sum}] != nil
		fi, err := f.Info()
		if !known && remove {
			_ = os.RemoveAll(h.path(dirLayers, f.Name()))
		}
		h.mu.Unlock()
		if !known && err == nil {
			findings = append(findings, Finding{Kind: Orphan, Path: h.path(dirLayers, f.Name()),
				Problem: "no snapshot uses this layer", Bytes: content.Blocks(fi.Size())})
		}
	}
	recipes, err := h.orphanRecipes(remove)
	if err != nil {
		return findings, err
	}
	findings = append(findings, recipes...)
	if h.uncounted() {
		return findings, nil // an object that a damaged tree names looks like an orphan
	}
	objects, err := h.objects.Orphans(ctx, remove)
	for _, o := range objects {
		findings = append(findings, Finding{Kind: Orphan, Path: o.Path, Problem: "no layer needs what is in this file",
			Bytes: o.Bytes})
	}
	return findings, err
}

// RemoveOrphans removes every file that nothing names, and tells what it removed. Others may use the store meanwhile.
func (h *health) RemoveOrphans(ctx context.Context) ([]Finding, error) {
	found, err := h.orphans(ctx, true)
	if err == nil && !h.uncounted() {
		h.leaked.Store(false)
	}
	return found, err
}

// Orphans lists every file that nothing names.
func (h *health) Orphans(ctx context.Context) ([]Finding, error) { return h.orphans(ctx, false) }

// Repair ingests the blob of a layer that is out of service once more: what the layer needs and is damaged is written
// anew. Of the layer's other facts it knows nothing, so a blob that gives another layer is an error, and changes
// nothing. b.Open may be called more than once.
func (s *Store) Repair(ctx context.Context, id content.LayerID, b Blob) error {
	s.mu.RLock()
	st := s.layers[id]
	fidelities := []content.Fidelity{s.fidelity, content.Python, content.Exact}
	if st != nil && st.facts.Fidelity != "" {
		fidelities = []content.Fidelity{st.facts.Fidelity}
	}
	s.mu.RUnlock()
	if st == nil {
		return nil // removed meanwhile
	}
	var err error
	for _, f := range fidelities {
		var in Ingested
		if in, err = s.ingestBlob(ctx, b, goal{fidelity: f, layer: id}); err == nil {
			s.Release(in.Layer)
			return s.InService(id)
		}
		if !errors.Is(err, errOtherLayer) {
			break
		}
	}
	return fmt.Errorf("repair layer %s from blob %s: %w", id, b.Digest, s.explain(err))
}
