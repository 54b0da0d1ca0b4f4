package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/platforms"
	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/inventory"
)

const defaultContainerdRoot = "/var/lib/containerd"

func analyzeCommand() *cli.Command {
	return &cli.Command{
		Name:      "analyze",
		Usage:     "predict what dedup would save for images that lie elsewhere",
		ArgsUsage: "[SOURCE...]",
		Description: "Needs no daemon, and changes nothing. As root it tries the kernel, and mounts a tiny pack\n" +
			"in TMPDIR for a moment. SOURCE is one of\n" +
			"  a containerd's root, or that of its overlayfs snapshotter (default: " + defaultContainerdRoot + ")\n" +
			"  a Docker's root, or its overlay2 directory\n" +
			"  an OCI layout: a directory, or a tar as docker save and ctr image export write it\n" +
			"  the reference of an image: layers are streamed from the registry, and nothing is kept\n" +
			"Several sources are counted together. Every layer is read once, by the code that would store it.\n" +
			"Exit code 1 also when an image had to be left out, after all others were analysed.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "platform",
				Usage: "`OS/ARCH` of the image, where there are several (default: this machine's)"},
			&cli.BoolFlag{Name: "verity", Usage: "count what fs-verity needs too, for a store on ext4 with the feature verity"},
			&cli.BoolFlag{Name: "plain-http", Usage: "registries speak HTTP without TLS; on loopback they always do"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "`USER[:PASSWORD]` at the registries; the password " +
				"may stand in DEDUP_REGISTRY_PASSWORD (default: what docker login stored)"},
		},
		Action: runAnalyze,
	}
}

func runAnalyze(c *cli.Context) error {
	opts := inventory.Options{PlainHTTP: c.Bool("plain-http")}
	if text := c.String("platform"); text != "" {
		p, err := platforms.Parse(text)
		if err != nil {
			return usageError{fmt.Errorf("--platform %s: %w", text, err)}
		}
		opts.Platform = p
	}
	var given bool
	if opts.User, opts.Password, given = strings.Cut(c.String("user"), ":"); !given {
		opts.Password = os.Getenv("DEDUP_REGISTRY_PASSWORD")
	}
	sources := c.Args().Slice()
	if len(sources) == 0 {
		sources = []string{defaultContainerdRoot}
	}
	var running atomic.Pointer[analysis]
	start := time.Now()
	stop := showProgress(c, func() string {
		if a := running.Load(); a != nil {
			return a.progress(time.Since(start))
		}
		return "looking at what there is"
	})
	v, err := analyze(c.Context, sources, opts, c.Bool("verity"), func(a *analysis) { running.Store(a) })
	stop()
	if err != nil {
		return explainAnalyze(err)
	}
	if err := print(c, v, writeAnalysis); err != nil {
		return err
	}
	if n := len(v.LeftOut); n > 0 {
		return fmt.Errorf("analyze: %s left out: the first because of: %s", plural(int64(n), "image", "images"),
			v.LeftOut[0].Error)
	}
	return nil
}

// progress is one line for a terminal.
func (a *analysis) progress(elapsed time.Duration) string {
	read := a.read.Load()
	if a.done.Load() {
		return size(read) + " read; making the chain images"
	}
	return fmt.Sprintf("%s of %s read (%s)%s", size(read), size(a.total), percent(min(read, a.total), a.total),
		remaining(elapsed, read, a.total))
}

// remaining says how long the rest takes if it goes on like this.
func remaining(elapsed time.Duration, done, total int64) string {
	if done <= 0 || done >= total {
		return ""
	}
	rest := time.Duration(float64(elapsed) / float64(done) * float64(total-done))
	return ", about " + rest.Round(time.Second).String() + " left"
}

func explainAnalyze(err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: what containerd and Docker store is root's alone; run as root (sudo dedupctl analyze ...)",
			err)
	case errors.Is(err, inventory.ErrUnknown), errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("analyze: %w (see dedupctl analyze --help)", err)
	}
	return fmt.Errorf("analyze: %w%s", err, registryHint(err))
}

