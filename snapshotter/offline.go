package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// ErrServed is wrapped where a store is to be read that a daemon serves: that one has to be asked.
var ErrServed = errors.New("a daemon serves from it")

// Offline is a store that no daemon serves, to be looked at: nothing in it changes. It does not keep a daemon from
// starting; what was found then may be wrong, so each method returns ErrServed instead.
type Offline struct {
	s    *Snapshotter
	copy *os.File // of metadata.db, in memory
	// refused is why the daemon does not start with this metadata.db; "" when it does. What is in use is then unknown.
	refused string
	began   time.Time // mtime of the mark that a daemon sets at its start
}

// OpenOffline opens the store below dir. runDir is where the daemon has the mount points of chain images.
func OpenOffline(ctx context.Context, dir, runDir string) (_ *Offline, err error) {
	o := &Offline{s: assemble(Options{Root: dir, RunDir: runDir})}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Close())
		}
	}()
	version, err := os.ReadFile(o.s.path("format"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no store", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read format: %w", err)
	}
	if v := strings.TrimSpace(string(version)); v != layoutVersion {
		return nil, fmt.Errorf("%s has layout %q, and this build reads %q: a daemon that knows the layout upgrades it when "+
			"it starts", dir, v, layoutVersion)
	}
	o.began = o.mark()
	if err := o.unserved(); err != nil {
		return nil, err
	}
	stored, err := o.openMetadata(ctx)
	if err != nil {
		return nil, err
	}
	return o, o.openStores(ctx, stored)
}

// unserved returns an error that wraps ErrServed while a daemon serves the store, or has since OpenOffline.
func (o *Offline) unserved() error {
	lock, err := os.Open(o.s.path("lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look whether a daemon serves: %w", err)
	}
	defer lock.Close()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) // until lock is closed
	if errors.Is(err, unix.EWOULDBLOCK) || err == nil && !o.mark().Equal(o.began) {
		return fmt.Errorf("%s: %w", o.s.dir, ErrServed)
	}
	return err
}

func (o *Offline) mark() (at time.Time) {
	if fi, err := os.Stat(o.s.path("running")); err == nil {
		at = fi.ModTime()
	}
	return at
}

