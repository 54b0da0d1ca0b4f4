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
func (s *Store) Check(ctx context.Context, progress func(done, total int64)) ([]Finding, error) {
	var findings []Finding
	objectBytes, _ := s.objects.Packs().Used()
	s.mu.RLock()
	total := objectBytes + s.trees.Bytes
	s.mu.RUnlock()
	var mu sync.Mutex
	var done int64
	read := func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		done += n
		progress(min(done, total), total)
	}
	if err := s.checkTrees(ctx, read); err != nil {
		return nil, err
	}
	packs, err := s.objects.Packs().Check(ctx)
	if err != nil {
		return nil, fmt.Errorf("verify packs: %w", s.explain(err))
	}
	if err := s.verifyObjects(ctx, s.objects.IDs(), read); err != nil {
		return nil, fmt.Errorf("verify objects: %w", s.explain(err))
	}
	if len(packs) > 0 {
		s.wakeKeeper() // to copy what is whole in them
	}
	for _, p := range packs {
		findings = append(findings, Finding{Kind: DamagedPack, Path: p.Path, Problem: p.Err.Error()})
	}
	s.blame(ctx)
	if err := s.heal(ctx, s.Sync); err != nil {
		log.G(ctx).WithError(err).Warn("layers that are whole again stay out of service")
	}
	s.saveDamaged(ctx)
	findings = append(findings, s.Findings()...)
	orphans, err := s.orphans(ctx, false)
	return append(findings, orphans...), err
}

// checkTrees verifies all trees.
func (s *Store) checkTrees(ctx context.Context, read func(int64)) error {
	for _, l := range s.List() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		objects, err := s.verifyTree(l.ID)
		switch {
		case err == nil:
			s.restore(l.ID, objects)
		case isDamage(err):
			s.harm(ctx, l.ID, Damage{Tree: err})
		default:
			return fmt.Errorf("verify layer %s: %w", l.ID, s.explain(err))
		}
		if fi, err := os.Stat(s.treePath(l.ID)); err == nil {
			read(content.Blocks(fi.Size()))
		}
	}
	return nil
}

// LookAgain verifies once more what is known to be damaged of a layer, and heals it if it is not any more: a disk may
// not have answered for a while.
func (s *Store) LookAgain(ctx context.Context, id content.LayerID) error {
	d, damaged := s.Damaged()[id]
	if !damaged {
		return nil
	}
	if d.Tree != nil {
		if objects, err := s.verifyTree(id); err == nil {
			s.restore(id, objects)
		}
	}
	if err := s.verifyObjects(ctx, d.Objects, func(int64) {}); err != nil {
		return fmt.Errorf("verify layer %s: %w", id, s.explain(err))
	}
	return s.heal(ctx, s.Sync)
}

// restore notes that a tree that was damaged is whole again, for instance from a backup. heal does the rest.
func (s *Store) restore(id content.LayerID, objects []content.ObjectID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.layers[id]
	if st == nil || st.damage == nil || st.damage.Tree == nil {
		return
	}
	facts, _, err := tree.ReadFacts(s.treePath(id), id)
	fi, serr := os.Stat(s.treePath(id))
	if err != nil || serr != nil {
		return
	}
	again := *st
	s.forget(id, st)
	if !again.counted {
		s.objects.Load(objects)
	}
	again.counted, again.facts = true, facts
	again.damage = &Damage{Objects: again.damage.Objects}
	s.insert(id, &again, fi.Size())
}

// verifyObjects compares objects with their names, several at a time.
func (s *Store) verifyObjects(ctx context.Context, ids []content.ObjectID, read func(int64)) error {
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
				n, err := s.objects.Verify(ctx, ids[i], buf)
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
func (s *Store) Findings() (findings []Finding) {
	byObject := map[content.ObjectID][]content.LayerID{}
	for id, d := range s.Damaged() {
		if d.Tree != nil {
			findings = append(findings, Finding{Kind: DamagedTree, Path: s.treePath(id), Problem: d.Tree.Error(),
				Layers: []content.LayerID{id}})
		}
		for _, o := range d.Objects {
			byObject[o] = append(byObject[o], id)
		}
	}
	for o, layers := range byObject {
		path, problem := s.objects.Where(o)
		slices.SortFunc(layers, func(a, b content.LayerID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) })
		findings = append(findings, Finding{Kind: DamagedObject, Path: path, Problem: problem, Layers: layers})
	}
	slices.SortFunc(findings, func(a, b Finding) int { return strings.Compare(a.Path, b.Path) })
	return findings
}

// orphans looks for files that nothing names, and removes them if asked to.
func (s *Store) orphans(ctx context.Context, remove bool) (findings []Finding, err error) {
	files, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		return nil, fmt.Errorf("look for orphans: %w", err)
	}
	for _, f := range files {
		sum, err := content.ParseSum(f.Name())
		s.mu.Lock()
		known := err == nil && s.layers[content.LayerID{Sum: sum}] != nil
		fi, err := f.Info()
		if !known && remove {
			_ = os.RemoveAll(s.path(dirLayers, f.Name()))
		}
		s.mu.Unlock()
		if !known && err == nil {
			findings = append(findings, Finding{Kind: Orphan, Path: s.path(dirLayers, f.Name()),
				Problem: "no snapshot uses this layer", Bytes: content.Blocks(fi.Size())})
		}
	}
	if s.uncounted() {
		return findings, nil // an object that a damaged tree names looks like an orphan
	}
	objects, err := s.objects.Orphans(ctx, remove)
	for _, o := range objects {
		findings = append(findings, Finding{Kind: Orphan, Path: o.Path, Problem: "no layer needs what is in this file",
			Bytes: o.Bytes})
	}
	return findings, err
}

// RemoveOrphans removes every file that nothing names, and tells what it removed. Others may use the store meanwhile.
func (s *Store) RemoveOrphans(ctx context.Context) ([]Finding, error) {
	found, err := s.orphans(ctx, true)
	if err == nil && !s.uncounted() {
		s.leaked.Store(false)
	}
	return found, err
}

// Orphans lists every file that nothing names.
func (s *Store) Orphans(ctx context.Context) ([]Finding, error) { return s.orphans(ctx, false) }

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
