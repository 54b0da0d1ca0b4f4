package blobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Labels by which containerd's garbage collector goes from one thing to what it keeps.
const (
	labelRoot     = "containerd.io/gc.root"
	labelContent  = "containerd.io/gc.ref.content"
	labelSnapshot = "containerd.io/gc.ref.snapshot."
	labelExpire   = "containerd.io/gc.expire"
	labelFlat     = "containerd.io/gc.flat"
	labelBack     = "containerd.io/gc.bref."
)

// Catalog lists images as containerd's garbage collector sees them: what each of them keeps from being removed.
// It reads labels alone, no manifest.
type Catalog struct {
	images     imagesapi.ImagesClient
	namespaces namespacesapi.NamespacesClient
	content    ctdcontent.Store
	plugins    introspection.IntrospectionClient
	leases     leasesapi.LeasesClient
	version    versionapi.VersionClient
	snapshots  snapshotsapi.SnapshotsClient
	address    string
}

// NewCatalog asks the containerd behind conn for what it keeps with the snapshotter that listens on address.
func NewCatalog(conn grpc.ClientConnInterface, address string) *Catalog {
	return &Catalog{
		images:     imagesapi.NewImagesClient(conn),
		namespaces: namespacesapi.NewNamespacesClient(conn),
		content:    contentproxy.NewContentStore(conn),
		plugins:    introspection.NewIntrospectionClient(conn),
		leases:     leasesapi.NewLeasesClient(conn),
		version:    versionapi.NewVersionClient(conn),
		snapshots:  snapshotsapi.NewSnapshotsClient(conn),
		address:    address,
	}
}

// Unpacked is one image of a namespace, under all its names there, whose files the snapshotter has.
type Unpacked struct {
	Namespace string
	Names     []string // sorted
	Target    digest.Digest
	Chains    []content.ChainID // a snapshot for each platform that was unpacked
	// Blobs are the bytes in the content store that the image leads to, FreedBlobs those that nothing else does
	// in any namespace, and so go with the image; both rounded up to blocks of 4 KiB.
	Blobs, FreedBlobs int64
}

// Leased is what leases of a namespace keep beside images: those of a build, or of a pull that was killed.
type Leased struct {
	Namespace string
	Chains    []content.ChainID
}

// ErrNoPlugin is wrapped where containerd does not know the snapshotter.
var ErrNoPlugin = errors.New("containerd has no snapshot plugin with this socket")

// Images returns the images of all namespaces, sorted by namespace and name, and what else is kept.
func (c *Catalog) Images(ctx context.Context) ([]Unpacked, []Leased, error) {
	graphs, err := c.graphs(ctx)
	if err != nil {
		return nil, nil, err
	}
	var leased []Leased
	for _, g := range graphs {
		leased = append(leased, Leased{g.namespace, g.leasedChains()})
	}
	return unpacked(graphs), leased, nil
}

// graphs reads the labels of all namespaces.
func (c *Catalog) graphs(ctx context.Context) (all []*graph, err error) {
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	plugins, err := c.snapshotters(short)
	if err != nil {
		return nil, c.explain(ctx, short, err)
	}
	if len(plugins) == 0 {
		return nil, fmt.Errorf("%w: %s; see dedupctl config containerd", ErrNoPlugin, c.address)
	}
	spaces, err := c.namespaces.List(short, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, c.explain(ctx, short, errgrpc.ToNative(err))
	}
	for _, ns := range spaces.Namespaces {
		g, err := c.read(ctx, ns.Name, plugins)
		if err != nil {
			return nil, fmt.Errorf("images of namespace %s: %w", ns.Name, err)
		}
		all = append(all, g)
	}
	return all, nil
}

func (c *Catalog) explain(ctx, short context.Context, err error) error {
	if short.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("containerd does not answer on containerd_address: set it in the daemon's config to the socket "+
			"of the containerd that calls: %w", err)
	}
	return fmt.Errorf("ask containerd: %w", err)
}

