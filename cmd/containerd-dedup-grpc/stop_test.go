package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// stuck is a content store that gives nothing of a blob until it is told to.
type stuck struct {
	ctdcontent.Store
	asked, told chan struct{}
	ask         *sync.Once
}

func (s stuck) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ctdcontent.ReaderAt, error) {
	s.ask.Do(func() { close(s.asked) })
	select {
	case <-s.told:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return s.Store.ReaderAt(ctx, desc)
}

// serveBlob is a containerd whose content store has one blob, and is stuck.
func serveBlob(t *testing.T, address, file string, desc ocispec.Descriptor) stuck {
	t.Helper()
	files, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err == nil {
		err = ctdcontent.WriteBlob(t.Context(), files, "layer", bytes.NewReader(data), desc)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := stuck{files, make(chan struct{}), make(chan struct{}), new(sync.Once)}
	server := grpc.NewServer()
	contentapi.RegisterContentServer(server, contentserver.New(s))
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	return s
}

// A stop in the middle of a pull does not wait for the layer: its client is told why, nothing is left of it, and the
// next daemon stores it.
func TestStopDuringApply(t *testing.T) {
	c := testConfig(t)
	c.ContainerdAddress = filepath.Join(t.TempDir(), "containerd.sock")
	layer, err := image.FromEntries(t.TempDir(), image.LayerOptions{}, image.File("f", strings.Repeat("content", 10000)))
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{MediaType: string(layer.Media), Digest: digest.Digest(layer.Hash.String()),
		Size: layer.Length}
	store := serveBlob(t, c.ContainerdAddress, layer.File, desc)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	apply := func(mounts []*types.Mount) error {
		_, err := diffapi.NewDiffClient(conn).Apply(ctx, &diffapi.ApplyRequest{Mounts: mounts, Diff: &types.Descriptor{
			MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}}, grpc.WaitForReady(true))
		return err
	}

	stop := start(t, c)
	made, err := snapshotsapi.NewSnapshotsClient(conn).Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Key: "extract-1"})
	if err != nil {
		t.Fatal(err)
	}
	applied := make(chan error, 1)
	go func() { applied <- apply(made.Mounts) }()
	<-store.asked
	if err := stop(); err != nil {
		t.Error(err)
	}
	err = <-applied
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "is stopping") {
		t.Errorf("the client is told %v", err)
	}
	for _, dir := range []string{"packs", "layers", "ingest"} {
		if left, err := os.ReadDir(filepath.Join(c.Root, dir)); err != nil || len(left) > 0 {
			t.Errorf("%s holds %v, %v", dir, left, err)
		}
	}

	close(store.told)
	stop = start(t, c)
	if err := apply(made.Mounts); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// checking is a control service whose check runs until its context ends.
type checking struct {
	dedupv1.UnimplementedControlServer
	began chan struct{}
}

func (c checking) Check(_ *dedupv1.CheckRequest, stream grpc.ServerStreamingServer[dedupv1.CheckResponse]) error {
	close(c.began)
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (c checking) GC(ctx context.Context, _ *dedupv1.GCRequest) (*dedupv1.GCResponse, error) {
	return &dedupv1.GCResponse{}, ctx.Err()
}

// A check ends with the stop; a call that is soon done goes on.
func TestStopDuringCheck(t *testing.T) {
	stopping, stop := context.WithCancel(t.Context())
	until := untilStop{stopping}
	server := grpc.NewServer(grpc.UnaryInterceptor(until.unary), grpc.StreamInterceptor(until.stream))
	service := checking{began: make(chan struct{})}
	dedupv1.RegisterControlServer(server, service)
	address := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := dedupv1.NewControlClient(conn)
	check, err := client.Check(t.Context(), &dedupv1.CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	<-service.began
	stop()
	if _, err := check.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "is stopping") {
		t.Errorf("the client is told %v", err)
	}
	if _, err := client.GC(t.Context(), &dedupv1.GCRequest{}); err != nil {
		t.Error(err)
	}
}
