package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

func layersCommand() *cli.Command {
	return &cli.Command{
		Name:        "layers",
		Usage:       "every stored layer: its size, what storing it added to the disk, and how often it is used",
		Description: "A TEXT is how the id, the payload or a diffID begins, with or without sha256:.",
		ArgsUsage:   "[TEXT...]",
		Flags: []cli.Flag{
			sortFlag(layerOrders, "size"),
			&cli.BoolFlag{Name: "unused", Usage: "only layers that no snapshot uses"},
		},
		Action: func(c *cli.Context) error {
			order, err := orderOf(c, layerOrders)
			if err != nil {
				return err
			}
			r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.LayersResponse, error) {
				return client.Layers(ctx, &dedupv1.LayersRequest{})
			})
			if err != nil {
				return err
			}
			all := layersOf(r.GetLayers())
			list := slices.DeleteFunc(slices.Clone(all), func(l Layer) bool { return !wantsLayer(c, l) })
			slices.SortStableFunc(list, order)
			if len(list) == 0 && !jsonWanted(c) {
				none(c, "layer", len(all))
				return nil
			}
			return print(c, list, writeLayers)
		},
	}
}

// layerOrders are what layers can be sorted by, the largest first.
var layerOrders = map[string]func(a, b Layer) int{
	"size":    largest(func(l Layer) int64 { return l.LogicalBytes }),
	"added":   largest(func(l Layer) int64 { return l.AddedBytes }),
	"inodes":  largest(func(l Layer) int64 { return l.AddedInodes }),
	"entries": largest(func(l Layer) int64 { return l.Entries }),
	"uses":    largest(func(l Layer) int64 { return l.Uses }),
}

// wantsLayer tells whether a layer passes the filters of the command line.
func wantsLayer(c *cli.Context, l Layer) bool {
	if c.Bool("unused") && l.Uses > 0 {
		return false
	}
	names := append([]string{l.ID, l.PayloadDigest}, l.DiffIDs...)
	return c.NArg() == 0 || slices.ContainsFunc(c.Args().Slice(), func(text string) bool {
		return slices.ContainsFunc(names, func(name string) bool {
			return strings.HasPrefix(strings.TrimPrefix(name, "sha256:"), strings.TrimPrefix(text, "sha256:"))
		})
	})
}

// Layer is one of what `layers --json` prints; control.proto has what the fields mean.
type Layer struct {
	ID            string   `json:"id"`
	PayloadDigest string   `json:"payload_digest"`
	DiffIDs       []string `json:"diff_ids"`
	Fidelity      string   `json:"fidelity"`
	Entries       int64    `json:"entries"`
	LogicalBytes  int64    `json:"logical_bytes"`
	AddedBytes    int64    `json:"added_bytes"`
	AddedInodes   int64    `json:"added_inodes"`
	Uses          int64    `json:"uses"`
}

// layersOf returns the layers with the largest first.
func layersOf(list []*dedupv1.Layer) []Layer {
	out := make([]Layer, 0, len(list))
	for _, l := range list {
		out = append(out, Layer{
			ID: l.GetId(), PayloadDigest: l.GetPayloadDigest(),
			DiffIDs:  append([]string{}, l.GetDiffIds()...), // [] rather than null in JSON
			Fidelity: l.GetFidelity(), Entries: l.GetEntries(), LogicalBytes: l.GetLogicalBytes(),
			AddedBytes: l.GetAddedBytes(), AddedInodes: l.GetAddedInodes(), Uses: l.GetUses(),
		})
	}
	slices.SortStableFunc(out, func(a, b Layer) int { return cmp.Compare(b.LogicalBytes, a.LogicalBytes) })
	return out
}

func writeLayers(w io.Writer, list []Layer) {
	var logical, added, inodes int64
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "LAYER\tPAYLOAD\tDIFFID\tFIDELITY\tENTRIES\tSIZE\tADDED\tINODES\tUSES")
		for _, l := range list {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", short(l.ID), short(l.PayloadDigest), diffIDs(l.DiffIDs),
				l.Fidelity, count(l.Entries), size(l.LogicalBytes), size(l.AddedBytes), count(l.AddedInodes), count(l.Uses))
			logical += l.LogicalBytes
			added += l.AddedBytes
			inodes += l.AddedInodes
		}
	})
	fmt.Fprintf(w, "\n%s, %s; storing them added %s and %s\n", plural(int64(len(list)), "layer", "layers"), size(logical),
		size(added), plural(inodes, "inode", "inodes"))
}

// diffIDs writes the first of them, and how many more there are.
func diffIDs(list []string) string {
	switch len(list) {
	case 0:
		return "-" // committed from a container or a build
	case 1:
		return short(list[0])
	}
	return fmt.Sprintf("%s +%d", short(list[0]), len(list)-1)
}
