package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "what the daemon stores, what that saves, and what room is left",
		Action: func(c *cli.Context) error {
			v, err := askStatus(c, true)
			if err != nil {
				return err
			}
			return print(c, v, func(w io.Writer, s Status) {
				writeStatus(w, s)
				writeStatusBars(w, barsFor(c), s)
			})
		},
	}
}

// Status is what `status --json` prints; control.proto has what the fields mean.
type Status struct {
	Version        string `json:"version"`
	Root           string `json:"root"`
	Fidelity       string `json:"fidelity"`
	Reuse          string `json:"reuse"`
	Layers         int64  `json:"layers"`
	Objects        int64  `json:"objects"`
	DiffIDs        int64  `json:"diff_ids"`
	Uses           int64  `json:"uses"`
	LogicalBytes   int64  `json:"logical_bytes"`
	LogicalEntries int64  `json:"logical_entries"`
	StoredBytes    int64  `json:"stored_bytes"`
	StoredInodes   int64  `json:"stored_inodes"`
	FreeBytes      int64  `json:"free_bytes"`
	TotalBytes     int64  `json:"total_bytes"`
	FreeInodes     int64  `json:"free_inodes"`
	TotalInodes    int64  `json:"total_inodes"`
	ChainImages    int64  `json:"chain_images"`
	ChainMounts    int64  `json:"chain_mounts"`
	Verity         string `json:"verity"`
	Blobs          string `json:"blobs"`
	Recipes        int64  `json:"recipes"`
	RecipeBytes    int64  `json:"recipe_bytes"`
}

func askStatus(c *cli.Context, measure bool) (Status, error) {
	r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.StatusResponse, error) {
		return client.Status(ctx, &dedupv1.StatusRequest{Measure: measure})
	})
	return statusOf(r), err
}

func statusOf(r *dedupv1.StatusResponse) Status {
	return Status{
		Version: r.GetVersion(), Root: r.GetRoot(), Fidelity: r.GetFidelity(), Reuse: r.GetReuse(),
		Layers: r.GetLayers(), Objects: r.GetObjects(), DiffIDs: r.GetDiffIds(), Uses: r.GetUses(),
		LogicalBytes: r.GetLogicalBytes(), LogicalEntries: r.GetLogicalEntries(),
		StoredBytes: r.GetStoredBytes(), StoredInodes: r.GetStoredInodes(),
		FreeBytes: r.GetFreeBytes(), TotalBytes: r.GetTotalBytes(),
		FreeInodes: r.GetFreeInodes(), TotalInodes: r.GetTotalInodes(),
		ChainImages: r.GetChainImages(), ChainMounts: r.GetChainMounts(),
		Verity: r.GetVerity(), Blobs: r.GetBlobs(), Recipes: r.GetRecipes(), RecipeBytes: r.GetRecipeBytes(),
	}
}

// writeStatusBars compares what is stored with what it stands for, and shows how full the disk is.
func writeStatusBars(w io.Writer, b bars, s Status) {
	if b.width == 0 {
		return
	}
	whole := max(s.LogicalBytes, s.StoredBytes)
	used := max(s.TotalBytes-s.FreeBytes, 0)
	stored := min(s.StoredBytes, used)
	rows := []barRow{
		{"logical", size(s.LogicalBytes), 0, s.LogicalBytes, whole},
		{"stored", size(s.StoredBytes), s.StoredBytes, 0, whole},
		{"disk", size(stored) + " of ours, " + size(used-stored) + " of others, " + size(s.FreeBytes) + " free",
			stored, used - stored, s.TotalBytes},
	}
	if s.TotalInodes > 0 {
		used := max(s.TotalInodes-s.FreeInodes, 0)
		ours := min(s.StoredInodes, used)
		rows = append(rows, barRow{"inodes", count(ours) + " of ours, " + count(used-ours) + " of others",
			ours, used - ours, s.TotalInodes})
	}
	fmt.Fprintln(w)
	b.write(w, rows)
}

func writeStatus(w io.Writer, s Status) {
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "daemon\t%s, fidelity %s, reuse %s\n", s.Version, s.Fidelity, s.Reuse)
		fmt.Fprintf(w, "root\t%s\n", s.Root)
		fmt.Fprintf(w, "layers\t%s for %s, used %s by snapshots\n", count(s.Layers), plural(s.DiffIDs, "diffID", "diffIDs"),
			plural(s.Uses, "time", "times"))
		fmt.Fprintf(w, "objects\t%s\n", count(s.Objects))
		fmt.Fprintf(w, "logical\t%s, %s\n", size(s.LogicalBytes), plural(s.LogicalEntries, "entry", "entries"))
		fmt.Fprintf(w, "stored\t%s, %s\n", size(s.StoredBytes), plural(s.StoredInodes, "inode", "inodes"))
		fmt.Fprintf(w, "dedup ratio\t%s in bytes, %s in inodes\n", ratio(s.LogicalBytes, s.StoredBytes),
			ratio(s.LogicalEntries, s.StoredInodes))
		fmt.Fprintf(w, "free\t%s of %s (%s)\n", size(s.FreeBytes), size(s.TotalBytes), percent(s.FreeBytes, s.TotalBytes))
		if s.TotalInodes > 0 {
			fmt.Fprintf(w, "free inodes\t%s of %s (%s)\n", count(s.FreeInodes), count(s.TotalInodes),
				percent(s.FreeInodes, s.TotalInodes))
		}
		fmt.Fprintf(w, "fs-verity\t%s\n", s.Verity)
		if s.Blobs != "" { // an older daemon does not say
			fmt.Fprintf(w, "blobs\t%s\n", s.Blobs)
		}
		if s.Recipes > 0 {
			fmt.Fprintf(w, "recipes\t%s, %s\n", plural(s.Recipes, "dropped blob can be made again",
				"dropped blobs can be made again"), size(s.RecipeBytes))
		}
		fmt.Fprintf(w, "chain images\t%s, %s mounted\n", count(s.ChainImages), count(s.ChainMounts))
	})
}