func writeAnalysis(w io.Writer, a Analysis) {
	if len(a.Images) == 0 {
		fmt.Fprintln(w, "no images there: nothing to deduplicate")
		return
	}
	for _, s := range a.Sources {
		fmt.Fprintf(w, "%s: %s of %s\n", s.Kind, plural(s.Images, "image", "images"), plural(s.Layers, "layer", "layers"))
	}
	fmt.Fprintln(w)
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "\tDISK\tSAVES\t\tINODES\tSAVES\t")
		row := func(name string, u AnalysisUsage) {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, size(u.Bytes), signed(a.Now.Bytes-u.Bytes, size),
				percent(a.Now.Bytes-u.Bytes, a.Now.Bytes),
				count(u.Inodes), signed(a.Now.Inodes-u.Inodes, count), percent(a.Now.Inodes-u.Inodes, a.Now.Inodes))
		}
		fmt.Fprintf(w, "now, as overlayfs\t%s\t\t\t%s\t\t\n", size(a.Now.Bytes), count(a.Now.Inodes))
		row("each layer once", a.Layer)
		row("each file once", a.File.AnalysisUsage)
		row("and Python's bytecode", a.Python.AnalysisUsage)
	})
	fmt.Fprintf(w, "\nThe last line is what dedup stores: %s in %s, %s of trees, %s of chain images, %s of directories.\n",
		size(a.Python.Packs.Bytes), plural(a.Python.Packs.Inodes, "pack", "packs"), size(a.Python.Trees.Bytes),
		size(a.Python.ChainImages.Bytes), size(a.Python.Directories.Bytes))
	switch {
	case a.Assumed != "":
		fmt.Fprintln(w, "It is assumed that the kernel mounts packs with blocks of 512 bytes, as Linux 6.4 does:\n"+
			"as root, analyze tries it. On a kernel that does not, packs take about a tenth more.")
	case !a.Dense:
		fmt.Fprintln(w, "This kernel does not mount packs with blocks of 512 bytes. On one that does (Linux 6.4),\n"+
			"packs take about a tenth less.")
	}
	if a.Blobs.Bytes > 0 {
		fmt.Fprintf(w, "containerd also keeps %s of the layers, %s. With dedup no container needs them:\n"+
			"blobs = \"drop\" in the daemon's config, or dedupctl trim, removes them (docs/blobs.md).\n",
			plural(a.Blobs.Inodes, "compressed blob", "compressed blobs"), size(a.Blobs.Bytes))
	}
	if a.Containers > 0 {
		fmt.Fprintf(w, "%s %s of the first line. It is freed when they are recreated with dedup. "+
			"What they have written (%s) is not touched.\n",
			plural(a.Containers, "container uses", "containers use"), size(a.InUse.Bytes), size(a.Writable.Bytes))
	}
	fmt.Fprintf(w, "The deepest image stacks %s; with dedup every image has one, and its packs.",
		plural(a.DeepestLowerdirs, "lower directory", "lower directories"))
	if a.DeepImages > 0 {
		fmt.Fprintf(w, " %s more than %d.", plural(a.DeepImages, "image has", "images have"), deepStack)
	}
	fmt.Fprintln(w)
	writeDuplicatePrefixes(w, a)
	for _, l := range a.LeftOut {
		fmt.Fprintf(w, "\nleft out: %s: %s\n", strings.Join(l.Images, ", "), l.Error)
	}
}

func writeDuplicatePrefixes(w io.Writer, a Analysis) {
	if len(a.Duplicates) == 0 {
		return
	}
	fmt.Fprintf(w, "\nStored more than once now: %s, %s.\n", plural(a.AllDuplicates.Files, "file", "files"),
		size(a.AllDuplicates.Bytes))
	table(w, func(w io.Writer) {
		fmt.Fprintln(w, "BELOW\tDISK\t\tFILES")
		for _, p := range a.Duplicates {
			path := filepath.Join("/", p.Path)
			if p.Rest {
				path += " (rest)"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", path, size(p.Bytes), percent(p.Bytes, a.AllDuplicates.Bytes), count(p.Files))
			for _, part := range p.Parts {
				fmt.Fprintf(w, "  %s\t%s\t%s\t%s\n", part.Path, size(part.Bytes), percent(part.Bytes, a.AllDuplicates.Bytes),
					count(part.Files))
			}
		}
	})
}

// signed writes a number that may be negative.
func signed(n int64, write func(int64) string) string {
	if n < 0 {
		return "-" + write(-n)
	}
	return write(n)
}
