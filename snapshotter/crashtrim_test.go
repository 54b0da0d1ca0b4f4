package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// crashContainerd is what a Trimmer needs of containerd: its own metadata, content store and garbage collector, which
// die with the process. Its services below are as thin as containerd's.
type crashContainerd struct {
	root   string
	db     *metadata.DB
	images images.Store
	leases leases.Manager
}

type (
	crashImages struct {
		imagesapi.UnimplementedImagesServer
		*crashContainerd
	}
	crashLeases struct {
		leasesapi.UnimplementedLeasesServer
		*crashContainerd
	}
	crashSpaces struct {
		namespacesapi.UnimplementedNamespacesServer
	}
	crashPlugins struct {
		introspection.UnimplementedIntrospectionServer
		*crashContainerd
	}
)

const crashSocket = "/crash/dedup.sock"

// startCrashContainerd serves what lies in root until stop.
func startCrashContainerd(ctx context.Context, root string) (
	conn *grpc.ClientConn, c *crashContainerd, stop func() error, err error,
) {
	files, err := local.NewStore(root)
	if err != nil {
		return nil, nil, nil, err
	}
	bolt, err := bbolt.Open(filepath.Join(root, "meta.db"), 0o600, nil)
	if err != nil {
		return nil, nil, nil, err
	}
	db := metadata.NewDB(bolt, files, nil)
	if err := db.Init(ctx); err != nil {
		return nil, nil, nil, errors.Join(err, bolt.Close())
	}
	c = &crashContainerd{root: root, db: db, images: metadata.NewImageStore(db), leases: metadata.NewLeaseManager(db)}
	server := grpc.NewServer(grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			return handle(namespaces.WithNamespace(ctx, "crash"), req)
		}))
	imagesapi.RegisterImagesServer(server, crashImages{crashContainerd: c})
	leasesapi.RegisterLeasesServer(server, crashLeases{crashContainerd: c})
	introspection.RegisterIntrospectionServer(server, crashPlugins{crashContainerd: c})
	namespacesapi.RegisterNamespacesServer(server, crashSpaces{})
	contentapi.RegisterContentServer(server, contentserver.New(db.ContentStore()))
	listener := bufconn.Listen(1 << 20)
	go func() { _ = server.Serve(listener) }()
	conn, err = grpc.NewClient("passthrough:crash", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	stop = func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, bolt.Close())
	}
	return conn, c, stop, err
}

func (c crashImages) List(ctx context.Context, _ *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	list, err := c.images.List(ctx)
	r := &imagesapi.ListImagesResponse{}
	for _, i := range list {
		target := &types.Descriptor{Digest: i.Target.Digest.String()}
		r.Images = append(r.Images, &imagesapi.Image{Name: i.Name, Target: target})
	}
	return r, err
}

func (crashSpaces) List(context.Context, *namespacesapi.ListNamespacesRequest) (
	*namespacesapi.ListNamespacesResponse, error,
) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "crash"}}}, nil
}

func (c crashPlugins) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: []*introspection.Plugin{
		{ID: "dedup", Exports: map[string]string{"address": crashSocket}},
		{ID: "content", Exports: map[string]string{"root": c.root}},
	}}, nil
}

func (c crashLeases) List(ctx context.Context, _ *leasesapi.ListRequest) (*leasesapi.ListResponse, error) {
	list, err := c.leases.List(ctx)
	r := &leasesapi.ListResponse{}
	for _, l := range list {
		r.Leases = append(r.Leases, &leasesapi.Lease{ID: l.ID, Labels: l.Labels})
	}
	return r, err
}

func (c crashLeases) Create(ctx context.Context, req *leasesapi.CreateRequest) (*leasesapi.CreateResponse, error) {
	l, err := c.leases.Create(ctx, leases.WithID(req.ID), leases.WithLabels(req.Labels))
	return &leasesapi.CreateResponse{Lease: &leasesapi.Lease{ID: l.ID}}, err
}

func (c crashLeases) AddResource(ctx context.Context, req *leasesapi.AddResourceRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, c.leases.AddResource(ctx, leases.Lease{ID: req.ID},
		leases.Resource{ID: req.Resource.ID, Type: req.Resource.Type})
}

