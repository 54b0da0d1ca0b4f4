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
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// GCOptions say what GC removes.
type GCOptions struct {
	// DryRun lists, and removes nothing.
	DryRun bool
	// Chains removes the chain images that no container uses now, too. They are built again when needed, in the
	// first start of a container.
	Chains bool
}

// GC removes what nothing uses, while others go on, and tells what. Layers that were released go by themselves; what is
// left for GC is what could not be removed then. Space that it frees is free when it returns.
func (h *health) GC(ctx context.Context, opts GCOptions) (found []Finding, err error) {
	defer h.explain(&err)
	h.layers.Wait()
	defer h.layers.Wait()
	if found, err = h.checkStrays(ctx, CheckOptions{Repair: !opts.DryRun}); err != nil {
		return nil, err
	}
	orphans := h.layers.RemoveOrphans
	if opts.DryRun {
		orphans = h.layers.Orphans
	}
	more, err := orphans(ctx)
	for _, f := range more {
		found = append(found, Finding{Finding: f, Fixed: !opts.DryRun})
	}
	if err != nil || !opts.Chains {
		return found, err
	}
	unused, err := h.dropUnused(ctx, opts.DryRun)
	return append(found, unused...), err
}

// dropUnused removes the chain images that no container uses now.
func (h *health) dropUnused(ctx context.Context, dryRun bool) (found []Finding, err error) {
	names, err := h.chains.List()
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		fi, err := os.Stat(h.chains.Images.Path(n))
		if err != nil || h.chains.Users.IsUsed(n) {
			continue
		}
		if !dryRun {
			if err := h.chains.Drop(ctx, n); err != nil {
				return found, err
			}
		}
		found = append(found, Finding{
			Finding: layer.Finding{
				Kind: StrayChain, Path: h.chains.Images.Path(n), Problem: "no container uses it now", Bytes: fi.Size(),
			},
			Fixed: !dryRun,
		})
	}
	return found, nil
}

// pressure frees what can be had again when the file system runs out of room.
func (h *health) pressure(ctx context.Context) {
	found, err := h.GC(ctx, GCOptions{Chains: true})
	if err != nil {
		h.counters.removeError()
	}
	log.G(ctx).WithError(err).WithField("removed", len(found)).
		Warn("free space or inodes are down to the reserve: removed chain images that no container uses")
}

// checkStrays looks for what no snapshot uses.
func (h *health) checkStrays(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	stray, err := looksAgain(ctx, h)
	if err != nil {
		return nil, err
	}
	for _, dir := range stray.dirs {
		found = append(found, Finding{Finding: layer.Finding{Kind: StrayDirectory, Path: h.path(dirSnapshots, dir),
			Problem: "no snapshot uses it"}})
	}
	for _, n := range stray.chains {
		f := Finding{Finding: layer.Finding{
			Kind: StrayChain, Path: h.chains.Images.Path(n), Problem: "no snapshot has this chain",
		}}
		if !h.chains.Images.Has(n) {
			f.Kind, f.Path = StrayMount, h.chains.MountPoint(n)
		}
		found = append(found, f)
	}
	for _, n := range stray.mounts {
		found = append(found, Finding{Finding: layer.Finding{Kind: StrayMount, Path: h.chains.MountPoint(n),
			Problem: "no container or view uses it"}})
	}
	for i := range found {
		if fi, err := os.Lstat(found[i].Path); err == nil && fi.Mode().IsRegular() {
			found[i].Bytes = fi.Size()
		} else if u, err := layer.DiskUsage(ctx, found[i].Path); err == nil && found[i].Kind == StrayDirectory {
			found[i].Bytes = u.Bytes
		}
		found[i].Hint = "remove it with `dedupctl gc`"
	}
	loops, err := h.strayLoops()
	if err == nil && len(loops) > 0 { // one may be about to be mounted
		time.Sleep(lookPause)
		var still []Finding
		still, err = h.strayLoops()
		loops = slices.DeleteFunc(loops, func(f Finding) bool {
			return !slices.ContainsFunc(still, func(g Finding) bool { return g.Path == f.Path })
		})
	}
	if err != nil {
		return nil, err
	}
	found = append(found, loops...)
	if !opts.Repair {
		return found, nil
	}
	if err := h.clearStrays(ctx, stray); err != nil {
		return nil, err
	}
	for i := range found {
		if found[i].Kind == StrayLoop {
			if err := detachLoop(found[i].Path); err != nil {
				return nil, err
			}
		}
		found[i].Fixed, found[i].Hint = true, ""
	}
	return found, nil
}

// detachLoop lets a loop device go. One that somebody has open, in a mount that the daemon does not see, goes when that
// does.
func detachLoop(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("detach loop device: %w", err)
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", device, err)
	}
	return nil
}

