// Command dedup-bench measures the dedup snapshotter beside containerd's own, with real
// containerds, registries, containers and images on this machine.
//
// Each verb has a file of its own. Package internal/bench has the subjects and scenarios of
// run, package internal/report what becomes of the figures; measure.go and report.go here belong to
// demo. Nothing here knows how a snapshotter works: figures come from clocks, /proc and the
// file system.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := &cli.App{
		Name:        "dedup-bench",
		Usage:       "measure the dedup snapshotter beside containerd's own",
		HideVersion: true,
		Commands: []*cli.Command{demoCommand(), runCommand(), limitCommand(), reportCommand(), screensCommand(),
			dashboardCommand(), setupCommand(), encodersCommand(), bench.RegistryCommand()},
		// Exit codes: 0 done, 1 failed; main prints the error once.
		ExitErrHandler: func(*cli.Context, error) {},
	}
	if err := app.RunContext(ctx, os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "dedup-bench:", err)
		stop()
		os.Exit(1)
	}
}
