package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Kinds of findings beside those of content/layer.
const (
	DamagedChain    layer.FindingKind = "chain image"
	DamagedMetadata layer.FindingKind = "metadata"
	StrayDirectory  layer.FindingKind = "directory"
	StrayChain      layer.FindingKind = "unused chain image"
	StrayMount      layer.FindingKind = "mount"
	StrayLoop       layer.FindingKind = "loop device"
	PendingSnapshot layer.FindingKind = "snapshot"
)

// Finding is one thing that is not as it should be, and what became of it.
type Finding struct {
	layer.Finding
	// Snapshots are the names of the committed snapshots that the damaged layers stand for.
	Snapshots []string
	// Fixed: it has been repaired, or removed. Otherwise Hint says what to do.
	Fixed bool
	Hint  string
}

// Damaged tells damage from what only takes space.
func (f Finding) Damaged() bool {
	switch f.Kind {
	case layer.DamagedObject, layer.DamagedTree, DamagedChain, DamagedMetadata, PendingSnapshot:
		return true
	}
	return false
}

// Harmed are the layers whose images the finding concerns.
func (f Finding) Harmed() []content.LayerID {
	if f.Kind == DamagedChain {
		return f.Layers[len(f.Layers)-1:] // whoever has the last one has this chain, or one above it
	}
	return f.Layers
}

// CheckOptions say what Check does with what it finds.
type CheckOptions struct {
	// Repair heals what can be healed from here, and removes what nothing uses.
	Repair bool
	// Progress hears what is being done, and how much of how much: bytes of objects and trees, then chain images.
	// It is called from one goroutine at a time.
	Progress func(stage string, done, total int64)
}

// Check verifies all that is stored, while others use it. Layers that are damaged are out of service from then on.
func (h *health) Check(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	defer h.explain(&err)
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64) {}
	}
	if found, err = h.check(ctx, opts); err == nil {
		h.counters.checked(found)
	}
	return found, err
}

func (h *health) check(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	stored, err := h.layers.Check(ctx, func(done, total int64) { opts.Progress("layers", done, total) })
	if err != nil {
		return nil, err
	}
	var node error // that nothing could be repaired does not keep anything from being removed
	if opts.Repair {
		node = h.repair(ctx, h.layers.Damaged())
	}
	broken := h.layers.Damaged()
	for _, f := range stored {
		found = append(found, h.judge(ctx, f, broken))
	}
	for _, check := range []func(context.Context, CheckOptions) ([]Finding, error){h.checkChains, h.checkMetadataFile,
		h.checkRecords, h.checkPending, h.checkStrays} {
		more, err := check(ctx, opts)
		if err != nil {
			return nil, err
		}
		found = append(found, more...)
	}
	if opts.Repair {
		if _, err := h.layers.RemoveOrphans(ctx); err != nil {
			return nil, err
		}
		for i := range found {
			found[i].Fixed = found[i].Fixed || found[i].Kind == layer.Orphan
		}
	}
	return found, node
}

// CheckKnown is Check that verifies nothing anew: it reports on layers that are known to be damaged.
func (h *health) CheckKnown(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	defer h.explain(&err)
	before := h.layers.Findings()
	if opts.Repair {
		if err := h.repair(ctx, h.layers.Damaged()); err != nil {
			return nil, err
		}
	}
	broken := h.layers.Damaged()
	for _, f := range before {
		found = append(found, h.judge(ctx, f, broken))
	}
	return found, nil
}

// judge tells what became of a finding of the layer store.
func (h *health) judge(ctx context.Context, f layer.Finding, broken map[content.LayerID]layer.Damage) Finding {
	out := Finding{Finding: f, Hint: "remove it with `dedupctl gc`"}
	if f.Kind == layer.Orphan {
		return out
	}
	names, err := h.snapshotsOf(ctx, f.Layers)
	if err == nil {
		out.Snapshots = names
	}
	out.Fixed = !slices.ContainsFunc(f.Layers, func(id content.LayerID) bool { _, still := broken[id]; return still })
	out.Hint = "the layer is out of service: `dedupctl fsck --repair` repairs what it can; otherwise remove " +
		"the images and pull them again"
	if out.Fixed {
		out.Hint = ""
	}
	return out
}

