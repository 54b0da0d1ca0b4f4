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

func imagesCommand() *cli.Command {
	return &cli.Command{
		Name:  "images",
		Usage: "every image: its size, what of it is shared, and what removing it would free",
		Description: "SIZE      its files, before a file system rounds them up to blocks\n" +
			"STORED    what it needs here: objects, trees and its chain image\n" +
			"SHARED    the part of STORED that other images need too\n" +
			"EXCLUSIVE the part that no other image needs\n" +
			"FREES     what goes when the image is removed under all its names: EXCLUSIVE, unless a container uses it\n" +
			"BLOBS     what goes from containerd's content store beside it",
		ArgsUsage: "[TEXT...]",
		Flags: []cli.Flag{
			sortFlag(imageOrders, "frees"),
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "only images of containerd's `NAMESPACE`"},
			&cli.BoolFlag{Name: "unused", Usage: "only images that no container uses"},
		},
		Action: func(c *cli.Context) error {
			order, err := orderOf(c, imageOrders)
			if err != nil {
				return err
			}
			stop := showProgress(c, func() string { return "reading the trees of all layers" })
			r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.ImagesResponse, error) {
				return client.Images(ctx, &dedupv1.ImagesRequest{})
			})
			stop()
			if err != nil {
				return err
			}
			all := imagesOf(r.GetImages())
			list := slices.DeleteFunc(slices.Clone(all), func(i Image) bool { return !wantsImage(c, i) })
			slices.SortStableFunc(list, order)
			if len(list) == 0 && !jsonWanted(c) {
				none(c, "image", len(all))
				return nil
			}
			return print(c, list, func(w io.Writer, list []Image) { writeImagesBars(w, barsFor(c), list) })
		},
	}
}

// imageOrders are what images can be sorted by: the largest first, names in order.
var imageOrders = map[string]func(a, b Image) int{
	"size":      largest(func(i Image) int64 { return i.LogicalBytes }),
	"stored":    largest(func(i Image) int64 { return i.StoredBytes }),
	"shared":    largest(func(i Image) int64 { return i.StoredBytes - i.ExclusiveBytes }),
	"exclusive": largest(func(i Image) int64 { return i.ExclusiveBytes }),
	"frees":     largest(func(i Image) int64 { return i.FreedBytes }),
	"blobs":     largest(func(i Image) int64 { return i.FreedBlobBytes }),
	"users":     largest(func(i Image) int64 { return i.Users }),
	"name": func(a, b Image) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(imageName(a.Names), imageName(b.Names)))
	},
}

// wantsImage tells whether an image passes the filters of the command line: TEXTs are part of a name.
func wantsImage(c *cli.Context, i Image) bool {
	if ns := c.String("namespace"); ns != "" && ns != i.Namespace || c.Bool("unused") && i.Users > 0 {
		return false
	}
	return c.NArg() == 0 || slices.ContainsFunc(c.Args().Slice(), func(text string) bool {
		return slices.ContainsFunc(i.Names, func(name string) bool { return strings.Contains(name, text) })
	})
}

// Image is one of what `images --json` prints; control.proto has what the fields mean.
type Image struct {
	Namespace       string   `json:"namespace"`
	Names           []string `json:"names"`
	Target          string   `json:"target"`
	Layers          int64    `json:"layers"`
	Entries         int64    `json:"entries"`
	LogicalBytes    int64    `json:"logical_bytes"`
	StoredBytes     int64    `json:"stored_bytes"`
	StoredInodes    int64    `json:"stored_inodes"`
	ExclusiveBytes  int64    `json:"exclusive_bytes"`
	ExclusiveInodes int64    `json:"exclusive_inodes"`
	FreedBytes      int64    `json:"freed_bytes"`
	FreedInodes     int64    `json:"freed_inodes"`
	BlobBytes       int64    `json:"blob_bytes"`
	FreedBlobBytes  int64    `json:"freed_blob_bytes"`
	Users           int64    `json:"users"`
}

// imagesOf returns the images with the one first that frees most.
func imagesOf(list []*dedupv1.Image) []Image {
	out := make([]Image, 0, len(list))
	for _, i := range list {
		out = append(out, Image{
			Namespace: i.GetNamespace(), Names: append([]string{}, i.GetNames()...), Target: i.GetTarget(),
			Layers: i.GetLayers(), Entries: i.GetEntries(), LogicalBytes: i.GetLogicalBytes(),
			StoredBytes: i.GetStoredBytes(), StoredInodes: i.GetStoredInodes(),
			ExclusiveBytes: i.GetExclusiveBytes(), ExclusiveInodes: i.GetExclusiveInodes(),
			FreedBytes: i.GetFreedBytes(), FreedInodes: i.GetFreedInodes(),
			BlobBytes: i.GetBlobBytes(), FreedBlobBytes: i.GetFreedBlobBytes(), Users: i.GetUsers(),
		})
	}
	slices.SortStableFunc(out, func(a, b Image) int { return cmp.Compare(b.FreedBytes, a.FreedBytes) })
	return out
}

// writeImagesBars is writeImages with a bar for what each image stores, where the terminal has room for it.
func writeImagesBars(w io.Writer, b bars, list []Image) {
	var whole int64
	for _, i := range list {
		whole = max(whole, i.StoredBytes)
	}
	rows := make([]barRow, 0, len(list))
	for _, i := range list {
		rows = append(rows, barRow{full: i.ExclusiveBytes, light: i.StoredBytes - i.ExclusiveBytes, whole: whole})
	}
	b.beside(w, b.full+" EXCLUSIVE "+b.light+" SHARED", rows, func(w io.Writer) { writeImages(w, list) })
}

func writeImages(w io.Writer, list []Image) {
	var logical int64
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "NAMESPACE\tIMAGE\tSIZE\tSTORED\tSHARED\tEXCLUSIVE\tFREES\tINODES\tBLOBS\tUSED BY")
		for _, i := range list {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.Namespace, imageName(i.Names),
				size(i.LogicalBytes), size(i.StoredBytes), size(i.StoredBytes-i.ExclusiveBytes), size(i.ExclusiveBytes),
				size(i.FreedBytes), count(i.FreedInodes), size(i.FreedBlobBytes), users(i.Users))
			logical += i.LogicalBytes
		}
	})
	fmt.Fprintf(w, "\n%s with %s of files\n", plural(int64(len(list)), "image", "images"), size(logical))
}

// imageName shows the name that a person gave: the kubelet's images go by their digests, too.
func imageName(names []string) string {
	if len(names) == 0 {
		return "-"
	}
	best := slices.MinFunc(names, func(a, b string) int {
		return cmp.Compare(strings.Count(a, "sha256:"), strings.Count(b, "sha256:"))
	})
	if len(names) > 1 {
		return fmt.Sprintf("%s (+%d)", plain(best), len(names)-1)
	}
	return plain(best)
}

func users(n int64) string {
	if n == 0 {
		return "-"
	}
	return plural(n, "container", "containers")
}
