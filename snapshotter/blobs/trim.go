package blobs

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

const (
	// LabelBlobs with the value "keep", on an image or on the blob of its manifest or index, keeps the image's blobs.
	LabelBlobs = "dedup-snapshotter.io/blobs"
	keepBlobs  = "keep"
	// LabelWanted, on a layer's blob, is until when somebody wants the blob itself (RFC 3339).
	LabelWanted = "dedup-snapshotter.io/wanted-until"
	// WantedFor is how long a blob is left alone that was fetched although its layer was there.
	WantedFor = time.Hour
	// inUse is why blobs stay that a lease holds: of a pull or a build that goes on, say.
	inUse = "in use: a lease holds it"
	// beingRead is why blobs stay that a push or an export may need in a moment.
	beingRead = "in use: it is being read"
	// leasePrefix begins the names of our own leases.
	leasePrefix = "dedup-trim-"
	// labelSource is what clients put on a blob that a registry has: the host and the repository follow.
	labelSource = "containerd.io/distribution.source."
)

const (
	// settleFor is how long the daemon leaves the blobs of a pull alone after its end.
	settleFor = 10 * time.Second
	// pullSlack is how much later than the last layer a blob of the same pull may come.
	pullSlack = 30 * time.Second
	// quietManifest is how long nobody may have read a manifest or config before the blobs go: a push or an export
	// that has opened its manifest opens the first layer sooner.
	quietManifest = 5 * time.Second
	// quietShort and quietLong are how long nobody may have read a layer of the image: a push that lasts reads on. Who
	// asks for a trim waits for the short one, the daemon by itself for the long one.
	quietShort = 15 * time.Second
	quietLong  = 10 * time.Minute
	// holdFor bounds our own lease, which a kill may leave.
	holdFor = 10 * time.Minute
	// lookAgain is when the daemon looks again at what somebody uses right now.
	lookAgain = 30 * time.Second
	// collectTimeout bounds one garbage collection of containerd's.
	collectTimeout = 5 * time.Minute
)

// Stored tells of a layer, by the chainID that it ends in a namespace and its diffID, since when the store has it whole
// and on the disk; else an error that says why the layer needs its blob.
type Stored func(namespace string, chain content.ChainID, d content.DiffID) (since time.Time, err error)

// Trimmer lets go of blobs that no container needs: those of layers that the store holds. It takes the references off
// the manifests by which containerd's garbage collector keeps them, and asks for a collection. What anything else
// refers to stays, and so does what a lease holds: of two who want a blob, the one who keeps it wins.
//
// A push or an export that is under way needs them, too, and says so to nobody. So an image's blobs go only when nobody
// has read its manifest for some seconds, nor any of its layers for longer. While the references are off, a lease of
// ours holds the blobs, and nobody may have read them since the plan: else the references come back. Who opens the
// manifest later than that finds an image without blobs, as after any trim.
//
// A plan comes first, then its execution. A kill leaves references off, and blobs that a collection removes once the
// lease has expired.
type Trimmer struct {
	catalog *Catalog
	store   *Store
	stored  func(context.Context) (Stored, error)
	recipes Recipes // nil for none
	step    func(string)
	readers *readers

	executing sync.Mutex // one at a time
	kick      chan struct{}

	mu     sync.Mutex // guards what follows
	totals TrimTotals
}

// TrimTotals are what a Trimmer has let go of since the start, and how often it could not.
type TrimTotals struct {
	Blobs, Bytes, Errors int64
}

// TrimOptions say what Plan looks at.
type TrimOptions struct {
	Namespace string   // "" is all
	Images    []string // names; none is all
	// LastCopy: of the named images, also blobs that no registry is known to have.
	LastCopy bool
	// Settled leaves alone what came a moment ago, and what was read within minutes.
	Settled bool
	// Fetched lets go also of what was fetched for its own sake within the hour.
	Fetched bool
	// Survey says what could go, whoever reads it now.
	Survey bool
	// Wait is how long Settle waits for those who read.
	Wait time.Duration
	// NoRecipes keeps none of what goes.
	NoRecipes bool
}

