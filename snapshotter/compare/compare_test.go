package compare

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// world is a snapshotter with a content store, and both differs.
type world struct {
	t       testing.TB
	ctx     context.Context
	root    string
	s       *snapshotter.Snapshotter
	store   ctdcontent.Store
	leases  leases.Manager
	ours    *Comparer
	walking diff.Comparer
	serial  int
}

func newWorld(t testing.TB, fidelity content.Fidelity, cache lower.PageCache) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	ctx := namespaces.WithNamespace(t.Context(), "test")
	w := &world{t: t, ctx: ctx, root: t.TempDir()}
	w.store, w.leases = contentStore(t)
	w.open(fidelity, cache)
	return w
}

func (w *world) open(fidelity content.Fidelity, cache lower.PageCache) {
	w.t.Helper()
	s, err := snapshotter.New(w.ctx, snapshotter.Options{
		Root: w.root, RunDir: filepath.Join(w.root, "run"), Fidelity: fidelity, PageCache: cache,
		Verity: lower.VerityOff, Durability: layer.Deferred,
	})
	w.must(err)
	w.t.Cleanup(func() {
		w.unmountChains()
		if err := s.Close(); err != nil {
			w.t.Error(err)
		}
	})
	w.s, w.ours, w.walking = s, New(s, w.store, w.leases), walking.NewWalkingDiff(w.store)
}

