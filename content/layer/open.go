package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Open opens or creates the store below opts.Root. live names every layer that a snapshot refers to, once per
// reference: each gets one hold, every other layer is removed unless opts say otherwise. What an unclean stop may have
// damaged is found here; live layers that are damaged are out of service.
func Open(ctx context.Context, opts Options, live []content.LayerID) (_ *Store, err error) {
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.closeFiles()
		}
	}()
	if err := s.openDirs(); err != nil {
		return nil, err
	}
	suspect, err := s.markRunning()
	if err != nil {
		return nil, err
	}
	if err := s.openPacks(suspect); err != nil {
		return nil, err
	}
	holds := map[content.LayerID]int{}
	for _, id := range live {
		holds[id]++
	}
	suspects, err := s.load(ctx, holds, suspect)
	if err != nil {
		return nil, err
	}
	if err := s.openFormer(); err != nil {
		return nil, fmt.Errorf("look for what an upgrade has kept: %w", err)
	}
	if err := s.recipes.open(); err != nil {
		return nil, err
	}
	if err := s.sweep(ctx); err != nil {
		return nil, err
	}
	if err := s.assess(ctx, suspects); err != nil {
		return nil, err
	}
	if err := s.noteVerified(ctx, suspect); err != nil {
		return nil, err
	}
	if n := s.objects.Packs().Stats().TooDense; n > 0 {
		log.G(ctx).WithField("packs", n).Info("this kernel does not mount packs with blocks of 512 bytes: " +
			"they are copied in the background, and first of all those that a container waits for")
	}
	s.startKeeper()
	return s, nil
}

func newStore(opts Options) (*Store, error) {
	switch opts.Fidelity {
	case "":
		opts.Fidelity = content.Python
	case content.Exact, content.Python, content.Normalized:
	default:
		return nil, fmt.Errorf("fidelity %q: want exact, python or normalized", opts.Fidelity)
	}
	switch opts.Durability {
	case "":
		opts.Durability = Strict
	case Strict, Deferred:
	default:
		return nil, fmt.Errorf("durability %q: want strict or deferred", opts.Durability)
	}
	dir := &directory{root: opts.Root, rootFd: -1, opts: opts}
	cat := &catalog{
		fidelity: opts.Fidelity,
		layers:   map[content.LayerID]*state{},
		diffs:    map[diffKey]content.LayerID{},
		blobs:    map[blobKey]tree.Tar{},
		payloads: map[content.PayloadDigest][]content.LayerID{},
		recipes:  recipeIndex{byBlob: map[content.Sum][]keptRecipe{}},
	}
	durable := &durable{directory: dir}
	packed := &packed{durable: durable, wake: make(chan struct{}, 1), reads: make(chan struct{}, 1)}
	old := &oldLayout{packed: packed, catalog: cat}
	s := &Store{
		directory: dir,
		catalog:   cat,
		durable:   durable,
		packed:    packed,
		oldLayout: old,
		health:    &health{packed: packed, catalog: cat},
		accounts:  &accounts{oldLayout: old},
		reports:   &reports{packed: packed, catalog: cat, distinct: distinctMax},
	}
	s.budget = newBudget(opts.MaxMemory, func() {
		s.buffers.trim()
		s.parked.trim()
		freeHeap()
	})
	s.recipes = &recipes{health: s.health, budget: s.budget}
	s.flights.init()
	s.counters.init()
	return s, nil
}

// step names a point at which a test may end the process.
func (d *directory) step(name string) {
	if d.opts.Step != nil {
		d.opts.Step(name)
	}
}

func (d *directory) openDirs() error {
	if err := os.RemoveAll(d.path(dirIngest)); err != nil {
		return fmt.Errorf("empty staging directory: %w", err)
	}
	for _, sub := range []string{dirIngest, dirLayers} {
		if err := os.MkdirAll(d.path(sub), 0o700); err != nil {
			return fmt.Errorf("create store: %w", err)
		}
	}
	fd, err := unix.Open(d.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open store %s: %w", d.root, err)
	}
	d.rootFd = fd
	return nil
}

// openPacks opens the packs. Those written after since, if it is not zero, may not be whole.
func (p *packed) openPacks(since time.Time) (err error) {
	p.objects, err = object.Open(p.path(dirPacks), p.path(dirIngest), object.Options{
		Verity: p.opts.Verity, Dense: p.opts.Dense, Since: since, Held: p.opts.HeldPacks, ReadOnly: p.opts.readOnly,
		Moved: p.opts.PacksMoved, Step: p.opts.Step,
	})
	p.compactor = object.NewCompactor(p.objects, object.CompactOptions{Sync: p.watch, Room: p.spare})
	return err
}

func (p *packed) closeFiles() {
	if p.objects != nil {
		_ = p.objects.Close()
	}
	if p.rootFd >= 0 {
		_ = unix.Close(p.rootFd)
	}
}

// suspectMargin is how much older than the mark a layer may be that a power cut could still have caught.
const suspectMargin = 2 * time.Second

// suspectSince is, after a stop that was not clean and a reboot since, the time from which on layers may not be
// whole; otherwise it is zero.
func (d *directory) suspectSince() (suspect time.Time, err error) {
	_, err = os.Stat(d.path(fileClean))
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return suspect, err
	}
	boot := bootID()
	last, err := os.ReadFile(d.path(fileRunning))
	fi, serr := os.Stat(d.path(fileRunning))
	if err == nil && serr == nil && (string(last) != boot || boot == unknownBoot) {
		suspect = fi.ModTime().Add(-suspectMargin)
	}
	return suspect, nil
}

