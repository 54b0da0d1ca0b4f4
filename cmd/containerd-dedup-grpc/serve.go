package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/apply"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/compare"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/control"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/source"
)

// serve runs until ctx ends. All wiring is here.
func serve(ctx context.Context, c Config) (err error) {
	// What the daemon creates is root's alone; modes that matter are set explicitly.
	unix.Umask(0o077)
	listener, err := listen(c.Address)
	if err != nil {
		return err
	}
	defer listener.Close()
	// It connects when it is first used, and again whenever containerd has been away.
	conn, err := grpc.NewClient("unix://"+c.ContainerdAddress,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.WaitForReady(true)))
	if err != nil {
		return fmt.Errorf("containerd_address: %w", err)
	}
	defer conn.Close()
	catalog := blobs.NewCatalog(conn, c.Address)
	found := blobs.New(contentproxy.NewContentStore(conn), introspection.NewIntrospectionClient(conn))

	sn, trimmer, err := openStore(ctx, c, found, catalog)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	log.G(ctx).Infof("fs-verity: %s; page cache: %s", sn.VerityState(), sn.PageCache())

	defer runUntilClosed(ctx, trimmer.Watch)()
	if c.Blobs == blobsDrop {
		defer runUntilClosed(ctx, trimmer.Run)()
	}
	calls := newCalls()
	stop, err := serveObservers(ctx, c, calls, collector{sn, trimmer, c.Root})
	if err != nil {
		return err
	}
	defer stop()
	until := untilStop{ctx}
	server := grpc.NewServer(
		grpc.ChainUnaryInterceptor(calls.unary, until.unary, recoverUnary),
		grpc.ChainStreamInterceptor(calls.stream, until.stream, recoverStream),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize))
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	applier := apply.New(sn, found)
	defer applier.Close()
	diffapi.RegisterDiffServer(server, diffservice.FromApplierAndComparer(applier, newComparer(sn, conn)))
	made := source.New(sn.Layers())
	defer func() { err = errors.Join(err, made.Close()) }()
	contentapi.RegisterContentServer(server, made.Server())
	dedupv1.RegisterControlServer(server, control.New(sn, control.Options{
		Version: version, Root: c.Root, Fidelity: c.Fidelity, Reuse: c.Reuse,
		RunDir: c.RunDir, ContainerdAddress: c.ContainerdAddress,
		Catalog: catalog, Blobs: c.Blobs, Trimmer: trimmer, Found: found,
	}))

	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	log.G(ctx).WithFields(log.Fields{"version": version, "root": c.Root, "address": c.Address, "fidelity": c.Fidelity,
		"reuse": c.Reuse, "blobs": c.Blobs}).Info("serving")
	notify(ctx, daemon.SdNotifyReady)
	select {
	case err := <-done:
		return fmt.Errorf("serve %s: %w", c.Address, err)
	case <-ctx.Done():
	}
	log.G(ctx).Info("stopping")
	notify(ctx, daemon.SdNotifyStopping)
	timer := time.AfterFunc(stopTimeout, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
	return nil
}

// serveObservers answers with metrics and profiles, as far as they are asked for, until stop.
func serveObservers(ctx context.Context, c Config, calls calls, holds collector) (stop func(), err error) {
	stops := []func(){}
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	if c.MetricsAddress != "" {
		s, err := serveMetrics(ctx, c.MetricsAddress, calls, holds)
		if err != nil {
			return nil, err
		}
		stops = append(stops, s)
	}
	if c.PprofAddress != "" {
		s, err := servePprof(ctx, c.PprofAddress)
		if err != nil {
			stop()
			return nil, err
		}
		stops = append(stops, s)
	}
	return stop, nil
}

// openStore opens what is served, and what lets go of blobs that it makes needless.
func openStore(ctx context.Context, c Config, found *blobs.Store, catalog *blobs.Catalog) (
	sn *snapshotter.Snapshotter, trimmer *blobs.Trimmer, err error,
) {
	reserve, err := c.reserve()
	if err != nil {
		return nil, nil, err
	}
	memory, err := c.memory()
	if err != nil {
		return nil, nil, err
	}
	projects, err := quota.ParseRange(c.ProjectIDs)
	if err != nil {
		return nil, nil, err
	}
	linger, err := c.linger()
	if err != nil {
		return nil, nil, err
	}
	log.G(ctx).Infof("max_memory: %s", units.BytesSize(float64(memory)))
	limitHeap(memory)
	if c.Durability == string(layer.Deferred) {
		log.G(ctx).Warn("durability is deferred: a power cut may damage layers of the last ten seconds, which then are " +
			"out of service until they are repaired or pulled again")
	}
	stored := func(ctx context.Context) (blobs.Stored, error) { return snapshotter.StoredLayers(ctx, sn) }
	var recipes blobs.Recipes
	if c.Recipes {
		recipes = snapshotter.KeepRecipes(func() *snapshotter.Snapshotter { return sn })
	}
	trimmer = blobs.NewTrimmer(catalog, found, stored, recipes, nil)
	sn, err = snapshotter.New(ctx, snapshotter.Options{
		Root: c.Root, RunDir: c.RunDir,
		Durability: layer.Durability(c.Durability), Verity: lower.Verity(c.Verity), PageCache: lower.PageCache(c.PageCache),
		Reserve: reserve, MaxMemory: memory, Projects: projects, Linger: linger,
		Fidelity: content.Fidelity(c.Fidelity), FetchedOnly: c.Reuse == reuseFetched,
		Blobs: found, Remind: catalog.Remind, Committed: trimmer.Committed,
	})
	return sn, trimmer, err
}

// runUntilClosed runs fn in the background; the returned function ends it and waits.
func runUntilClosed(ctx context.Context, fn func(context.Context)) (closeIt func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

func newComparer(sn *snapshotter.Snapshotter, conn *grpc.ClientConn) *compare.Comparer {
	leases := leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn))
	return compare.New(sn, contentproxy.NewContentStore(conn), leases)
}

func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warn("notify systemd")
	}
}

// listen opens the socket for root alone. A socket that nobody listens on is a leftover.
func listen(address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, fmt.Errorf("create socket directory: %w", err)
	}
	conn, err := net.Dial("unix", address)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("another process listens on %s: stop it, or set another address", address)
	case errors.Is(err, unix.ENOENT):
	case errors.Is(err, unix.ECONNREFUSED):
		fi, serr := os.Lstat(address)
		if serr != nil || fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and is no socket: move it away, or set another address", address)
		}
		if err := os.Remove(address); err != nil {
			return nil, fmt.Errorf("remove stale socket: %w", err)
		}
	default:
		return nil, fmt.Errorf("address: %w", err)
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(address, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict socket: %w", err), l.Close())
	}
	return l, nil
}

func recoverUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any,
	err error) {
	defer answerPanic(ctx, info.FullMethod, &err)
	return handler(ctx, req)
}

func recoverStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo,
	handler grpc.StreamHandler) (err error) {
	defer answerPanic(stream.Context(), info.FullMethod, &err)
	return handler(srv, stream)
}

func answerPanic(ctx context.Context, method string, err *error) {
	if p := recover(); p != nil {
		log.G(ctx).Errorf("panic in %s: %v\n%s", method, p, debug.Stack())
		*err = status.Errorf(codes.Internal, "%s: internal error, see the log of containerd-dedup-grpc", method)
	}
}