// strayLoops finds loop devices over images that are gone or that nothing has mounted. One that is mounted
// nowhere any more the kernel frees by itself, unless somebody holds it.
func (h *health) strayLoops() (found []Finding, err error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	mounted, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	for _, file := range files {
		backing, err := os.ReadFile(file)
		if err != nil {
			continue // detached meanwhile
		}
		path := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(string(backing)), "(deleted)"))
		if !strings.HasPrefix(path, h.path(dirChains)+"/") {
			continue
		}
		device := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(file)))
		if strings.Contains(string(mounted), " "+device+" ") {
			continue
		}
		found = append(found, Finding{
			Finding: layer.Finding{Kind: StrayLoop, Path: device, Problem: "it is over " + path +
				" and mounted nowhere that the daemon sees"},
			Hint: "remove it with `dedupctl gc`",
		})
	}
	return found, nil
}

// strays is what no snapshot uses.
type strays struct {
	dirs   []string     // names below snapshots/
	chains []lower.Name // images or mount points of chains that no snapshot has
	mounts []lower.Name // mounts of chains that snapshots have, and none needs mounted
}

// Containers that start and end between the reading of the disk and of metadata.db leave what looks unused. So it
// has to look so several times.
const (
	looks     = 3
	lookPause = 30 * time.Millisecond
)

// looksAgain is strays without what is only about to be used, or to go.
func looksAgain(ctx context.Context, h *health) (stray strays, err error) {
	stray, err = h.strays(ctx)
	for look := 1; look < looks && err == nil && !stray.none(); look++ {
		time.Sleep(lookPause)
		var again strays
		again, err = h.strays(ctx)
		stray = stray.both(again)
	}
	stray.dirs = slices.DeleteFunc(stray.dirs, func(name string) bool {
		_, going := h.going.Load(name)
		_, err := os.Lstat(h.path(dirSnapshots, name)) // it may have gone since
		return going || errors.Is(err, fs.ErrNotExist)
	})
	return stray, err
}

// both returns what is stray in both of two looks.
func (s strays) both(t strays) strays {
	chain := func(other []lower.Name) func(lower.Name) bool {
		return func(n lower.Name) bool { return !slices.Contains(other, n) }
	}
	return strays{
		dirs:   slices.DeleteFunc(s.dirs, func(name string) bool { return !slices.Contains(t.dirs, name) }),
		chains: slices.DeleteFunc(s.chains, chain(t.chains)), mounts: slices.DeleteFunc(s.mounts, chain(t.mounts)),
	}
}

func (s strays) none() bool { return len(s.dirs)+len(s.chains)+len(s.mounts) == 0 }

// strays looks for what no snapshot uses.
func (h *health) strays(ctx context.Context) (stray strays, err error) {
	dirs, err := os.ReadDir(h.path(dirSnapshots)) // before metadata.db: newer ones are not ours to judge
	if err != nil {
		return stray, fmt.Errorf("list snapshot directories: %w", err)
	}
	images, err := h.chains.List()
	if err != nil {
		return stray, err
	}
	stored, err := h.db.records(ctx)
	if err != nil {
		return stray, err
	}
	if !stored.complete() {
		log.G(ctx).Warn("metadata.db is damaged: nothing unused is removed until `dedupctl fsck --repair` has repaired it")
		return stray, nil
	}
	used := map[string]bool{}
	chainsUsed := map[lower.Name]bool{}
	for _, n := range stored.graph(h.chains.Name).nodes {
		committed := n.kind == snapshots.KindCommitted
		// A layer needs no directory once it is stored; a crash right after may have left it.
		used[n.id] = used[n.id] || !committed || n.layer.IsZero()
		for _, id := range n.over {
			used[id] = true
		}
		if !committed {
			n = n.base()
		}
		if n != nil && n.whole {
			chainsUsed[n.chain], chainsUsed[n.mapped] = true, true
		}
	}
	for _, d := range dirs {
		if !used[d.Name()] && !h.steps.inUse(d.Name()) {
			stray.dirs = append(stray.dirs, d.Name())
		}
	}
	for _, name := range images {
		switch {
		case !chainsUsed[name]:
			stray.chains = append(stray.chains, name)
		case h.chains.IsMounted(name) && !h.chains.Users.IsKept(name):
			stray.mounts = append(stray.mounts, name)
		}
	}
	return stray, nil
}

// clearStrays removes what strays has found. What has come into use meanwhile stays.
func (h *health) clearStrays(ctx context.Context, stray strays) error {
	var errs []error
	for _, dir := range stray.dirs {
		errs = append(errs, h.limits.removeDir(dir))
	}
	for _, n := range stray.chains {
		errs = append(errs, h.chains.Drop(ctx, n))
	}
	for _, n := range stray.mounts {
		errs = append(errs, h.chains.Release(ctx, n))
	}
	return errors.Join(errs...)
}

// Cleanup removes directories, chain images and mounts that no snapshot names.
func (h *health) Cleanup(ctx context.Context) (err error) {
	defer h.explain(&err)
	stray, err := h.strays(ctx)
	if err != nil {
		return err
	}
	return h.clearStrays(ctx, stray)
}
