package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// Trimmed is what `trim --json` prints.
type Trimmed struct {
	DryRun bool `json:"dry_run"`
	// What went from the disk, or would.
	FreedBlobs int64          `json:"freed_blobs"`
	FreedBytes int64          `json:"freed_bytes"`
	Images     []TrimmedImage `json:"images"`
}

// TrimmedImage is one manifest; control.proto has what the fields mean.
type TrimmedImage struct {
	Namespace string   `json:"namespace"`
	Names     []string `json:"names"`
	Manifest  string   `json:"manifest"`
	Layers    int64    `json:"layers"`
	Blobs     int64    `json:"blobs"`
	BlobBytes int64    `json:"blob_bytes"`
	KeptBlobs int64    `json:"kept_blobs"`
	KeptBytes int64    `json:"kept_bytes"`
	Kept      string   `json:"kept,omitempty"`
	Recipes   int64    `json:"recipes"`
}

// dockerNamespace is containerd's namespace that Docker uses.
const dockerNamespace = "moby"

func trimCommand() *cli.Command {
	return &cli.Command{
		Name:      "trim",
		Usage:     "remove blobs from containerd's content store whose layers are stored here",
		ArgsUsage: "[IMAGE...]",
		Description: "A container needs no blob once its layers are stored. This has containerd remove the blobs of all\n" +
			"images, or of those named, and says why others stay: their layer is damaged or not stored here, another\n" +
			"snapshotter has unpacked the image too, a lease holds it, a push or an export reads it, no registry is known to\n" +
			"have them, or the image is marked (ctr images label IMAGE dedup-snapshotter.io/blobs=keep).\n" +
			"Such images still run, and can be pulled again. Before you push or export one, run `dedupctl complete IMAGE`:\n" +
			"it makes blobs again from the store where that is possible, and fetches the others.\n" +
			"blobs = \"drop\" in the daemon's config trims after each pull.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "list what would be removed"},
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "only images of containerd's `NAMESPACE`",
				EnvVars: []string{"CONTAINERD_NAMESPACE"}},
			&cli.BoolFlag{Name: "last-copy", Usage: "of the IMAGEs named: also blobs that no registry is known to have"},
			&cli.BoolFlag{Name: "fetched",
				Usage: "also blobs that dedupctl complete fetched within the last hour"},
			&cli.BoolFlag{Name: "no-recipes",
				Usage: "keep nothing to make the blobs again with; saves about the time that compressing them took"},
			&cli.DurationFlag{Name: "wait", Value: time.Minute,
				Usage: "wait up to `DURATION` for pushes and exports that read what would go"},
		},
		Action: runTrim,
	}
}

func runTrim(c *cli.Context) error {
	names := c.Args().Slice()
	if c.Bool("last-copy") && len(names) == 0 {
		return usageError{errors.New("trim: --last-copy wants the IMAGEs by name: what goes cannot be had again")}
	}
	dry := c.Bool("dry-run")
	wait := uint32(min(max(0, math.Ceil(c.Duration("wait").Seconds())), math.MaxUint32))
	doing := "looking which blobs nothing needs"
	if !dry && !c.Bool("no-recipes") {
		doing += ", and keeping what it takes to make them again"
	}
	stop := showProgress(c, func() string { return doing })
	r, err := ask(c, func(ctx context.Context, client dedupv1.ControlClient) (*dedupv1.TrimResponse, error) {
		return client.Trim(ctx, &dedupv1.TrimRequest{
			DryRun: dry, Namespace: c.String("namespace"), Images: names, LastCopy: c.Bool("last-copy"),
			Fetched: c.Bool("fetched"), WaitSeconds: wait, NoRecipes: c.Bool("no-recipes"),
		})
	})
	stop()
	if err != nil {
		return err
	}
	out := Trimmed{DryRun: dry, FreedBlobs: r.GetFreedBlobs(), FreedBytes: r.GetFreedBytes(), Images: []TrimmedImage{}}
	for _, i := range r.GetImages() {
		out.Images = append(out.Images, TrimmedImage{
			Namespace: i.GetNamespace(), Names: append([]string{}, i.GetNames()...),
			Manifest: i.GetManifest(), Layers: i.GetLayers(), Blobs: i.GetBlobs(), BlobBytes: i.GetBlobBytes(),
			KeptBlobs: i.GetKeptBlobs(), KeptBytes: i.GetKeptBytes(), Kept: i.GetKept(), Recipes: i.GetRecipes(),
		})
	}
	return print(c, out, writeTrimmed)
}

func writeTrimmed(w io.Writer, t Trimmed) {
	if len(t.Images) == 0 {
		fmt.Fprintln(w, "nothing to trim: no image has blobs in containerd's content store")
		return
	}
	goes, verb := "DROPPED", "freed"
	if t.DryRun {
		goes, verb = "TO DROP", "would be freed"
	}
	lastCopies, docker := false, false
	recipes := int64(0)
	table(w, func(w io.Writer) {
		fmt.Fprintf(w, "NAMESPACE\tIMAGE\tLAYERS\tBLOBS\t%s\tKEPT\tWHY KEPT\n", goes)
		for _, i := range t.Images {
			why := i.Kept
			if why == "" {
				why = "-"
			}
			lastCopies = lastCopies || strings.HasPrefix(why, "the last copy")
			recipes += i.Recipes
			docker = docker || i.Namespace == dockerNamespace && i.BlobBytes > 0
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.Namespace, imageName(i.Names), count(i.Layers),
				count(i.Blobs+i.KeptBlobs), dash(i.BlobBytes), dash(i.KeptBytes), plain(why))
		}
	})
	fmt.Fprintf(w, "\n%s, %s %s in containerd's content store\n", plural(t.FreedBlobs, "blob", "blobs"),
		size(t.FreedBytes), verb)
	if recipes > 0 {
		fmt.Fprintf(w, "%s can be made again from the store, without a registry: dedupctl complete IMAGE\n",
			plural(recipes, "of them", "of them"))
	}
	if lastCopies {
		fmt.Fprintln(w, "images that were built or imported here must be named: dedupctl trim --last-copy IMAGE")
	}
	if docker {
		fmt.Fprintln(w, "docker save leaves out missing blobs without an error. Before it run:\n"+
			"  dedupctl complete --namespace "+dockerNamespace+" IMAGE")
	}
}
