package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

// Options configure a Snapshotter.
type Options struct {
	// Root holds all state. It is created with mode 0700.
	Root string
	// RunDir holds the mount points of chain images; usually on a tmpfs.
	RunDir string
	// Fidelity under which layers are ingested; "" is content.Python.
	Fidelity content.Fidelity
	// FetchedOnly turns hits in Prepare off: a known layer is served only to a pull that fetched its blob itself.
	FetchedOnly bool
	// Durability, Reserve and Step are those of layer.Options.
	Durability layer.Durability
	Reserve    layer.Reserve
	// MaxMemory is that of layer.Options.
	MaxMemory int64
	Step      func(name string)
	// Verity says whether packs and chain images get fs-verity, and chain images are mounted over no other packs than
	// those whose digests they hold; "" is lower.VerityOff.
	Verity lower.Verity
	// PageCache says what containers share in memory; "" is what the kernel can.
	PageCache lower.PageCache
	// Linger is how long what containers have read stays mounted, and so in memory, after the last of them has gone.
	Linger time.Duration
	// Projects are the project ids for snapshots of limited size; the zero value is quota.DefaultRange.
	Projects quota.Range
	// Blobs is the content store of the containerd that calls. Without it only layers that are
	// known are served in Prepare.
	Blobs *blobs.Store
	// Remind has that containerd look at its record of a chain, in the namespace of ctx: it asks for the snapshot then.
	Remind    func(ctx context.Context, chain content.ChainID) error
	Committed func() // is called when a layer came in as a snapshot, and must not block; both may be nil

	noDense error // why the kernel mounts no dense packs, for tests; nil: what the probe finds
}

// Snapshotter is a snapshots.Snapshotter and snapshots.Cleaner. Safe for concurrent use.
//
// Its own methods are containerd's, and how it opens. What they stand on are parts that know no more than they embed.
type Snapshotter struct {
	*store
	*tasks
	*ingester
	*known
	*health
	*reports
	*mounter

	opened chan struct{} // closed once chains is there
	close  sync.Once
	lost   lost
	// merge is layers.Merge, but for tests.
	merge func(context.Context, []content.LayerID) (*tree.Node, error)
}

const (
	dirSnapshots = "snapshots"
	dirChains    = "chains"
	dirEmpty     = "empty"
	dirIngest    = "ingest"
	dirLost      = "lost+found"
	// dirPackMounts is below the run directory. Its name is short, since overlays' options have it twice for each pack.
	dirPackMounts = "p"
	// goingPrefix begins the names of snapshot directories that are being removed.
	goingPrefix = "rm-"
)

// New opens or creates the store below opts.Root and serves it. One process at a time may.
func New(ctx context.Context, opts Options) (*Snapshotter, error) {
	s, err := newSnapshotter(ctx, opts)
	if !errors.Is(err, unix.ENOSPC) {
		return s, err
	}
	// On a full disk nobody could remove images without a daemon: what can be built again goes first.
	images, _ := filepath.Glob(filepath.Join(opts.Root, dirChains, "*"+lower.ImageSuffix))
	for _, path := range images {
		_ = os.Remove(path)
	}
	if len(images) == 0 {
		return s, err
	}
	log.G(ctx).WithError(err).Warnf("the store does not open: removed %d chain images to make room", len(images))
	return newSnapshotter(ctx, opts)
}

func newSnapshotter(ctx context.Context, opts Options) (_ *Snapshotter, err error) {
	s := assemble(opts)
	// Background work outlives the call, not the Snapshotter.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			err = layer.Explain(errors.Join(err, s.Close()), opts.Root)
		}
	}()
	if err := os.MkdirAll(opts.Root, 0o700); err != nil {
		return nil, fmt.Errorf("create root: %w", err)
	}
	if err := secureRoot(opts.Root); err != nil {
		return nil, err
	}
	if err := s.takeLock(); err != nil {
		return nil, err
	}
	version, err := s.checkFormat()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{dirSnapshots, dirChains, dirEmpty} {
		if err := os.MkdirAll(s.path(dir), 0o700); err != nil {
			return nil, fmt.Errorf("create root: %w", err)
		}
	}
	// An empty lower layer shows its own mode where a container has no parent.
	if err := os.Chmod(s.path(dirEmpty), 0o755); err != nil {
		return nil, err
	}
	if err := s.clearLeftovers(); err != nil {
		return nil, err
	}
	if err := s.probeKernel(); err != nil {
		return nil, fmt.Errorf("this node cannot serve from %s: %w", opts.Root, err)
	}
	if err := s.checkMetadata(ctx); err != nil {
		return nil, err
	}
	if err := s.upgrade(ctx, version); err != nil {
		return nil, err
	}
	if err := s.openMetadata(ctx); err != nil {
		return nil, err
	}
	stored, err := s.db.records(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.openStores(ctx, stored); err != nil {
		return nil, err
	}
	s.limits.open(ctx, opts.Projects, stored)
	if err := s.Cleanup(ctx); err != nil {
		return nil, err
	}
	for _, p := range stored.pending() { // go on where the last process stopped
		s.startIngest(p)
	}
	return s, nil
}