// unmountChains takes away what the daemon leaves mounted for clients.
func (w *world) unmountChains() {
	for _, pattern := range []string{"run/chains/*", "run/p/*", "run/v/*"} {
		points, err := filepath.Glob(filepath.Join(w.root, pattern))
		w.must(err)
		for _, p := range points {
			if err := mount.UnmountAll(p, unix.MNT_DETACH); err != nil {
				w.t.Error(err)
			}
		}
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// contentStore is containerd's own, with namespaces and leases.
func contentStore(t testing.TB) (ctdcontent.Store, leases.Manager) {
	t.Helper()
	dir := t.TempDir()
	files, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	all := metadata.NewDB(db, files, nil)
	return all.ContentStore(), metadata.NewLeaseManager(all)
}

// active makes a snapshot in which change has done its work.
func (w *world) active(parent string, change func(root string)) (key string, mounts []mount.Mount) {
	w.t.Helper()
	w.serial++
	key = fmt.Sprintf("active-%d", w.serial)
	mounts, err := w.s.Prepare(w.ctx, key, parent)
	w.must(err)
	dir := w.t.TempDir()
	w.must(mount.All(mounts, dir))
	change(dir)
	w.must(mount.UnmountAll(dir, 0))
	return key, mounts
}

// commit makes a layer on parent.
func (w *world) commit(parent string, change func(root string)) string {
	w.t.Helper()
	key, _ := w.active(parent, change)
	name := "committed-" + key
	w.must(w.s.Commit(w.ctx, name, key))
	return name
}

// ingest has no step wait for its ingest any more: until then it is compared by its directory, after that by its tree.
func (w *world) ingest() {
	w.t.Helper()
	_, err := w.s.Check(w.ctx, snapshotter.CheckOptions{})
	w.must(err)
}

// known waits until the layer of a blob is stored, and holds it.
func (w *world) known(blob digest.Digest) layer.Ingested {
	w.t.Helper()
	for range 6000 {
		if in, known := w.s.Layers().LookupBlob(blob); known {
			return in
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.t.Fatalf("blob %s is not known", blob)
	return layer.Ingested{}
}

func (w *world) view(parent string) []mount.Mount {
	w.t.Helper()
	w.serial++
	mounts, err := w.s.View(w.ctx, fmt.Sprintf("view-%d", w.serial), parent)
	w.must(err)
	return mounts
}

// agree compares with both differs, which have to write the same bytes.
func (w *world) agree(what string, lower, upper []mount.Mount, opts ...diff.Opt) ocispec.Descriptor {
	w.t.Helper()
	opts = append(opts, diff.WithMediaType(ocispec.MediaTypeImageLayer))
	want, err := w.walking.Compare(w.ctx, lower, upper, opts...)
	w.must(err)
	got, err := w.ours.Compare(w.ctx, lower, upper, opts...)
	w.must(err)
	if got.Digest != want.Digest || got.Size != want.Size {
		lines := difference(w.members(want), w.members(got))
		w.t.Errorf("%s: another tar than the walking differ's:\n%s", what, strings.Join(lines, "\n"))
	}
	return got
}

func (w *world) members(desc ocispec.Descriptor) []string {
	w.t.Helper()
	data, err := ctdcontent.ReadBlob(w.ctx, w.store, desc)
	w.must(err)
	all, err := listTar(bytes.NewReader(data))
	w.must(err)
	return all
}

func difference(want, got []string) (lines []string) {
	count := map[string]int{}
	for _, m := range want {
		count[m]++
	}
	for _, m := range got {
		if count[m]--; count[m] < 0 {
			lines = append(lines, "+ "+m)
		}
	}
	for _, m := range want {
		if count[m] > 0 {
			lines = append(lines, "- "+m)
		}
	}
	return append(lines, fmt.Sprintf("%d members, want %d", len(got), len(want)))
}

// settings are the ways in which layers are stored and mounted.
func settings(t *testing.T, test func(t *testing.T, w *world)) {
	for fidelity, cache := range map[content.Fidelity]lower.PageCache{
		content.Exact: lower.PageCachePrivate, content.Python: lower.PageCacheShared,
	} {
		t.Run(fmt.Sprintf("%s-%s", fidelity, cache), func(t *testing.T) { test(t, newWorld(t, fidelity, cache)) })
	}
}

// Both differs write the same bytes for each kind of change: between committed snapshots that are one layer apart, or
// many, or none; of an active one; whatever the order of the sides.
func TestSameBytesAsWalking(t *testing.T) {
	settings(t, func(t *testing.T, w *world) {
		base := w.commit("", plant)
		first := w.commit(base, torture)
		second := w.commit(first, tortureMore)
		beside := w.commit(base, tortureMore)
		_, changed := w.active(first, tortureMore)
		none := []mount.Mount(nil)
		for _, row := range []struct {
			name         string
			lower, upper []mount.Mount
		}{
			{"the base", none, w.view(base)},
			{"the base over an empty view", w.view(""), w.view(base)},
			{"one layer", w.view(base), w.view(first)},
			{"another layer", w.view(first), w.view(second)},
			{"two layers", w.view(base), w.view(second)},
			{"all layers", none, w.view(second)},
			{"nothing", w.view(second), w.view(second)},
			{"the reverse", w.view(second), w.view(base)},
			{"chains that part", w.view(second), w.view(beside)},
			{"active", w.view(first), changed},
			{"active over less than its parent", w.view(base), changed},
			{"active over nothing", none, changed},
		} {
			w.agree(row.name, row.lower, row.upper)
		}
		w.agree("with an epoch", w.view(base), w.view(second), diff.WithSourceDateEpoch(&moment))
	})
}

var moment = time.Unix(1_000_000_000, 0)

// Layers that come as tars may link to what lies below them.
func TestLowerLinks(t *testing.T) {
	settings(t, func(t *testing.T, w *world) {
		base := w.commit("", plant)
		linked := w.apply(base, linksBelow(t))
		w.agree("one layer", w.view(base), w.view(linked))
		_, changed := w.active(linked, torture)
		w.agree("active", w.view(base), changed)
	})
}

// A hard link to a file that does not change: overlayfs copies it up, and the layer has both names, as the walking
// differ writes them.
func TestLinkToUnchangedFile(t *testing.T) {
	settings(t, func(t *testing.T, w *world) {
		base := w.commit("", plant)
		change := func(root string) {
			at := func(path string) string { return filepath.Join(root, path) }
			check(os.Link(at("etc/two"), at("usr/zz-behind")), os.Link(at("usr/lib/two"), at("etc/before")),
				os.Link(at("etc/hard-1"), at("opt/third")), os.Link(at("etc/link"), at("z/symlink")))
		}
		_, active := w.active(base, change)
		committed := w.view(w.commit(base, change))
		want := []string{ // the unchanged name follows the new one
			`"etc/before" 0 ""`, `"opt/third" 0 ""`, `"etc/hard-1" 1 "opt/third"`, `"usr/lib/two" 1 "etc/before"`,
			`"usr/zz-behind" 0 ""`, `"etc/two" 1 "usr/zz-behind"`, `"z/symlink" 2 "one"`, `"etc/link" 1 "z/symlink"`,
		}
		for what, upper := range map[string][]mount.Mount{"active": active, "committed": committed} {
			desc := w.agree(what, w.view(base), upper)
			if got := w.links(desc); !slices.Equal(got, want) {
				t.Errorf("%s: links\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	})
}

// Random chains, random changes: the same bytes.
func TestRandomChangesAsWalking(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	chain := []string{w.commit("", plant)}
	for range 4 {
		chain = append(chain, w.commit(chain[len(chain)-1], func(root string) { shuffle(t, r, root, 25) }))
		if r.IntN(2) == 0 {
			w.ingest()
		}
		_, changed := w.active(chain[len(chain)-1], func(root string) { shuffle(t, r, root, 25) })
		w.agree("active", w.view(chain[len(chain)-1]), changed)
		i, j := r.IntN(len(chain)), r.IntN(len(chain))
		w.agree(fmt.Sprintf("layers %d and %d", i, j), w.view(chain[i]), w.view(chain[j]))
		w.agree("the last layer", w.view(chain[len(chain)-2]), w.view(chain[len(chain)-1]))
	}
}

// A layer that was written is known: nobody reads its blob again, for as long as what it was made from is there.
func TestWrittenLayerIsKnown(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	base := w.commit("", plant)
	first := w.commit(base, torture)
	for _, media := range []string{
		ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	} {
		desc, err := w.ours.Compare(w.ctx, w.view(base), w.view(first), diff.WithMediaType(media),
			diff.WithLabels(map[string]string{"mine": media}), diff.WithReference("ref-"+media))
		w.must(err)
		again, err := w.ours.Compare(w.ctx, w.view(base), w.view(first), diff.WithMediaType(media))
		w.must(err)
		if again.Digest != desc.Digest || desc.MediaType != media {
			t.Errorf("%s: %v, then %v", media, desc, again)
		}
		info, err := w.store.Info(w.ctx, desc.Digest)
		w.must(err)
		in := w.known(desc.Digest)
		w.s.Layers().Release(in.Layer)
		diffID := in.DiffID.Digest().String()
		if label := info.Labels["containerd.io/uncompressed"]; media != ocispec.MediaTypeImageLayer && label != diffID {
			t.Errorf("%s: label %q, diffID %s", media, label, diffID)
		}
		if info.Labels["mine"] != media || info.Size != desc.Size {
			t.Errorf("%s: %v of %v", media, info, desc)
		}
	}
	desc, err := w.ours.Compare(w.ctx, w.view(base), w.view(first))
	w.must(err)
	if desc.MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("without a media type: %v", desc)
	}
	// What the blob gives, read as any other, is the layer that is known.
	data, err := ctdcontent.ReadBlob(w.ctx, w.store, desc)
	w.must(err)
	in := w.known(desc.Digest)
	fresh, err := w.s.Layers().IngestBlob(w.ctx, layer.Blob{Open: open(data), Late: late(desc.Digest)})
	w.must(err)
	if fresh.Layer != in.Layer || fresh.Outcome != layer.Same {
		t.Errorf("the blob gives layer %s, known is %s", fresh.Layer, in.Layer)
	}
	w.s.Layers().Release(in.Layer)
	w.s.Layers().Release(fresh.Layer)

	// Nothing takes it for a stray; it survives a restart, and goes with its snapshot.
	w.must(w.s.Close())
	o, err := snapshotter.OpenOffline(w.ctx, w.root, filepath.Join(w.root, "run"))
	w.must(err)
	if found, err := o.Unused(w.ctx, snapshotter.GCOptions{DryRun: true}); err != nil || len(found) > 0 {
		t.Errorf("strays: %v, %v", found, err)
	}
	w.must(o.Close())
	w.open(content.Python, lower.PageCacheShared)
	if in, known := w.s.Layers().LookupBlob(desc.Digest); !known {
		t.Error("not known after a restart")
	} else {
		w.s.Layers().Release(in.Layer)
	}
	for i := range w.serial {
		_ = w.s.Remove(w.ctx, fmt.Sprintf("view-%d", i+1))
	}
	w.must(w.s.Remove(w.ctx, first))
	w.s.Layers().Wait()
	if _, known := w.s.Layers().LookupBlob(desc.Digest); known {
		t.Error("known without its snapshot")
	}
}

// What is not ours is the next differ's; so is what it can do and we cannot.
func TestNotImplemented(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	base := w.commit("", plant)
	_, changed := w.active(base, torture)
	mapped := []mount.Mount{{Type: "overlay", Options: append(slices.Clone(changed[0].Options), "uidmap=0:1:2")}}
	plain := []mount.Mount{{Type: "bind", Source: t.TempDir(), Options: []string{"rbind", "ro"}}}
	overlay := []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=/a:/b"}}}
	for _, row := range []struct {
		name         string
		lower, upper []mount.Mount
		opt          diff.Opt
	}{
		{"another's bind", w.view(base), plain, diff.WithLabels(nil)},
		{"another's lower", plain, w.view(base), diff.WithLabels(nil)},
		{"another's overlay", w.view(base), overlay, diff.WithLabels(nil)},
		{"another type", w.view(base), []mount.Mount{{Type: "ext4", Source: "/dev/x"}}, diff.WithLabels(nil)},
		{"several", w.view(base), append(w.view(base), plain...), diff.WithLabels(nil)},
		{"an active one below", changed, w.view(base), diff.WithLabels(nil)},
		{"id-mapped", w.view(base), mapped, diff.WithLabels(nil)},
		{"media type", w.view(base), changed, diff.WithMediaType("application/vnd.docker.image.rootfs.diff.tar.gzip")},
	} {
		if _, err := w.ours.Compare(w.ctx, row.lower, row.upper, row.opt); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", row.name, err)
		}
	}
}

// An error leaves nothing behind: no blob, no layer, no mounts.
func TestFailedCompare(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	base := w.commit("", plant)
	w.ingest()
	lowerView, upperView := w.view(""), w.view(base)
	failing := New(w.s, failingStore{w.store}, w.leases)
	if _, err := failing.Compare(w.ctx, lowerView, upperView, diff.WithReference("mine")); !errors.Is(err, errFull) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	cancel()
	if _, err := w.ours.Compare(ctx, lowerView, upperView); err == nil {
		t.Error("no error")
	}
	w.s.Layers().Wait()
	if all := w.s.Layers().List(); len(all) != 1 {
		t.Errorf("%d layers", len(all))
	}
	if held := w.leased(); len(held) > 0 {
		t.Errorf("under leases: %v", held)
	}
	if left, err := filepath.Glob(filepath.Join(w.root, "run/view-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := w.ours.Compare(w.ctx, lowerView, upperView, diff.WithReference("mine")); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// leased are the digests of blobs that any lease holds.
func (w *world) leased() (all []string) {
	w.t.Helper()
	list, err := w.leases.List(w.ctx)
	w.must(err)
	for _, l := range list {
		resources, err := w.leases.ListResources(w.ctx, l)
		w.must(err)
		for _, r := range resources {
			if r.Type == "content" {
				all = append(all, r.ID)
			}
		}
	}
	return all
}

// Layers share a lease for a while, and each is under it. Where somebody removes it, the next layer gets another one.
func TestLayersShareALease(t *testing.T) {
	w := newWorld(t, content.Python, lower.PageCacheShared)
	names := []string{w.commit("", plant)}
	for i := range 4 {
		names = append(names, w.commit(names[i], func(root string) {
			w.must(os.WriteFile(filepath.Join(root, "new"), []byte{byte(i)}, 0o600))
		}))
	}
	compare := func(ctx context.Context, i int) string {
		desc, err := w.ours.Compare(ctx, w.view(names[i]), w.view(names[i+1]))
		w.must(err)
		return desc.Digest.String()
	}
	want := []string{compare(w.ctx, 0), compare(w.ctx, 1)}
	list, err := w.leases.List(w.ctx)
	w.must(err)
	slices.Sort(want)
	if got := w.leased(); len(list) != 1 || !slices.Equal(slices.Sorted(slices.Values(got)), want) {
		t.Errorf("%d leases hold %v, want one that holds %v", len(list), got, want)
	}
	if text := list[0].Labels["containerd.io/gc.expire"]; !after(t, text, leaseTime) {
		t.Errorf("it expires at %s", text)
	}
	if until := w.ours.shared["test"].until; until != until.Round(0) { // containerd counts time that a machine slept
		t.Errorf("it is shared until %s, by a clock that stands still while the machine sleeps", until)
	}
	w.must(w.leases.Delete(w.ctx, list[0]))
	last := compare(w.ctx, 2)
	if got := w.leased(); !slices.Equal(got, []string{last}) {
		t.Errorf("leases hold %v, want %s", got, last)
	}
	own, err := w.leases.Create(w.ctx, leases.WithID("own"))
	w.must(err)
	mine := compare(leases.WithLease(w.ctx, own.ID), 3)
	resources, err := w.leases.ListResources(w.ctx, own)
	if w.must(err); len(resources) != 1 || resources[0].ID != mine {
		t.Errorf("the caller's lease holds %v, want %s", resources, mine)
	}
}

func after(t *testing.T, text string, least time.Duration) bool {
	t.Helper()
	at, err := time.Parse(time.RFC3339, text)
	return err == nil && time.Until(at) > least
}
