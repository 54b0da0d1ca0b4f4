package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// GCReport is what `gc --json` prints.
type GCReport struct {
	DryRun bool `json:"dry_run"`
	// Offline: the daemon does not run. The store was read without it.
	Offline bool      `json:"offline,omitempty"`
	Removed []Finding `json:"removed"`
	Bytes   int64     `json:"bytes"`
}

func gcCommand() *cli.Command {
	return &cli.Command{
		Name:  "gc",
		Usage: "remove what nothing uses",
		Description: "To free space remove images: the daemon removes a layer by itself when the last image or container\n" +
			"that uses it is removed. gc removes what was left behind then, after a crash or on a full disk. --chain-images\n" +
			"also removes what is only kept to start the next container sooner. While the daemon does not run, --dry-run\n" +
			"reads the store itself.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "list what would be removed"},
			&cli.BoolFlag{Name: "chain-images",
				Usage: "also chain images that no container uses now; they are built again when needed"},
			configFlag(),
		},
		Action: runGC,
	}
}

func runGC(c *cli.Context) error {
	out := GCReport{DryRun: c.Bool("dry-run"), Removed: []Finding{}}
	down := daemonDown(c)
	stop := showProgress(c, func() string { return "looking for what nothing uses" })
	defer stop()
	var err error
	switch {
	case down != nil && !out.DryRun:
		return fmt.Errorf("gc needs the daemon (gc --dry-run does not): %w", down)
	case down != nil:
		out.Offline = true
		out.Removed, err = offline(c, func(ctx context.Context, s *snapshotter.Offline) ([]snapshotter.Finding, error) {
			return s.Unused(ctx, snapshotter.GCOptions{DryRun: true, Chains: c.Bool("chain-images")})
		})
	default:
		out.Removed, err = ask(c, func(ctx context.Context, client dedupv1.ControlClient) ([]Finding, error) {
			r, err := client.GC(ctx, &dedupv1.GCRequest{DryRun: out.DryRun, ChainImages: c.Bool("chain-images")})
			list := []Finding{}
			for _, f := range r.GetRemoved() {
				list = append(list, findingOf(f))
			}
			return list, err
		})
	}
	stop()
	if err != nil {
		return err
	}
	for _, f := range out.Removed {
		out.Bytes += f.Bytes
	}
	return print(c, out, writeGC)
}

func writeGC(w io.Writer, r GCReport) {
	if len(r.Removed) == 0 {
		fmt.Fprintln(w, "nothing to remove: everything that is stored is used")
		return
	}
	writeFindings(w, r.Removed)
	what := "removed"
	if r.DryRun {
		what = "would be removed"
	}
	fmt.Fprintf(w, "\n%s, %s %s\n", plural(int64(len(r.Removed)), "file", "files"), size(r.Bytes), what)
}