// Remind has containerd look at its record of a chain, in the caller's namespace: it asks the snapshotter in turn,
// by the name that it has for it. errdefs.ErrNotFound where it has no record.
func (c *Catalog) Remind(ctx context.Context, chain content.ChainID) error {
	ctx, _, err := outgoing(ctx)
	if err != nil {
		return err
	}
	plugins, err := c.snapshotters(ctx)
	for _, name := range plugins {
		_, serr := c.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: name, Key: chain.Digest().String()})
		err = errors.Join(err, errgrpc.ToNative(serr))
	}
	return err
}

// Version returns the version of the containerd.
func (c *Catalog) Version(ctx context.Context) (string, error) {
	short, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	r, err := c.version.Version(short, &emptypb.Empty{})
	if err != nil {
		return "", c.explain(ctx, short, errgrpc.ToNative(err))
	}
	return r.Version, nil
}

// snapshotters returns the names under which containerd knows the snapshotter.
func (c *Catalog) snapshotters(ctx context.Context) ([]string, error) {
	resp, err := c.plugins.Plugins(ctx,
		&introspection.PluginsRequest{Filters: []string{"type==io.containerd.snapshotter.v1"}})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	var names []string
	for _, p := range resp.Plugins {
		if address, ok := p.Exports["address"]; ok && filepath.Clean(address) == filepath.Clean(c.address) {
			names = append(names, p.ID)
		}
	}
	return names, nil
}

// graph is what containerd's labels say in one namespace.
type graph struct {
	namespace string
	images    map[digest.Digest][]string // target -> names
	marked    map[digest.Digest]bool     // targets of images that somebody marked to keep
	blobs     map[digest.Digest]*node
	leases    []lease
}

// lease keeps what it names, and, unless it is flat, what that leads to.
type lease struct {
	flat   bool
	blobs  []digest.Digest
	chains []content.ChainID
}

type node struct {
	ctdcontent.Info
	size   int64
	root   bool // stays by itself
	refs   []digest.Digest
	chains []content.ChainID
	others []string // snapshotters beside ours that have unpacked it
}

func (c *Catalog) read(ctx context.Context, namespace string, plugins []string) (*graph, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	g := &graph{namespace: namespace, images: map[digest.Digest][]string{}, marked: map[digest.Digest]bool{},
		blobs: map[digest.Digest]*node{}}
	list, err := c.images.List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	for _, img := range list.Images {
		target := digest.Digest(img.GetTarget().GetDigest())
		g.images[target] = append(g.images[target], img.Name)
		if img.Labels[LabelBlobs] == keepBlobs {
			g.marked[target] = true
		}
	}
	err = c.content.Walk(ctx, func(info ctdcontent.Info) error {
		g.blobs[info.Digest] = readNode(info, plugins)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return g, c.readLeases(ctx, g, plugins)
}

// readLeases reads the leases that have not expired, and are not of the Trimmer itself.
func (c *Catalog) readLeases(ctx context.Context, g *graph, plugins []string) error {
	list, err := c.leases.List(ctx, &leasesapi.ListRequest{})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	for _, l := range list.Leases {
		if strings.HasPrefix(l.ID, leasePrefix) {
			continue
		}
		if until, err := time.Parse(time.RFC3339, l.Labels[labelExpire]); err == nil && until.Before(time.Now()) {
			continue
		}
		resources, err := c.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: l.ID})
		if status.Code(err) == codes.NotFound {
			continue // it has gone meanwhile
		}
		if err != nil {
			return errgrpc.ToNative(err)
		}
		_, flat := l.Labels[labelFlat]
		kept := lease{flat: flat}
		for _, r := range resources.Resources {
			kept.add(r, g, plugins)
		}
		g.leases = append(g.leases, kept)
	}
	return nil
}

func (l *lease) add(r *leasesapi.Resource, g *graph, plugins []string) {
	kind, name, _ := strings.Cut(r.Type, "/")
	switch kind {
	case "content":
		l.blobs = append(l.blobs, digest.Digest(r.ID))
	case "images":
		for target, names := range g.images {
			if slices.Contains(names, r.ID) {
				l.blobs = append(l.blobs, target)
			}
		}
	case "snapshots":
		if sum, err := content.ParseSum(r.ID); err == nil && slices.Contains(plugins, name) {
			l.chains = append(l.chains, content.ChainID{Sum: sum})
		}
	}
}

