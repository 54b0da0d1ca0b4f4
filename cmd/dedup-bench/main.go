// Command dedup-bench measures the dedup snapshotter beside containerd's own, with real
// containerds, registries, containers and images on this machine.
//
// Each verb has a file of its own. measure.go knows how to take one subject through one
// sequence of pulls; report.go knows what a figure looks like. Nothing here knows how a
// snapshotter works: figures come from clocks, /proc and the file system.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := &cli.App{
		Name:        "dedup-bench",
		Usage:       "measure the dedup snapshotter beside containerd's own",
		HideVersion: true,
		Commands:    []*cli.Command{demoCommand(), setupCommand(), registryCommand()},
		// Exit codes: 0 done, 1 failed; main prints the error once.
		ExitErrHandler: func(*cli.Context, error) {},
	}
	if err := app.RunContext(ctx, os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "dedup-bench:", err)
		stop()
		os.Exit(1)
	}
}
