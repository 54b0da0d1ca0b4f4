package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/doctor"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/control"
)

// configFlag is for verbs that read the store themselves while the daemon does not run.
func configFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "config", Usage: "the daemon's config `FILE`, which names its root: read while the daemon does not run",
		Value: defaultDaemonConfig,
	}
}

// daemonDown returns why the daemon cannot be asked, if it does not run.
func daemonDown(c *cli.Context) error {
	conn, err := dial(c.Context, address(c))
	if err == nil {
		conn.Close()
		return nil
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return explainDial(address(c), "containerd-dedup-grpc", "--address", err)
	}
	return nil // ask says what is wrong
}

// offline reads the store of a daemon that does not run. look finds; the images that its findings harm are named where
// containerd runs.
func offline(
	c *cli.Context, look func(context.Context, *snapshotter.Offline) ([]snapshotter.Finding, error),
) (_ []Finding, err error) {
	_ = log.SetLevel("fatal") // what the store's packages log is among the findings
	settings, err := doctor.ReadSettings(c.String("config"), doctor.Settings{
		Root: defaultRoot, Address: defaultAddress, ContainerdAddress: defaultContainerd,
	})
	if err != nil {
		return nil, err
	}
	if !jsonWanted(c) {
		fmt.Fprintf(c.App.ErrWriter, "containerd-dedup-grpc does not run: reading %s without it, and changing nothing\n",
			settings.Root)
	}
	runDir := cmp.Or(settings.RunDir, filepath.Dir(settings.Address))
	store, err := snapshotter.OpenOffline(c.Context, settings.Root, runDir)
	if err != nil {
		return nil, explainOffline(c, err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	found, err := look(c.Context, store)
	if err != nil {
		return nil, explainOffline(c, err)
	}
	var conn grpc.ClientConnInterface = noContainerd{}
	if ctd, err := dial(c.Context, settings.ContainerdAddress); err == nil {
		defer ctd.Close()
		conn = ctd
	}
	list := []Finding{}
	for _, f := range control.Findings(c.Context, blobs.NewCatalog(conn, settings.Address), store.LayersOf, found) {
		list = append(list, findingOf(f))
	}
	return list, nil
}

func explainOffline(c *cli.Context, err error) error {
	if errors.Is(err, snapshotter.ErrServed) {
		return fmt.Errorf("%w, but does not listen on %s: name its socket with --address, or wait until it has started",
			err, address(c))
	}
	return err
}

// offlineCheck is check without a daemon.
func offlineCheck(c *cli.Context) ([]Finding, error) {
	var line progressLine
	stop := showProgress(c, line.String)
	defer stop()
	return offline(c, func(ctx context.Context, store *snapshotter.Offline) ([]snapshotter.Finding, error) {
		return store.Check(ctx, func(stage string, done, total int64) {
			line.set(&dedupv1.CheckProgress{Stage: stage, Done: done, Total: total})
		})
	})
}

// noContainerd answers where containerd does not run either: then no images are named.
type noContainerd struct{}

var errNoContainerd = errors.New("containerd does not run")

func (noContainerd) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return errNoContainerd
}

func (noContainerd) NewStream(
	context.Context, *grpc.StreamDesc, string, ...grpc.CallOption,
) (grpc.ClientStream, error) {
	return nil, errNoContainerd
}
