package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

func layersCommand() *cli.Command {
	return &cli.Command{
		Name:  "layers",
		Usage: "every stored layer: its size, what storing it added to the disk, and how often it is used",
		Action: func(c *cli.Context) error {
			r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.LayersResponse, error) {
				return client.Layers(ctx, &dedupv1.LayersRequest{})
			})
			if err != nil {
				return err
			}
			return print(c, layersOf(r.GetLayers()), writeLayers)
		},
	}
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
	if len(list) == 0 {
		fmt.Fprintln(w, "no layers: nothing has been pulled with the snapshotter dedup (see dedupctl config containerd)")
		return
	}
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
	fmt.Fprintf(w, "\n%s, %s; storing them added %s and %s\n", plural(int64(len(list)), "layer", "layers"), size(logical), size(added), plural(inodes, "inode", "inodes"))
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