// openMetadata opens what checkMetadata has found to be whole in structure. Damaged records are left alone: the
// snapshots that they speak of do not work, others do.
func (s *Snapshotter) openMetadata(ctx context.Context) (err error) {
	s.db, err = openMetadata(ctx, s.path("metadata.db"))
	if errors.Is(err, errOthers) {
		if err := s.refuseData("is another program's"); err != nil {
			return err
		}
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", s.path("metadata.db"), err)
	}
	found, err := s.checkRecords(ctx, CheckOptions{})
	for _, f := range found {
		log.G(ctx).Errorf("%s: %s: %s", f.Path, f.Problem, f.Hint)
	}
	if err != nil || len(found) == 0 {
		return err
	}
	s.counters.checked(found)
	// Without its links storage would remove a parent before its children.
	return s.db.update(ctx, func(ctx context.Context) error {
		if !readRecords(ctx).complete() {
			return nil
		}
		return makeLinks(ctx)
	})
}

// openStores opens the layers with the holds that snapshots have, and the chain images with
// their users.
func (s *Snapshotter) openStores(ctx context.Context, stored records) (err error) {
	var live []content.LayerID
	for _, sn := range stored.whole {
		live = append(live, heldBy(sn.Info)...)
		if _, ok := layerOf(sn.Info); !ok && sn.Kind == snapshots.KindCommitted && sn.Labels[labelPending] == "" {
			return fmt.Errorf("read metadata.db: snapshot %q names no layer: %s", sn.Name, refused)
		}
		switch {
		case sn.Kind != snapshots.KindCommitted:
			s.ids.add(sn.id, sn.Name)
		case sn.Labels[labelRef] != "":
			s.refs.add(sn.Labels[labelRef], sn.Name)
		}
	}
	held, err := lower.PacksOf(s.path(dirChains))
	if err != nil {
		return err
	}
	s.layers, err = layer.Open(ctx, layer.Options{
		Root: s.opts.Root, Fidelity: s.opts.Fidelity, Durability: s.opts.Durability, KeepUnnamed: !stored.complete(),
		Verity: s.kernel.NoVerity == nil, Dense: s.kernel.NoDense == nil,
		Reserve: s.opts.Reserve, MaxMemory: s.opts.MaxMemory,
		Pressure: s.pressure, PacksMoved: s.packsMoved, HeldPacks: held, Step: s.opts.Step, User: stored.uses,
		Mounted: s.mountedLayers,
	}, live)
	if err != nil {
		return fmt.Errorf("open layers: %w", err)
	}
	s.merge = s.layers.Merge
	s.chains, err = lower.Open(ctx, lower.Options{
		Images: s.path(dirChains), Staging: s.path(dirIngest), Mounts: filepath.Join(s.opts.RunDir, dirChains),
		PackMounts: filepath.Join(s.opts.RunDir, dirPackMounts), Layers: s.layers, Kernel: s.kernel,
		Merge:      func(ctx context.Context, chain []content.LayerID) (*tree.Node, error) { return s.merge(ctx, chain) },
		Background: s.background, Linger: s.opts.Linger, Step: s.step,
	})
	if err != nil {
		return err
	}
	close(s.opened)
	if err := s.layers.Packs().Release(held); err != nil { // the chain images hold them now
		return fmt.Errorf("remove old packs: %w", err)
	}
	for _, sn := range stored.whole {
		s.reclaim(sn.Info)
	}
	for _, n := range stored.graph(s.chains.Name).nodes {
		if n.kind == snapshots.KindCommitted {
			continue
		}
		use(s.chains, n)
		if n.flavour == lower.Mapped { // images for such containers are built ahead from now on
			s.mapped.Store(true)
		}
	}
	s.loadSteps(stored)
	return s.clearViews(stored)
}

// packsMoved notes at once which chain images are to be built anew, and removes in the background those that nothing
// uses. What moves before chain images are looked at is found then.
func (s *Snapshotter) packsMoved(packs []content.PackID, damaged bool) {
	select {
	case <-s.opened:
	default:
		return
	}
	stale := s.chains.Images.Moved(packs, damaged)
	s.background(func(ctx context.Context) {
		if err := s.chains.DropStale(ctx, stale); err != nil && ctx.Err() == nil {
			s.counters.removeError()
			log.G(ctx).WithError(err).Warn("chain images over old packs stay until the next cleanup")
		}
	})
}