// snapshotsOf returns the names of the snapshots that hold any of the layers, sorted.
func (s *store) snapshotsOf(ctx context.Context, layers []content.LayerID) (names []string, err error) {
	stored, err := s.db.records(ctx)
	for _, sn := range stored.whole {
		if slices.ContainsFunc(heldBy(sn.Info), func(id content.LayerID) bool { return slices.Contains(layers, id) }) {
			names = append(names, sn.Name)
		}
	}
	slices.Sort(names)
	return names, err
}

// checkChains builds each chain image once more, without storing it, and compares.
func (h *health) checkChains(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	stored, err := h.db.records(ctx)
	if err != nil {
		return nil, err
	}
	chains := map[lower.Name][]content.LayerID{}
	for _, n := range stored.graph(h.chains.Name).nodes {
		if n.whole {
			for _, name := range n.names() {
				chains[name], _ = n.layers()
			}
		}
	}
	var names []lower.Name
	for n := range chains {
		if h.chains.Images.Has(n) && h.layers.InService(chains[n]...) == nil {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, func(a, b lower.Name) int { return slices.Compare(a.Sum[:], b.Sum[:]) })
	for i, n := range names {
		problem, err := h.chains.Compare(ctx, n, chains[n])
		if err != nil {
			return found, err
		}
		opts.Progress("chain images", int64(i+1), int64(len(names)))
		if problem == "" {
			continue
		}
		f := Finding{Finding: layer.Finding{Kind: DamagedChain, Path: h.chains.Images.Path(n), Problem: problem,
			Layers: chains[n]}, Hint: "`dedupctl fsck --repair` builds it again"}
		if f.Snapshots, err = h.snapshotsOf(ctx, chains[n][len(chains[n])-1:]); err != nil {
			return found, err
		}
		if opts.Repair {
			if err := h.chains.Rebuild(ctx, n, chains[n]); err != nil {
				return found, fmt.Errorf("repair chain image %s: %w", n, err)
			}
			f.Fixed, f.Hint = true, "containers that run keep the old one until they are started again"
		}
		found = append(found, f)
	}
	return found, nil
}

// checkMetadataFile verifies that the disk has the metadata.db that the daemon works with, and its structure.
func (h *health) checkMetadataFile(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	path := h.path("metadata.db")
	finding := func(problem, hint string) *Finding {
		found = append(found, Finding{Finding: layer.Finding{Kind: DamagedMetadata, Path: path, Problem: problem},
			Hint: hint})
		return &found[len(found)-1]
	}
	// Nobody else writes during a writable transaction.
	err = h.db.update(ctx, func(context.Context) error {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if _, err := checkBolt(data); err != nil {
			finding(err.Error(), "stop the daemon and put metadata.db back from a backup, or set another root and pull the "+
				"images again")
			return errUnchanged
		}
		problem := compareWithDisk(path, data)
		if problem == "" {
			return errUnchanged
		}
		f := finding(problem+"; the daemon still has it whole", "`dedupctl fsck --repair` writes it again; do not stop "+
			"the daemon before")
		if opts.Repair {
			if err := writeAgain(path, data); err != nil {
				return fmt.Errorf("write it again: %w", err)
			}
			f.Fixed, f.Hint = true, "look after the disk"
		}
		return errUnchanged
	})
	if !errors.Is(err, errUnchanged) {
		return nil, fmt.Errorf("read metadata.db: %w", err)
	}
	return found, nil
}

// errUnchanged ends a transaction without a write: a disk may have no room for one.
var errUnchanged = errors.New("nothing was changed")

// compareWithDisk tells where a file on the disk is not what the page cache has of it. A file system that cannot tell
// is believed.
func compareWithDisk(path string, cached []byte) (problem string) {
	const step = 1 << 20
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	// as aligned as disks want it
	buf, err := unix.Mmap(-1, 0, step, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Munmap(buf) }()
	for at := 0; at < len(cached); at += step {
		want := cached[at:min(at+step, len(cached))]
		n, err := unix.Pread(fd, buf, int64(at))
		switch {
		case errors.Is(err, unix.EINVAL):
			return ""
		case err != nil:
			return fmt.Sprintf("the disk cannot read it from byte %d on: %v", at, err)
		case n < len(want):
			return fmt.Sprintf("it ends at byte %d on the disk", at+n)
		}
		for i := range want {
			if buf[i] != want[i] {
				return fmt.Sprintf("it is another one on the disk, from byte %d on", at+i)
			}
		}
	}
	return ""
}

// writeAgain writes a file's bytes over themselves.
func writeAgain(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// checkRecords verifies what metadata.db says.
func (h *health) checkRecords(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	finding := func(problem, hint string, snapshots ...string) *Finding {
		f := Finding{Finding: layer.Finding{Kind: DamagedMetadata, Path: h.path("metadata.db"), Problem: problem},
			Snapshots: snapshots, Hint: hint}
		found = append(found, f)
		return &found[len(found)-1]
	}
	var stored records
	var linked string
	err = h.db.view(ctx, func(ctx context.Context) error {
		if stored = readRecords(ctx); stored.complete() {
			linked = checkLinks(ctx, stored)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read metadata.db: %w", err)
	}
	below := map[string][]string{} // children, by parent
	all := map[string]bool{"": true}
	for _, sn := range stored.whole {
		below[sn.Parent] = append(below[sn.Parent], sn.Name)
		all[sn.Name] = true
	}
	withAbove := func(harmed ...string) []string {
		for i := 0; i < len(harmed); i++ {
			harmed = append(harmed, below[harmed[i]]...)
		}
		return harmed
	}
	var orphans []string // whose parents are gone
	for parent, names := range below {
		if !all[parent] && !slices.Contains(stored.damaged, parent) {
			orphans = append(orphans, withAbove(names...)...)
		}
	}
	slices.Sort(orphans)
	for _, name := range stored.damaged {
		harmed := append(withAbove(name), orphans...)
		finding(fmt.Sprintf("the record of snapshot %q is not what was written", name),
			"remove the images and containers that it harms, then `dedupctl fsck --repair`, and pull them again", harmed...)
	}
	if stored.lost {
		f := finding("records of snapshots are lost", "nothing is removed for being unused until `dedupctl fsck --repair`",
			orphans...)
		if opts.Repair {
			if err := h.giveUpLost(ctx); err != nil {
				return nil, fmt.Errorf("repair metadata.db: %w", err)
			}
			f.Fixed, f.Hint = true, "what containers without a record wrote lies in "+h.path(dirLost)+
				": remove that when you have looked"
		}
	}
	if linked != "" {
		f := finding(linked, "the next start makes it anew, or `dedupctl fsck --repair` now")
		if opts.Repair {
			if err := h.db.update(ctx, makeLinks); err != nil {
				return nil, fmt.Errorf("repair metadata.db: %w", err)
			}
			f.Fixed, f.Hint = true, ""
		}
	}
	return found, nil
}

// giveUpLost takes the records that there are for all, and puts the directories that none of them names aside.
func (h *health) giveUpLost(ctx context.Context) error {
	if err := h.db.update(ctx, resum); err != nil {
		return err
	}
	stray, err := h.strays(ctx)
	if err != nil {
		return err
	}
	for _, dir := range stray.dirs {
		if strings.HasPrefix(dir, goingPrefix) {
			continue
		}
		err = errors.Join(err, os.MkdirAll(h.path(dirLost), 0o700), h.limits.move(h.path(dirSnapshots, dir),
			h.path(dirLost, dir)))
	}
	return err
}

// checkPending looks for committed snapshots whose directory could not be ingested.
func (h *health) checkPending(ctx context.Context, opts CheckOptions) (found []Finding, err error) {
	stored, err := h.db.records(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range stored.pending() {
		// One that is being ingested is fine, and so is one whose ingest works out now.
		err := h.awaitIngest(ctx, p)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		found = append(found, Finding{
			Finding: layer.Finding{Kind: PendingSnapshot, Path: h.path(dirSnapshots, p.id),
				Problem: "its files cannot be stored as a layer: " + err.Error()},
			Snapshots: []string{p.name},
			Hint:      "remove the image or container that it belongs to",
		})
	}
	return found, nil
}