// markRunning takes the mark of a clean stop away. suspect is suspectSince's, and stays so until noteVerified.
func (d *durable) markRunning() (suspect time.Time, err error) {
	if suspect, err = d.suspectSince(); err != nil {
		return suspect, fmt.Errorf("mark store as running: %w", err)
	}
	if d.written.doubt.Store(!suspect.IsZero()); suspect.IsZero() {
		if err := d.writeRunning(bootID()); err != nil {
			return suspect, err
		}
	}
	if err := os.Remove(d.path(fileClean)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return suspect, fmt.Errorf("mark store as running: %w", err)
	}
	return suspect, unix.Fsync(d.rootFd)
}

// writeRunning names the boot in which the daemon runs.
func (d *durable) writeRunning(boot string) error {
	tmp, err := d.writeStaged("running-", []byte(boot), true)
	if err == nil {
		err = os.Rename(tmp, d.path(fileRunning))
	}
	if err != nil {
		return fmt.Errorf("mark store as running: %w", err)
	}
	return nil
}

// noteVerified ends the doubt that markRunning has found, unless there still are packs that came to the disk in
// parts.
func (p *packed) noteVerified(ctx context.Context, suspect time.Time) error {
	if suspect.IsZero() {
		return nil
	}
	mended, err := p.compactor.MendTorn(ctx)
	if errors.Is(err, unix.ENOSPC) || err == nil && !mended {
		log.G(ctx).WithError(err).Warn("incomplete packs stay until there is room to rewrite them: " +
			"starts take longer until then")
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.writeRunning(bootID()); err != nil {
		return err
	}
	p.written.doubt.Store(false)
	return unix.Fsync(p.rootFd)
}

// unknownBoot is taken for another boot than any.
const unknownBoot = "unknown"

// bootID is another one after each start of the machine.
func bootID() string {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return unknownBoot
	}
	return string(boot)
}

func (s *Store) load(ctx context.Context, holds map[content.LayerID]int, since time.Time) (suspects []content.LayerID,
	err error) {
	dir, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	for _, d := range dir {
		sum, err := content.ParseSum(d.Name())
		id := content.LayerID{Sum: sum}
		if err == nil && holds[id] == 0 && s.opts.KeepUnnamed {
			holds[id] = 1
		}
		if err != nil || holds[id] == 0 {
			if s.opts.readOnly {
				continue
			}
			if err := os.RemoveAll(s.path(dirLayers, d.Name())); err != nil {
				return nil, fmt.Errorf("remove unused layer: %w", err)
			}
			continue
		}
		fi, err := os.Stat(s.treePath(id))
		if err != nil {
			return nil, fmt.Errorf("read layer: %w", err)
		}
		if !since.IsZero() && fi.ModTime().After(since) {
			suspects = append(suspects, id)
		}
		st := &state{holds: holds[id], taken: holds[id], counted: true}
		var objects []content.ObjectID
		if st.facts, objects, err = tree.ReadFacts(s.treePath(id), id); err != nil {
			if !isDamage(err) {
				return nil, fmt.Errorf("read layer: %w", s.explain(err))
			}
			st.damage, st.counted = &Damage{Tree: err}, false
		}
		s.objects.Load(objects)
		s.insert(id, st, fi.Size())
	}
	for id, n := range holds {
		if s.layers[id] == nil {
			err := fmt.Errorf("its tree %s is missing: %w", filepath.Join(dirLayers, id.Hex()), fs.ErrNotExist)
			s.insert(id, &state{holds: n, taken: n, damage: &Damage{Tree: err}}, 0)
		}
	}
	return suspects, nil
}

// sweep removes what no layer names. Where it cannot be told what a damaged layer names, everything stays.
func (s *Store) sweep(ctx context.Context) error {
	for _, st := range s.layers {
		if !st.counted {
			log.G(ctx).Warn("the trees of some layers are damaged: payloads that only they may name stay until these layers " +
				"are repaired or removed: run `dedupctl fsck --repair`")
			s.leaked.Store(true)
			_, err := s.objects.Settle(true)
			return err
		}
	}
	s.step("open.sweep")
	n, err := s.objects.Settle(false)
	s.counters.change(func(st *Stats) { st.Swept = int64(n) })
	if err == nil && n > 0 {
		log.G(ctx).WithField("files", n).Info("removed what no layer names")
	}
	return err
}

// Close waits for background work. Holds end with it.
func (s *Store) Close() (err error) {
	s.closed.Do(func() {
		if s.opts.readOnly {
			s.closeFiles()
			return
		}
		s.flights.stop()
		s.keeper.stop()
		s.gc.Wait()
		s.written.stop()
		s.budget.close()
		s.buffers.trim()
		s.parked.trim()
		if s.opts.Durability == Deferred {
			err = syncfs(s.rootFd, s.root) // it tells what failed since the last time
		} else {
			err = s.Sync()
		}
		if err == nil && !s.leaked.Load() && !s.written.doubt.Load() {
			err = os.WriteFile(s.path(fileClean), nil, 0o600)
		}
		s.closeFiles()
	})
	return err
}