// chainOf returns the layers of a committed snapshot and all below it, base first, or one
// that is pending. In a transaction.
func chainOf(ctx context.Context, name string) (chain []content.LayerID, pending *pendingSnapshot, err error) {
	for name != "" {
		id, info, _, err := getInfo(ctx, name)
		if err != nil {
			return nil, nil, fmt.Errorf("snapshot %q: %w", name, err)
		}
		lid, ok := layerOf(info)
		if !ok {
			return nil, &pendingSnapshot{id, name}, nil
		}
		chain = append(chain, lid)
		name = info.Parent
	}
	slices.Reverse(chain)
	return chain, nil, nil
}

// resolve is chainOf that waits for pending snapshots.
func (g *ingester) resolve(ctx context.Context, name string) ([]content.LayerID, error) {
	for {
		var chain []content.LayerID
		var pending *pendingSnapshot
		err := g.db.view(ctx, func(ctx context.Context) (err error) {
			chain, pending, err = chainOf(ctx, name)
			return err
		})
		if err != nil || pending == nil {
			return chain, err
		}
		if err := g.awaitIngest(ctx, *pending); err != nil {
			return nil, err
		}
	}
}

// Stat returns the info of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	look := func(ctx context.Context) error {
		_, info, _, err = getInfo(ctx, key)
		return err
	}
	if err = s.db.view(ctx, look); errdefs.IsNotFound(err) && s.lost.restore(ctx, key) {
		err = s.db.view(ctx, look)
	}
	return visible(info), err
}

func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info,
	err error) {
	defer s.explain(&err)
	if err := checkUpdate(fieldpaths); err != nil {
		return out, err
	}
	err = s.db.update(ctx, func(ctx context.Context) error {
		_, old, _, err := getInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		info.Labels = withPrivate(info.Labels, old.Labels)
		delete(info.Labels, labelUpdated) // the client's own update counts from now on
		if len(fieldpaths) > 0 {
			fieldpaths = append(slices.Clone(fieldpaths), "labels."+labelUpdated)
		}
		out, err = updateInfo(ctx, old, info, fieldpaths...)
		if ref := out.Labels[labelRef]; err == nil && out.Kind == snapshots.KindCommitted && ref != "" {
			s.refs.add(ref, info.Name) // the old one goes with the next start: readers look again
		}
		return err
	})
	return visible(out), err
}

// Usage of an active snapshot is that of its directory. The first committed one of a layer has what was added to the
// disk when it came, and all have their part in what nobody has, so that the sum over all snapshots is what the disk
// holds, which is what the kubelet wants to know. A step's directory counts for as long as it stays.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	defer s.explain(&err)
	var id string
	var info snapshots.Info
	err = s.db.view(ctx, func(ctx context.Context) error {
		id, info, usage, err = getInfo(ctx, key)
		return err
	})
	if err != nil {
		return usage, err
	}
	if lid, ok := layerOf(info); ok {
		u := s.layers.Share(lid, info.Labels[labelClaim] != "", s.chains.Images.Usage())
		if s.steps.kept(id) { // what Commit found in the directory
			u.Bytes, u.Inodes = u.Bytes+usage.Size, u.Inodes+usage.Inodes
		}
		return snapshots.Usage{Size: u.Bytes, Inodes: u.Inodes}, nil
	}
	if info.Kind != snapshots.KindActive {
		return usage, nil // a view, or one whose directory is about to be ingested
	}
	du, err := fs.DiskUsage(ctx, s.upper(id))
	if errors.Is(err, os.ErrNotExist) {
		return snapshots.Usage{}, nil // its directories are not made yet
	}
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("usage of snapshot %q: %w", key, err)
	}
	return snapshots.Usage(du), nil
}

// Walk calls fn for the snapshots that match any of the filters. containerd's way of
// adopting a hit is to walk with a filter on the target's label: it then sees
// its own namespace alone, since a snapshot that two namespaces adopted would be removed for
// both when one removes it.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var own string
	for _, f := range filters {
		if strings.Contains(f, labelRef) {
			own, _ = namespaces.Namespace(ctx)
		}
	}
	// fn may call back into the snapshotter (and does, in containerd's garbage collector), so it
	// runs outside of the transaction.
	var infos []snapshots.Info
	err := s.db.view(ctx, func(ctx context.Context) error {
		return s.walk(ctx, func(info snapshots.Info) error {
			if own == "" || info.Labels[labelNamespace] == own {
				infos = append(infos, info)
			}
			return nil
		}, filters...)
	})
	if err != nil {
		return err
	}
	for _, info := range infos {
		if err := fn(ctx, visible(info)); err != nil {
			return err
		}
	}
	return nil
}

// Close waits for background work. It unmounts nothing, since containers go on. A
// pending ingest is resumed by the next New.
func (s *Snapshotter) Close() (err error) {
	s.close.Do(func() {
		s.stop()
		if s.layers != nil {
			err = errors.Join(err, s.layers.Close())
		}
		if s.db != nil {
			err = errors.Join(err, s.db.close())
		}
		if s.lock != nil {
			err = errors.Join(err, s.lock.Close())
		}
	})
	return err
}