// TrimImage is one manifest of a namespace with blobs in the content store, or named in the options.
type TrimImage struct {
	Namespace string
	Names     []string // sorted
	Manifest  digest.Digest
	Layers    int
	// Blobs and Bytes are the blobs that the image lets go; other images may still keep one.
	Blobs int
	Bytes int64
	// KeptBlobs and KeptBytes are those that it keeps, and Kept says why, of the first.
	KeptBlobs int
	KeptBytes int64
	Kept      string
	// Recipes are those of Blobs that went and can be made again.
	Recipes int

	refs  map[string]string // labels of the manifest that go, with their values
	image *Image
	again time.Time // when to look again; zero for never
	quiet time.Time // when it will have been read by nobody for long enough; zero where that is not why blobs stay
}

// TrimPlan is what would be let go of, or was.
type TrimPlan struct {
	Images []TrimImage // by namespace and name
	// Blobs and Bytes go from the disk: nothing in any namespace keeps them then.
	Blobs int
	Bytes int64

	going     map[digest.Digest]int64
	noRecipes bool
	again     time.Time
	at        time.Time // before anything was looked at
	// unseen is why nobody knows who reads blobs: then all stay.
	unseen error
}

// Recipes keep what it takes to make blobs again.
type Recipes interface {
	// MakeRecipe keeps a recipe of a blob with this tar. It takes a while, and gives up when ctx ends.
	MakeRecipe(ctx context.Context, d content.DiffID, b layer.Blob) error
}

// NewTrimmer lets go of what stored says the store can do without. recipes, if not nil, gets each blob before it goes.
// step may be nil; a test ends the process there.
func NewTrimmer(c *Catalog, s *Store, stored func(context.Context) (Stored, error), recipes Recipes,
	step func(string),
) *Trimmer {
	if step == nil {
		step = func(string) {}
	}
	return &Trimmer{catalog: c, store: s, stored: stored, recipes: recipes, step: step, kick: make(chan struct{}, 1),
		readers: newReaders(s.directory)}
}

// Totals returns what has gone since the start.
func (t *Trimmer) Totals() TrimTotals {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.totals
}

// Plan finds what can be let go of. It changes nothing.
func (t *Trimmer) Plan(ctx context.Context, opts TrimOptions) (plan TrimPlan, err error) {
	plan.at, plan.noRecipes = time.Now(), opts.NoRecipes
	plan.unseen = t.readers.look(ctx)
	graphs, err := t.catalog.graphs(ctx)
	if err != nil {
		return plan, err
	}
	stored, err := t.stored(ctx)
	if err != nil {
		return plan, err
	}
	p := planning{opts: opts, stored: stored, now: plan.at, readers: t.readers, unseen: plan.unseen}
	missing := slices.Clone(opts.Images)
	for _, g := range graphs {
		if opts.Namespace != "" && opts.Namespace != g.namespace {
			continue
		}
		found, err := t.store.Images(namespaces.WithNamespace(ctx, g.namespace))
		if err != nil {
			return plan, err
		}
		for _, i := range p.look(g, found) {
			missing = slices.DeleteFunc(missing, func(name string) bool { return slices.Contains(i.Names, name) })
			plan.Images = append(plan.Images, i)
			if !i.again.IsZero() && (plan.again.IsZero() || i.again.Before(plan.again)) {
				plan.again = i.again
			}
		}
	}
	if len(missing) > 0 {
		return plan, fmt.Errorf("no image %q whose manifest is in containerd's content store: %w", missing[0],
			errdefs.ErrNotFound)
	}
	slices.SortFunc(plan.Images, func(a, b TrimImage) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), slices.Compare(a.Names, b.Names),
			cmp.Compare(a.Manifest, b.Manifest))
	})
	plan.count(graphs)
	return plan, nil
}

// count finds what nothing keeps any more once the references are gone.
func (p *TrimPlan) count(graphs []*graph) {
	before := alive(graphs)
	for _, i := range p.Images {
		for _, g := range graphs {
			if n := g.blobs[i.Manifest]; g.namespace == i.Namespace && n != nil {
				n.refs = slices.DeleteFunc(slices.Clone(n.refs), func(d digest.Digest) bool {
					return slices.Contains(slices.Collect(maps.Values(i.refs)), d.String())
				})
			}
		}
	}
	after := alive(graphs)
	p.going = map[digest.Digest]int64{}
	for d, size := range before {
		if _, stays := after[d]; !stays {
			p.going[d] = size
			p.Blobs, p.Bytes = p.Blobs+1, p.Bytes+size
		}
	}
}