// ListResources is asked for what a lease holds that a killed process left.
func (c crashLeases) ListResources(ctx context.Context, req *leasesapi.ListResourcesRequest) (
	*leasesapi.ListResourcesResponse, error) {
	list, err := c.leases.ListResources(ctx, leases.Lease{ID: req.ID})
	r := &leasesapi.ListResourcesResponse{}
	for _, l := range list {
		r.Resources = append(r.Resources, &leasesapi.Resource{ID: l.ID, Type: l.Type})
	}
	return r, err
}

func (c crashLeases) Delete(ctx context.Context, req *leasesapi.DeleteRequest) (*emptypb.Empty, error) {
	err := c.leases.Delete(ctx, leases.Lease{ID: req.ID})
	if err == nil && req.Sync {
		_, err = c.db.GarbageCollect(ctx)
	}
	return &emptypb.Empty{}, err
}

// image puts an image of one layer into the content store, as a pull leaves it.
func (c *crashContainerd) image(ctx context.Context, name string, blob []byte) (layer ocispec.Descriptor, err error) {
	write := func(mediaType string, data []byte, labels map[string]string) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		err = errors.Join(err, ctdcontent.WriteBlob(ctx, c.db.ContentStore(), name+desc.Digest.String(),
			bytes.NewReader(data), desc, ctdcontent.WithLabels(labels)))
		return desc
	}
	_, done, err := c.leased(ctx, name)
	if err != nil {
		return layer, err
	}
	layer = write(ocispec.MediaTypeImageLayer, blob, map[string]string{"containerd.io/distribution.source.registry": name})
	diffIDs := []digest.Digest{layer.Digest}
	config, jerr := json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}})
	err = errors.Join(err, jerr)
	configDesc := write(ocispec.MediaTypeImageConfig, config, map[string]string{
		"containerd.io/gc.ref.snapshot.dedup": identity.ChainID(diffIDs).String()})
	manifest, jerr := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest, Config: configDesc, Layers: []ocispec.Descriptor{layer},
		Annotations: map[string]string{"name": name}}) // another one in each round: a trim takes references off it
	err = errors.Join(err, jerr)
	target := write(ocispec.MediaTypeImageManifest, manifest, map[string]string{
		"containerd.io/gc.ref.content.config": configDesc.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    layer.Digest.String()})
	_, cerr := c.images.Create(ctx, images.Image{Name: name, Target: target})
	return layer, errors.Join(err, cerr, done())
}

// leased is a lease whose end has nothing collected.
func (c *crashContainerd) leased(ctx context.Context, id string) (leases.Lease, func() error, error) {
	l, err := c.leases.Create(ctx, leases.WithID("pull-"+id))
	return l, func() error { return c.leases.Delete(ctx, l) }, err
}

// trim lets go of the blob of the layer that pullKnown has pulled, by containerd's own garbage collection.
func (c *crashChild) trim(ctx context.Context) (err error) {
	dir := filepath.Join(c.root, "containerd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	conn, ctd, stop, err := startCrashContainerd(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	store := blobs.New(contentproxy.NewContentStore(conn), introspection.NewIntrospectionClient(conn))
	stored := func(ctx context.Context) (blobs.Stored, error) { return StoredLayers(ctx, c.s) }
	recipes := KeepRecipes(func() *Snapshotter { return c.s })
	trimmer := blobs.NewTrimmer(blobs.NewCatalog(conn, crashSocket), store, stored, recipes, c.hook)
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755); err != nil {
		return err
	}
	watched, stopWatch := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); trimmer.Watch(watched) }()
	defer func() { stopWatch(); <-ended }()
	if _, err := trimmer.Plan(ctx, blobs.TrimOptions{}); err != nil { // from now on it is known who reads
		return err
	}
	name := fmt.Sprintf("image-%s-%d", c.round, c.n)
	desc, err := ctd.image(ctx, name, c.known)
	if err != nil {
		return err
	}
	plan, err := trimmer.Plan(ctx, blobs.TrimOptions{Images: []string{name}})
	if err != nil {
		return err
	}
	if plan.Blobs != 1 {
		return fmt.Errorf("of %s %d blobs can go: %+v", name, plan.Blobs, plan.Images)
	}
	if plan, err = trimmer.Execute(ctx, plan); err != nil || plan.Blobs != 1 {
		return fmt.Errorf("of %s %d blobs went: %w", name, plan.Blobs, err)
	}
	if _, err := ctd.db.ContentStore().Info(ctx, desc.Digest); !errdefs.IsNotFound(err) {
		return fmt.Errorf("the blob of %s is there, or not: %w", name, err)
	}
	return nil
}