// leased returns the blobs that a lease keeps.
func (g *graph) leased(l lease) (found []digest.Digest) {
	for _, d := range l.blobs {
		if !l.flat {
			found = append(found, g.reach(d)...)
		} else if g.blobs[d] != nil {
			found = append(found, d)
		}
	}
	return found
}

// kept returns what stays without any image, one list for each thing that keeps it.
func (g *graph) kept() (lists [][]digest.Digest) {
	for d, n := range g.blobs {
		if n.root {
			lists = append(lists, g.reach(d))
		}
	}
	for _, l := range g.leases {
		lists = append(lists, g.leased(l))
	}
	return lists
}

func (g *graph) leasedChains() (chains []content.ChainID) {
	for _, l := range g.leases {
		chains = append(chains, l.chains...)
		if l.flat {
			continue
		}
		for _, d := range g.leased(l) {
			chains = append(chains, g.blobs[d].chains...)
		}
	}
	return chains
}

func readNode(info ctdcontent.Info, plugins []string) *node {
	n := &node{Info: info, size: content.Blocks(info.Size)}
	for key, value := range info.Labels {
		rest, isRef := strings.CutPrefix(key, labelContent)
		name, isSnapshot := strings.CutPrefix(key, labelSnapshot)
		switch {
		case key == labelRoot, strings.HasPrefix(key, labelBack):
			n.root = true
		case key == labelExpire:
			until, err := time.Parse(time.RFC3339, value)
			n.root = n.root || err == nil && until.After(time.Now())
		case isRef && (rest == "" || rest[0] == '.' || rest[0] == '/'):
			n.refs = append(n.refs, digest.Digest(value))
		case isSnapshot:
			name, _, _ = strings.Cut(name, "/")
			sum, err := content.ParseSum(value)
			switch ours := slices.Contains(plugins, name); {
			case !ours && !slices.Contains(n.others, name):
				n.others = append(n.others, name)
			case ours && err == nil:
				n.chains = append(n.chains, content.ChainID{Sum: sum})
			}
		}
	}
	slices.Sort(n.others)
	return n
}

// reach returns the blobs that one leads to, itself included, as far as they are there.
func (g *graph) reach(from digest.Digest) []digest.Digest {
	seen := map[digest.Digest]bool{}
	var found []digest.Digest
	for todo := []digest.Digest{from}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		n := g.blobs[d]
		if n == nil || seen[d] {
			continue
		}
		seen[d] = true
		found = append(found, d)
		todo = append(todo, n.refs...)
	}
	return found
}

// unpacked finds the images with snapshots, and counts how many images of all namespaces lead to each blob: the
// namespaces share the files of the content store.
func unpacked(graphs []*graph) []Unpacked {
	leads := map[digest.Digest]int{}
	var list []Unpacked
	var reached [][]digest.Digest
	for _, g := range graphs {
		for target, names := range g.images {
			u := Unpacked{Namespace: g.namespace, Names: slices.Sorted(slices.Values(names)), Target: target}
			blobs := g.reach(target)
			for _, d := range blobs {
				leads[d]++
				u.Blobs += g.blobs[d].size
				u.Chains = append(u.Chains, g.blobs[d].chains...)
			}
			if len(u.Chains) > 0 {
				list, reached = append(list, u), append(reached, blobs)
			}
		}
		for _, found := range g.kept() {
			for _, d := range found {
				leads[d]++
			}
		}
	}
	sizes := func(d digest.Digest) (size int64) {
		for _, g := range graphs {
			if n := g.blobs[d]; n != nil {
				size = n.size
			}
		}
		return size
	}
	for i := range list {
		for _, d := range reached[i] {
			if leads[d] == 1 {
				list[i].FreedBlobs += sizes(d)
			}
		}
	}
	slices.SortFunc(list, func(a, b Unpacked) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), slices.Compare(a.Names, b.Names))
	})
	return list
}