// alive returns the blobs that something keeps, with what they occupy.
func alive(graphs []*graph) map[digest.Digest]int64 {
	all := map[digest.Digest]int64{}
	for _, g := range graphs {
		lists := g.kept()
		for target := range g.images {
			lists = append(lists, g.reach(target))
		}
		for _, list := range lists {
			for _, d := range list {
				all[d] = g.blobs[d].size
			}
		}
	}
	return all
}

// planning looks at the images of one namespace after the other.
type planning struct {
	opts    TrimOptions
	stored  Stored
	readers *readers
	unseen  error // why readers knows nothing
	now     time.Time
}

func (p planning) look(g *graph, found []*Image) (list []TrimImage) {
	names, marked, leased := map[digest.Digest][]string{}, map[digest.Digest]bool{}, map[digest.Digest]bool{}
	for target, all := range g.images {
		for _, d := range g.reach(target) {
			names[d] = append(names[d], all...)
			marked[d] = marked[d] || g.marked[target] || g.blobs[target].Labels[LabelBlobs] == keepBlobs
		}
	}
	for _, l := range g.leases {
		for _, d := range g.leased(l) {
			leased[d] = true
		}
	}
	for _, img := range found {
		m, named := g.blobs[img.Manifest], names[img.Manifest]
		wanted := func(name string) bool { return slices.Contains(p.opts.Images, name) }
		if m == nil || len(named) == 0 || len(p.opts.Images) > 0 && !slices.ContainsFunc(named, wanted) {
			continue
		}
		slices.Sort(named)
		i := TrimImage{Namespace: g.namespace, Names: slices.Compact(named), Manifest: img.Manifest, Layers: len(img.Layers),
			refs: map[string]string{}, image: img}
		var whole string
		switch config := g.blobs[img.Config]; {
		case config == nil || !slices.Contains(config.chains, img.Chains[len(img.Chains)-1]):
			whole = "not unpacked by dedup"
		case marked[img.Manifest] || m.Labels[LabelBlobs] == keepBlobs:
			whole = "marked: label " + LabelBlobs + "=" + keepBlobs
		case len(config.others) > 0:
			whole = "unpacked by " + strings.Join(config.others, ", ") + " too"
		case leased[img.Manifest]:
			whole, i.again = inUse, p.now.Add(lookAgain)
		}
		if whole == "" {
			whole = p.busy(g, &i)
		}
		p.blobs(g, m, &i, whole, leased)
		if i.Blobs+i.KeptBlobs > 0 || len(p.opts.Images) > 0 {
			list = append(list, i)
		}
	}
	return list
}

// blobs decides on each blob of an image. whole is why all stay, or ""; those that are leased stay by themselves.
func (p planning) blobs(g *graph, manifest *node, i *TrimImage, whole string, leased map[digest.Digest]bool) {
	seen := map[digest.Digest]bool{}
	var since, newest time.Time
	var going []*node
	newest = manifest.UpdatedAt
	for at, desc := range i.image.Layers {
		n := g.blobs[desc.Digest]
		if n == nil || seen[desc.Digest] || !slices.Contains(manifest.refs, desc.Digest) {
			continue // it is not there, or nothing of this image keeps it
		}
		seen[desc.Digest] = true
		from, why := p.layer(g.namespace, i.image, at, n)
		if leased[desc.Digest] {
			why, i.again = inUse, p.now.Add(lookAgain)
		}
		if why = cmp.Or(whole, why); why != "" {
			i.KeptBlobs, i.KeptBytes, i.Kept = i.KeptBlobs+1, i.KeptBytes+n.size, cmp.Or(i.Kept, why)
			continue
		}
		going = append(going, n)
		since, newest = later(since, from), later(newest, n.CreatedAt)
	}
	last := len(i.image.Chains) - 1
	if top, err := p.stored(g.namespace, i.image.Chains[last], i.image.DiffIDs[last]); err == nil {
		since = later(since, top)
	}
	why := p.unsettled(i, going, since, newest)
	for _, n := range going {
		if why != "" {
			i.KeptBlobs, i.KeptBytes, i.Kept = i.KeptBlobs+1, i.KeptBytes+n.size, cmp.Or(i.Kept, why)
			continue
		}
		i.Blobs, i.Bytes = i.Blobs+1, i.Bytes+n.size
		for key, value := range manifest.Labels {
			if strings.HasPrefix(key, labelContent) && value == n.Digest.String() {
				i.refs[key] = value
			}
		}
	}
}

