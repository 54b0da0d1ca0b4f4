package powercut

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// checker looks at what cuts left, one after the other.
type checker struct {
	t    *testing.T
	fs   fileSystem
	dir  string
	refs *references

	durability layer.Durability
	// refused are snapshots that were out of service after the last cut.
	refused []string
	// trimmed is how often a snapshot was looked at whose blob may have gone.
	trimmed int
}

// try builds the image of the next cut and looks at the store in it. ok is false when there is none.
func (c *checker) try(w world, rp *replay) (cut cut, ok bool, err error) {
	image, err := os.CreateTemp(c.dir, "image-")
	if err != nil {
		return cut, false, err
	}
	defer func() { err = errors.Join(err, image.Close(), os.Remove(image.Name())) }()
	if cut, ok, err = rp.next(image); err != nil || !ok {
		return cut, ok, err
	}
	return cut, true, c.look(w.at(cut.at), w, image.Name())
}

// look mounts an image and looks at the store in it. s is what clients know of it.
func (c *checker) look(s state, w world, image string) (err error) {
	at, run := filepath.Join(c.dir, "at"), filepath.Join(c.dir, "run")
	for _, dir := range []string{at, run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	m := mount.Mount{Type: c.fs.name, Source: image, Options: append([]string{"loop"}, c.fs.mount...)}
	if err := m.Mount(at); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	defer func() {
		err = errors.Join(err, node.UnmountBelow(run), mount.UnmountAll(at, 0), os.RemoveAll(run))
	}()
	root := filepath.Join(at, "root")
	// The power is back, and with it the machine has another boot id.
	if running := filepath.Join(root, "running"); exists(running) {
		if err := os.WriteFile(running, []byte("another boot"), 0o600); err != nil {
			return err
		}
	}
	if err := c.open(w, s, root, run); err != nil {
		return err
	}
	if c.durability == layer.Deferred {
		// What a damaged tree named nobody knows, so that all objects stay until the start after it is gone.
		if len(c.refused) > 0 {
			return nil
		}
		if err := c.open(w, s, root, run); err != nil {
			return fmt.Errorf("the second time: %w", err)
		}
	}
	return atRest(root)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// open opens the store and compares it with what clients know.
func (c *checker) open(w world, s state, root, run string) (err error) {
	ctx := namespaces.WithNamespace(c.t.Context(), "check")
	sn, err := snapshotter.New(ctx, snapshotter.Options{Root: root, RunDir: run, Durability: c.durability})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	under := maps.Clone(s.doing)
	names, err := c.strays(ctx, sn, s)
	if err != nil {
		return err
	}
	if problems := s.settle(w, names); len(problems) > 0 {
		return errors.New(strings.Join(problems, "\n"))
	}
	c.refused = nil
	for i, name := range slices.Sorted(maps.Keys(s.have)) {
		// A look at all would be most of the time; trees and objects are verified at the end, all of them. Where
		// durability is deferred, any of them may be out of service, which ends the look at this cut.
		if c.durability == layer.Strict && s.since(name) > recent && (i+s.now)%4 > 0 {
			continue
		}
		err := c.compare(ctx, sn, s, name)
		if s.durable(name) {
			c.trimmed++
		} else if errors.Is(err, layer.ErrDamaged) {
			c.refused = append(c.refused, name)
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, sn2 := range under {
		if err := c.again(ctx, sn, sn2); err != nil {
			return fmt.Errorf("again, what was under way: %w", err)
		}
	}
	// What is at rest has no steps that wait for their ingest: a check waits for them.
	if _, err := sn.Check(ctx, snapshotter.CheckOptions{}); err != nil {
		return fmt.Errorf("check: %w", err)
	}
	return sn.Cleanup(ctx)
}

// recent is for how many operations of the disk a snapshot is looked at after every cut, later after every fourth.
const recent = 300

// strays returns the names of all snapshots, and removes what a client was about to fill: nobody heard of it.
func (c *checker) strays(ctx context.Context, sn *snapshotter.Snapshotter, s state) (names []string, err error) {
	err = sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	if err != nil {
		return nil, err
	}
	kept := names[:0]
	for _, name := range names {
		key := name[strings.LastIndexByte(name, '/')+1:]
		if strings.HasPrefix(key, "extract-") || strings.HasPrefix(key, "view-") || strings.HasSuffix(key, "built-active") {
			if err := sn.Remove(ctx, name); err != nil {
				return nil, err
			}
			continue
		}
		kept = append(kept, name)
	}
	return kept, nil
}

// compare mounts a snapshot.
func (c *checker) compare(ctx context.Context, sn *snapshotter.Snapshotter, s state, name string) error {
	var mounts []mount.Mount
	var err error
	if s.have[name].Active {
		mounts, err = sn.Mounts(ctx, name)
	} else {
		key := "check-" + name
		mounts, err = sn.View(ctx, key, name)
		defer func() { err = errors.Join(err, sn.Remove(ctx, key)) }()
	}
	if err != nil {
		return err
	}
	want, opts := c.refs.expected(s.chain(name))
	return shows(c.dir, mounts, want, opts)
}

func shows(dir string, mounts []mount.Mount, want rootfs.Tree, opts rootfs.DiffOptions) (err error) {
	at, err := os.MkdirTemp(dir, "view-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(at)) }()
	if err := mount.All(mounts, at); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(at, 0)) }()
	got, err := rootfs.Dump(at)
	if err != nil {
		return err
	}
	if lines := rootfs.Diff(want, got, opts); len(lines) > 0 {
		return fmt.Errorf("%d differences of %d entries:\n%s", len(lines), len(want),
			strings.Join(lines[:min(5, len(lines))], "\n"))
	}
	return nil
}

// again pulls a layer that was under way.
func (c *checker) again(ctx context.Context, sn *snapshotter.Snapshotter, s snapshot) error {
	if s.Active {
		return nil
	}
	blob, err := s.Recipe.tar()
	if err != nil {
		return err
	}
	mounts, err := sn.Prepare(ctx, "again/extract-1", "")
	if err != nil {
		return err
	}
	if err := ingest(ctx, sn, mounts, blob); err != nil {
		return err
	}
	if err := sn.Commit(ctx, "again", "again/extract-1"); err != nil {
		return err
	}
	s.Fidelity = content.Python
	want, opts := c.refs.expected([]snapshot{s})
	if mounts, err = sn.View(ctx, "again/view", "again"); err != nil {
		return err
	}
	return errors.Join(shows(c.dir, mounts, want, opts), sn.Remove(ctx, "again/view"), sn.Remove(ctx, "again"))
}

// atRest checks the files of a closed store against each other: snapshots name layers, layers name objects, all hash to
// their names, and there is nothing else.
func atRest(root string) error {
	layers, dirs, err := named(filepath.Join(root, "metadata.db"))
	if err != nil {
		return err
	}
	var objects []content.ObjectID
	for hex := range layers {
		path := filepath.Join(root, "layers", hex)
		sum, err := content.ParseSum(hex)
		if err != nil {
			return err
		}
		if _, _, err := tree.Read(path, content.LayerID{Sum: sum}); err != nil {
			return err
		}
		_, ids, err := tree.ReadFacts(path, content.LayerID{Sum: sum})
		if err != nil {
			return err
		}
		objects = append(objects, ids...)
	}
	return errors.Join(
		only(filepath.Join(root, "layers"), layers),
		only(filepath.Join(root, "snapshots"), dirs),
		only(filepath.Join(root, "ingest"), nil),
		packed(filepath.Join(root, "packs"), objects),
	)
}

// named reads what metadata.db names: layers, and the directories of active snapshots.
func named(path string) (layers, dirs map[string]bool, err error) {
	ms, err := storage.NewMetaStore(path)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, ms.Close()) }()
	layers, dirs = map[string]bool{}, map[string]bool{}
	err = ms.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return nil // no snapshot was ever made
		}
		for id, name := range ids {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return err
			}
			if hex := info.Labels["dedup-snapshotter.io/layer"]; hex != "" {
				layers[hex] = true
			} else if info.Kind == snapshots.KindCommitted {
				return fmt.Errorf("snapshot %s has no layer", name)
			}
			if info.Kind == snapshots.KindActive {
				dirs[id+"/fs"], dirs[id+"/work"] = true, true
			}
			for _, step := range strings.Fields(info.Labels["dedup-snapshotter.io/over"]) { // it lies over their directories
				dirs[step+"/fs"], dirs[step+"/work"] = true, true
			}
		}
		return nil
	})
	return layers, dirs, err
}

// only fails unless dir holds exactly the files (or, where they are no files, directories) that are named.
func only(dir string, names map[string]bool) error {
	missing := maps.Clone(names)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if names[rel] {
			delete(missing, rel)
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.IsDir() {
			return fmt.Errorf("nothing names %s", path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for name := range missing {
		err = errors.Join(err, fmt.Errorf("%s is missing in %s", name, dir))
	}
	return err
}

// packed fails unless packs have these objects where the next start looks for them, and no pack is without any.
func packed(dir string, objects []content.ObjectID) (err error) {
	packs, err := object.Open(dir, dir, object.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, packs.Close()) }()
	packs.Load(objects)
	if _, err := packs.Settle(true); err != nil {
		return err
	}
	named := map[content.ObjectID]bool{}
	for _, id := range objects {
		if _, err := packs.Read(id); err != nil {
			return err
		}
		named[id] = true
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		path := filepath.Join(dir, file.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		p, err := erofs.OpenPack(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if !slices.ContainsFunc(p.Slots, func(s erofs.Slot) bool { return named[s.ID] }) {
			return fmt.Errorf("nothing names %s", path)
		}
	}
	return nil
}
