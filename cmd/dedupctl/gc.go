package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// GCReport is what `gc --json` prints.
type GCReport struct {
	DryRun  bool      `json:"dry_run"`
	Removed []Finding `json:"removed"`
	Bytes   int64     `json:"bytes"`
}

func gcCommand() *cli.Command {
	return &cli.Command{
		Name:  "gc",
		Usage: "remove what nothing uses",
		Description: "Layers and their objects go by themselves when the last image or container that uses them goes: remove images to\n" +
			"free space. This removes what could not be removed then, after a crash or a full disk, and with --chain-images\n" +
			"what is only kept to start the next container sooner.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "list what would go"},
			&cli.BoolFlag{Name: "chain-images", Usage: "the chain images that no container uses now, too; they are built again when needed"},
		},
		Action: func(c *cli.Context) error {
			dry := c.Bool("dry-run")
			stop := showProgress(c, func() string { return "looking for what nothing uses" })
			r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.GCResponse, error) {
				return client.GC(ctx, &dedupv1.GCRequest{DryRun: dry, ChainImages: c.Bool("chain-images")})
			})
			stop()
			if err != nil {
				return err
			}
			out := GCReport{DryRun: dry, Removed: []Finding{}}
			for _, f := range r.GetRemoved() {
				out.Removed = append(out.Removed, findingOf(f))
				out.Bytes += f.GetBytes()
			}
			return print(c, out, writeGC)
		},
	}
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
