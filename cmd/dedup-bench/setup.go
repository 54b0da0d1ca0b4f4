package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// setupCommand makes all that tests need and a clock should not see: `make test` runs it.
func setupCommand() *cli.Command {
	return &cli.Command{
		Name:   "setup",
		Usage:  "install and build what the tests need; says what cannot be had here",
		Hidden: true,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "containerd", Usage: "versions of containerd to build (default: all that are supported)"},
			&cli.BoolFlag{Name: "inputs", Usage: "also make the Debian and Python layers", Value: true},
		},
		Action: runSetup,
	}
}

func runSetup(c *cli.Context) error {
	p := newProgress(os.Stderr)
	var missing []error
	note := func(err error) {
		if err != nil {
			missing = append(missing, err)
			p.sayf("not available: %v", err)
		}
	}
	note(node.Require(c.Context, p.say, node.Runc, node.Crun, node.FsckErofs, node.Igzip))
	versions := c.StringSlice("containerd")
	if len(versions) == 0 {
		var err error
		if versions, err = node.Versions(); err != nil {
			return err
		}
	}
	for _, version := range versions {
		_, err := node.Build(c.Context, version, p.say)
		note(err)
	}
	for _, build := range []func(context.Context, func(string)) (string, error){
		node.BuildCrane, node.BuildBuildKit, node.BuildNerdctl,
	} {
		_, err := build(c.Context, p.say)
		note(err)
	}
	if c.Bool("inputs") && os.Geteuid() == 0 {
		_, err := demoImages(c.Context, p)
		note(err)
		_, err = inputs.Programs(c.Context, p.say)
		note(err)
	}
	if os.Geteuid() != 0 {
		p.say("not root: tests that run containers or mount will be skipped")
	}
	if _, err := node.MkfsErofs(); err != nil {
		p.sayf("comparisons with containerd's erofs snapshotter will be skipped: %v", err)
	}
	for _, err := range missing {
		if !errors.Is(err, node.ErrMissing) {
			return fmt.Errorf("set up: %w", err)
		}
	}
	return nil
}