// openMetadata reads a copy of metadata.db, so that not even a lock is set in the file.
func (o *Offline) openMetadata(ctx context.Context) (stored records, err error) {
	data, err := os.ReadFile(o.s.path("metadata.db"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		o.refused = "it is missing"
	case errors.Is(err, unix.EIO):
		o.refused = err.Error()
	case err != nil:
		return stored, fmt.Errorf("read metadata.db: %w", err)
	default:
		if _, err := checkBolt(data); err != nil {
			o.refused = err.Error()
		}
	}
	if o.refused != "" {
		return stored, nil
	}
	fd, err := unix.MemfdCreate("metadata.db", unix.MFD_CLOEXEC)
	if err != nil {
		return stored, fmt.Errorf("copy metadata.db: %w", err)
	}
	o.copy = os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	if _, err := o.copy.Write(data); err != nil {
		return stored, fmt.Errorf("copy metadata.db: %w", err)
	}
	o.s.db, err = openMetadata(ctx, o.copy.Name())
	if errors.Is(err, errOthers) {
		o.s.db, o.refused = nil, err.Error()
		return stored, nil
	}
	if err != nil {
		return stored, fmt.Errorf("read metadata.db: %w", err)
	}
	return o.s.db.records(ctx)
}

func (o *Offline) openStores(ctx context.Context, stored records) (err error) {
	var live []content.LayerID
	for _, sn := range stored.whole {
		live = append(live, heldBy(sn.Info)...)
	}
	unsure := o.refused != "" || !stored.complete()
	if unsure { // as the daemon keeps them, whatever may use them
		if live, err = o.allLayers(); err != nil {
			return err
		}
	}
	held, err := lower.PacksOf(o.s.path(dirChains))
	if err != nil {
		return err
	}
	s := o.s
	if s.layers, err = layer.Look(ctx, layer.Options{Root: s.dir, HeldPacks: held}, live); err != nil {
		return fmt.Errorf("open layers: %w", err)
	}
	var chains [][]content.LayerID
	nodes := stored.graph(func([]content.LayerID, lower.Flavour) lower.Name { return lower.Name{} }).nodes
	for _, n := range nodes {
		if chain, ok := n.layers(); ok {
			chains = append(chains, chain)
		}
	}
	s.chains = lower.Look(lower.Options{
		Images: s.path(dirChains), Mounts: filepath.Join(s.runDir, dirChains),
		PackMounts: filepath.Join(s.runDir, dirPackMounts), Layers: s.layers,
	}, chains)
	for _, n := range stored.graph(s.chains.Name).nodes {
		if n.kind != snapshots.KindCommitted {
			use(s.chains, n)
		}
	}
	return nil
}

// allLayers returns the layers whose trees are there.
func (o *Offline) allLayers() (ids []content.LayerID, err error) {
	trees, err := os.ReadDir(o.s.path("layers"))
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	for _, t := range trees {
		if sum, err := content.ParseSum(t.Name()); err == nil {
			ids = append(ids, content.LayerID{Sum: sum})
		}
	}
	return ids, nil
}

// Check verifies all that is stored. While metadata.db is refused it cannot tell what is in use, nor which layers a
// chain image is made of; packs and trees it verifies all the same.
func (o *Offline) Check(ctx context.Context, progress func(stage string, done, total int64)) ([]Finding, error) {
	var found []Finding
	stored, err := o.s.layers.Check(ctx, func(done, total int64) { progress("layers", done, total) })
	if err != nil {
		return nil, err
	}
	if o.refused != "" {
		found = append(found, Finding{
			Finding: layer.Finding{Kind: DamagedMetadata, Path: o.s.path("metadata.db"), Problem: o.refused},
			Hint: "the daemon does not start with this metadata.db: put the file back from a backup, " +
				"or set another root and pull the images again",
		})
	}
	broken := o.s.layers.Damaged()
	for _, f := range stored {
		out := Finding{Finding: f, Hint: "it goes when the daemon starts"}
		if f.Kind != layer.Orphan {
			out = o.judge(ctx, f, broken)
		}
		found = append(found, out)
	}
	if o.refused == "" {
		opts := CheckOptions{Progress: progress}
		for _, check := range []func(context.Context, CheckOptions) ([]Finding, error){
			o.s.checkChains, o.s.checkRecords, o.unused,
		} {
			more, err := check(ctx, opts)
			if err != nil {
				return nil, err
			}
			found = append(found, more...)
		}
	}
	return found, o.unserved()
}

// judge names the snapshots that a finding harms.
func (o *Offline) judge(ctx context.Context, f layer.Finding, broken map[content.LayerID]layer.Damage) Finding {
	if o.refused == "" {
		out := o.s.judge(ctx, f, broken)
		if !out.Fixed {
			out.Hint = "start the daemon, then `dedupctl fsck --repair`; otherwise remove the images and pull them again"
		}
		return out
	}
	return Finding{Finding: f, Hint: "it heals once the daemon starts again: `dedupctl fsck --repair`, or a pull"}
}

// unused lists what no snapshot uses. The daemon removes it when it starts.
func (o *Offline) unused(ctx context.Context, _ CheckOptions) ([]Finding, error) {
	found, err := o.s.checkStrays(ctx, CheckOptions{})
	for i := range found {
		found[i].Hint = "it goes when the daemon starts"
	}
	return found, err
}

// Unused lists what GC with the same options would remove. Without a usable metadata.db that is an error.
func (o *Offline) Unused(ctx context.Context, opts GCOptions) (found []Finding, err error) {
	if o.refused != "" {
		return nil, fmt.Errorf("%s: %s: it cannot be told what is in use, and nothing is removed; put the file back "+
			"from a backup, or set another root and pull the images again", o.s.path("metadata.db"), o.refused)
	}
	if found, err = o.unused(ctx, CheckOptions{}); err != nil {
		return nil, err
	}
	orphans, err := o.s.layers.Orphans(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range orphans {
		found = append(found, Finding{Finding: f})
	}
	if opts.Chains {
		more, err := o.s.dropUnused(ctx, true)
		if err != nil {
			return nil, err
		}
		found = append(found, slices.DeleteFunc(more, func(f Finding) bool {
			return slices.ContainsFunc(found, func(g Finding) bool { return g.Path == f.Path })
		})...)
	}
	return found, o.unserved()
}

// LayersOf is that of a Snapshotter. While metadata.db is refused no image has any.
func (o *Offline) LayersOf(ctx context.Context, refs []ImageRef) ([][]content.LayerID, error) {
	if o.refused != "" {
		return make([][]content.LayerID, len(refs)), nil
	}
	return o.s.LayersOf(ctx, refs)
}

// Close forgets what was read.
func (o *Offline) Close() error {
	var errs []error
	if o.s.layers != nil {
		errs = append(errs, o.s.layers.Close())
	}
	if o.s.db != nil {
		errs = append(errs, o.s.db.close())
	}
	if o.copy != nil {
		errs = append(errs, o.copy.Close())
	}
	return errors.Join(errs...)
}
