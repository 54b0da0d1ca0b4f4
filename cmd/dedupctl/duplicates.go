package main

import (
	"context"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

func duplicatesCommand() *cli.Command {
	return &cli.Command{
		Name:  "duplicates",
		Usage: "what is stored once and used many times, and layers equal but for time and owner",
		Action: func(c *cli.Context) error {
			s, err := askStatus(c, true)
			if err != nil {
				return err
			}
			r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.EqualResponse, error) {
				return client.Equal(ctx, &dedupv1.EqualRequest{})
			})
			if err != nil {
				return err
			}
			return print(c, duplicatesOf(s, r), writeDuplicates)
		},
	}
}

// Duplicates is what `duplicates --json` prints.
type Duplicates struct {
	Layers         int64   `json:"layers"`
	DiffIDs        int64   `json:"diff_ids"`
	Uses           int64   `json:"uses"`
	Objects        int64   `json:"objects"`
	LogicalBytes   int64   `json:"logical_bytes"`
	LogicalEntries int64   `json:"logical_entries"`
	StoredBytes    int64   `json:"stored_bytes"`
	StoredInodes   int64   `json:"stored_inodes"`
	Ratio          float64 `json:"dedup_ratio"` // logical by stored bytes; 0 for an empty store
	// Equal are the sets of layers that have one payload digest.
	Equal []EqualGroup `json:"equal"`
}

// EqualGroup is one set of layers that are equal but for mtime, uid and gid.
type EqualGroup struct {
	PayloadDigest string  `json:"payload_digest"`
	Entries       int64   `json:"entries"`       // of each
	LogicalBytes  int64   `json:"logical_bytes"` // of each
	Layers        []Layer `json:"layers"`
}

func duplicatesOf(s Status, r *dedupv1.EqualResponse) Duplicates {
	d := Duplicates{
		Layers: s.Layers, DiffIDs: s.DiffIDs, Uses: s.Uses, Objects: s.Objects,
		LogicalBytes: s.LogicalBytes, LogicalEntries: s.LogicalEntries,
		StoredBytes: s.StoredBytes, StoredInodes: s.StoredInodes,
		Equal: []EqualGroup{},
	}
	if s.StoredBytes > 0 {
		d.Ratio = float64(s.LogicalBytes) / float64(s.StoredBytes)
	}
	for _, g := range r.GetGroups() {
		d.Equal = append(d.Equal, EqualGroup{
			PayloadDigest: g.GetPayloadDigest(), Entries: g.GetEntries(), LogicalBytes: g.GetLogicalBytes(),
			Layers: layersOf(g.GetLayers()),
		})
	}
	return d
}

func writeDuplicates(w io.Writer, d Duplicates) {
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "used\t%s, %s\tevery layer as often as snapshots use it: %s of %s\n",
			size(d.LogicalBytes), plural(d.LogicalEntries, "entry", "entries"), plural(d.Uses, "use", "uses"), plural(d.Layers, "layer", "layers"))
		fmt.Fprintf(w, "stored\t%s, %s\t%s, trees and chain images\n",
			size(d.StoredBytes), plural(d.StoredInodes, "inode", "inodes"), plural(d.Objects, "object", "objects"))
		fmt.Fprintf(w, "dedup ratio\t%s\t%s saved\n", ratio(d.LogicalBytes, d.StoredBytes), size(max(0, d.LogicalBytes-d.StoredBytes)))
	})
	if len(d.Equal) == 0 {
		fmt.Fprintln(w, "\nNo two layers are equal but for mtime, uid and gid.")
		return
	}
	fmt.Fprintln(w, "\nLayers equal but for mtime, uid and gid:")
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "PAYLOAD\tLAYER\tDIFFID\tENTRIES\tSIZE\tADDED\tINODES\tUSES")
		for _, g := range d.Equal {
			for i, l := range g.Layers {
				payload := short(g.PayloadDigest)
				if i > 0 {
					payload = ""
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", payload, short(l.ID), diffIDs(l.DiffIDs),
					count(l.Entries), size(l.LogicalBytes), size(l.AddedBytes), count(l.AddedInodes), count(l.Uses))
			}
		}
	})
}