// layer says since when the store has a layer, and why its blob stays; "" when it need not.
func (p planning) layer(namespace string, img *Image, at int, blob *node) (since time.Time, why string) {
	if !archive.KnownMediaType(img.Layers[at].MediaType) {
		return since, "of a type that dedup does not unpack"
	}
	since, err := p.stored(namespace, img.Chains[at], img.DiffIDs[at])
	if err != nil {
		return since, err.Error()
	}
	fromRegistry := false
	for key := range blob.Labels {
		fromRegistry = fromRegistry || strings.HasPrefix(key, labelSource)
	}
	if !fromRegistry && !(p.opts.LastCopy && len(p.opts.Images) > 0) {
		return since, "the last copy: no registry is known to have it"
	}
	return since, ""
}

// busy says why a push or an export of the image may be under way; "" when none is.
func (p planning) busy(g *graph, i *TrimImage) string {
	if p.opts.Survey {
		return ""
	}
	if p.unseen != nil {
		return p.unseen.Error()
	}
	for d, quiet := range i.reads(p.opts.Settled) {
		var created time.Time
		if n := g.blobs[d]; n != nil {
			created = n.CreatedAt
		}
		if at := p.readers.last(d, created); !at.IsZero() {
			i.quiet = later(i.quiet, at.Add(quiet))
		}
	}
	if !p.now.Before(i.quiet) {
		i.quiet = time.Time{}
		return ""
	}
	i.again = i.quiet
	return beingRead
}

// reads returns what a push or an export of the image reads, and how long nobody may have done so.
func (i *TrimImage) reads(long bool) map[digest.Digest]time.Duration {
	quiet := quietShort
	if long {
		quiet = quietLong
	}
	all := map[digest.Digest]time.Duration{}
	for _, l := range i.image.Layers {
		all[l.Digest] = quiet
	}
	all[i.Manifest], all[i.image.Config] = quietManifest, quietManifest
	return all
}

// unsettled says why blobs whose layers were all there at since stay for a while.
func (p planning) unsettled(i *TrimImage, going []*node, since, newest time.Time) string {
	if len(going) == 0 {
		return ""
	}
	var wanted, arrived time.Time
	for _, n := range going {
		arrived = later(arrived, n.CreatedAt)
		if until, err := time.Parse(time.RFC3339, n.Labels[LabelWanted]); err == nil {
			wanted = later(wanted, until)
		}
	}
	if p.opts.Settled {
		arrived = newest // a manifest that was pulled again counts, too
	}
	if arrived.After(since.Add(pullSlack)) {
		wanted = later(wanted, arrived.Add(WantedFor))
	}
	switch settled := later(since, newest).Add(settleFor); {
	case p.now.Before(wanted) && !p.opts.Fetched:
		i.again = wanted
		return "it was fetched for its own sake within the last hour"
	case p.now.Before(settled) && p.opts.Settled:
		i.again = settled
		return "it came a moment ago"
	}
	return ""
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Settle plans, and plans again for as long as opts.Wait says while somebody reads what would go otherwise.
func (t *Trimmer) Settle(ctx context.Context, opts TrimOptions) (plan TrimPlan, err error) {
	for end := time.Now().Add(opts.Wait); ; {
		if plan, err = t.Plan(ctx, opts); err != nil {
			return plan, err
		}
		var quiet time.Time
		for _, i := range plan.Images {
			if !i.quiet.IsZero() && !i.quiet.After(end) {
				quiet = later(quiet, i.quiet)
			}
		}
		if quiet.IsZero() {
			return plan, nil
		}
		select {
		case <-ctx.Done():
			return plan, context.Cause(ctx)
		case <-time.After(time.Until(quiet)):
		}
	}
}
