// Command containerd-dedup-grpc is a containerd proxy plugin: the snapshots and diff services
// of dedup-snapshotter on one unix socket.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/containerd/log"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "unknown"

func main() {
	app := &cli.App{
		Name:            "containerd-dedup-grpc",
		Usage:           "containerd snapshotter that stores every payload once per node",
		Version:         version,
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Usage: "TOML `FILE`", Value: defaultConfigFile},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("unexpected argument %q (see --help)", c.Args().First())
			}
			config, err := loadConfig(c.String("config"), c.IsSet("config"))
			if err != nil {
				return err
			}
			return serve(c.Context, config)
		},
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := app.RunContext(ctx, os.Args); err != nil {
		log.L.Fatal(err)
	}
}
