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
		Description: "Where the saving comes from: by directory, by the ending of names, by package of pip and dpkg. " +
			"FILES and\n" +
			"USED count a file once for each use of its layer by a snapshot, OBJECTS and STORED once. Files of at most\n" +
			"640 bytes are left out: they are stored in trees.",
		Flags:  []cli.Flag{&cli.UintFlag{Name: "limit", Usage: "at most `N` rows of each kind (up to 1000)", Value: 10}},
		Action: runDuplicates,
	}
}

func runDuplicates(c *cli.Context) error {
	if n := c.Uint("limit"); n < 1 || n > 1000 {
		return usageError{fmt.Errorf("duplicates: --limit %d: want 1 to 1000", n)}
	}
	stop := showProgress(c, func() string { return "reading the trees of all layers" })
	defer stop()
	s, err := askStatus(c, true)
	if err != nil {
		return err
	}
	equal, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.EqualResponse, error) {
		return client.Equal(ctx, &dedupv1.EqualRequest{})
	})
	if err != nil {
		return err
	}
	rows, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.DuplicatesResponse, error) {
		return client.Duplicates(ctx, &dedupv1.DuplicatesRequest{Limit: uint32(c.Uint("limit"))})
	})
	if err != nil {
		return err
	}
	stop()
	return print(c, duplicatesOf(s, equal, rows), writeDuplicates)
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
	// Where the saving comes from.
	Paths    []DuplicateRow `json:"paths"`
	Types    []DuplicateRow `json:"types"`
	Packages []DuplicateRow `json:"packages"`
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

// DuplicateRow is a group of files; control.proto has what the fields mean.
type DuplicateRow struct {
	Name        string `json:"name"`
	UsedFiles   int64  `json:"used_files"`
	UsedBytes   int64  `json:"used_bytes"`
	Objects     int64  `json:"objects"`
	StoredBytes int64  `json:"stored_bytes"`
}

func rowsOf(list []*dedupv1.DuplicateRow) []DuplicateRow {
	out := make([]DuplicateRow, 0, len(list))
	for _, r := range list {
		out = append(out, DuplicateRow{r.GetName(), r.GetUsedFiles(), r.GetUsedBytes(), r.GetObjects(), r.GetStoredBytes()})
	}
	return out
}

func duplicatesOf(s Status, r *dedupv1.EqualResponse, rows *dedupv1.DuplicatesResponse) Duplicates {
	d := Duplicates{
		Layers: s.Layers, DiffIDs: s.DiffIDs, Uses: s.Uses, Objects: s.Objects,
		LogicalBytes: s.LogicalBytes, LogicalEntries: s.LogicalEntries,
		StoredBytes: s.StoredBytes, StoredInodes: s.StoredInodes,
		Equal: []EqualGroup{},
		Paths: rowsOf(rows.GetPaths()), Types: rowsOf(rows.GetTypes()), Packages: rowsOf(rows.GetPackages()),
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
			size(d.LogicalBytes), plural(d.LogicalEntries, "entry", "entries"), plural(d.Uses, "use", "uses"),
			plural(d.Layers, "layer", "layers"))
		fmt.Fprintf(w, "stored\t%s, %s\t%s, trees and chain images\n",
			size(d.StoredBytes), plural(d.StoredInodes, "inode", "inodes"), plural(d.Objects, "object", "objects"))
		fmt.Fprintf(w, "dedup ratio\t%s\t%s saved\n", ratio(d.LogicalBytes, d.StoredBytes),
			size(max(0, d.LogicalBytes-d.StoredBytes)))
	})
	writeRows(w, "DIRECTORY", d.Paths)
	writeRows(w, "ENDING", d.Types)
	writeRows(w, "PACKAGE", d.Packages)
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

// writeRows shows the groups that save anything.
func writeRows(w io.Writer, title string, rows []DuplicateRow) {
	if len(rows) == 0 || rows[0].UsedBytes <= rows[0].StoredBytes {
		return
	}
	fmt.Fprintln(w)
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "%s\tFILES\tUSED\tOBJECTS\tSTORED\tSAVED\n", title)
		for _, r := range rows {
			if r.UsedBytes > r.StoredBytes {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", plain(r.Name), count(r.UsedFiles), size(r.UsedBytes),
					count(r.Objects), size(r.StoredBytes), size(r.UsedBytes-r.StoredBytes))
			}
		}
	})
}
