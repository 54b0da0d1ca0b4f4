package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "measure scenarios with several snapshotters side by side",
		Description: "Every trial has a fresh containerd on a fresh disk. Inputs are real Debian and Python\n" +
			"packages, or the images that --image names, copied to a registry on loopback first.\n" +
			"Results go to the directory --out: results.json, results.md and SVG plots; what it already\n" +
			"holds for other scenarios and subjects stays. Needs root.\n\nScenarios: " + strings.Join(bench.Scenarios(), ", ") +
			"; and corpora (" + strings.Join(bench.CorporaScenarios(), ", ") + "), which download some gigabytes once.",
		Flags: append([]cli.Flag{
			&cli.StringSliceFlag{Name: "scenario", Value: cli.NewStringSlice("all"),
				Usage: "what to measure, `NAME[,NAME]`, all, or corpora"},
			&cli.StringSliceFlag{Name: "subject", Value: cli.NewStringSlice("overlayfs", "erofs", "dedup", bench.Limit),
				Usage: "snapshotters: `NAME` is overlayfs, native, erofs, dedup, dedup-exact, dedup-normalized, all (of " +
					"these), limit (only decompresses and hashes), or NAME=unix:///path/of/socket[?root=DIR] for any other that " +
					"runs already"},
			&cli.Float64Flag{Name: "scale", Value: 1,
				Usage: "size of layers100, memory, restart and scale; 50 is that of published figures"},
			&cli.StringSliceFlag{Name: "image", Usage: "measure this image, `REF` in any registry, instead of built ones; " +
				"the first is pulled cold, further ones on top (scenario rebuild)"},
			&cli.StringFlag{Name: "containerd", Value: node.DefaultVersion, Usage: "version of containerd: " +
				strings.Join(versionsKnown(), ", ")},
			&cli.IntFlag{Name: "unpacks", Value: 1,
				Usage: "containerd's max_concurrent_unpacks, where the snapshotter allows more than 1"},
			&cli.StringSliceFlag{Name: "docs", Usage: "Markdown `FILE` whose tables (between <!-- results --> and <!-- end " +
				"of results -->, or corpora) are written anew, with plots in a directory beside it"},
		}, commonFlags()...),
		Action: runRun,
	}
}

// commonFlags are those of run and limit.
func commonFlags() []cli.Flag {
	return []cli.Flag{
		&cli.IntFlag{Name: "runs", Value: 3, Usage: "repetitions; results are medians with minimum and maximum"},
		&cli.PathFlag{Name: "out", Value: "out/bench", Usage: "`DIR` for results"},
		&cli.PathFlag{Name: "tmp", Usage: "directory for disks and registries (default: TMPDIR or /tmp)"},
		&cli.PathFlag{Name: "daemon", Usage: "the dedup daemon's binary (default: bin/containerd-dedup-grpc)"},
		&cli.BoolFlag{Name: "igzip", Value: true, Usage: "let all subjects decompress with igzip where it is installed"},
		&cli.BoolFlag{Name: "json", Usage: "print results.json instead of tables"},
	}
}

func versionsKnown() []string {
	known, err := node.Versions()
	if err != nil {
		return []string{node.DefaultVersion} // outside of the repository
	}
	return known
}

func runRun(c *cli.Context) error {
	p := newProgress(os.Stderr)
	opts, err := options(c, p)
	if err != nil {
		return err
	}
	opts.Scale, opts.Images, opts.Version = c.Float64("scale"), c.StringSlice("image"), c.String("containerd")
	opts.Unpacks = c.Int("unpacks")
	if opts.Scenarios, err = chosen(c.StringSlice("scenario")); err != nil {
		return err
	}
	if opts.Subjects, err = bench.ParseSubjects(c.StringSlice("subject")); err != nil {
		return err
	}
	if opts.Scale <= 0 {
		return errors.New("run: --scale has to be above 0")
	}
	return measure(c, p, opts)
}

// options reads the flags that run and limit share, and installs igzip.
func options(c *cli.Context, p *progress) (bench.Options, error) {
	opts := bench.Options{
		Runs: c.Int("runs"), Tmp: c.Path("tmp"), Daemon: c.Path("daemon"), Igzip: c.Bool("igzip"), Say: p.say, Scale: 1,
	}
	if opts.Runs < 1 {
		return opts, errors.New("want at least one run")
	}
	if os.Geteuid() != 0 {
		return opts, errors.New("needs root: containerd, mounts and runc do; try sudo")
	}
	if opts.Daemon != "" {
		abs, err := filepath.Abs(opts.Daemon)
		if err != nil {
			return opts, err
		}
		opts.Daemon = abs
	}
	if opts.Igzip {
		if err := node.Require(c.Context, p.say, node.Igzip); err != nil {
			p.sayf("all subjects decompress with Go's libraries: %v", err)
			opts.Igzip = false
		}
	}
	return opts, nil
}

// measure runs, and keeps results after every group.
func measure(c *cli.Context, p *progress, opts bench.Options) error {
	before, err := report.Read(c.Path("out"))
	if err != nil {
		return err
	}
	about := aboutRun(c.Context, opts)
	result := func(samples []report.Sample) report.Report {
		r := newReport(report.Merge(before.Results, report.Summarise(samples)), about)
		return r
	}
	opts.Keep = func(samples []report.Sample) error { return result(samples).WriteData(c.Path("out")) }
	out, err := bench.Run(c.Context, opts)
	about.Skipped = out.Skipped
	r := result(out.Samples)
	if len(out.Samples) > 0 {
		err = errors.Join(err, r.Write(c.Path("out")))
	}
	if err != nil {
		return err
	}
	if err := writeDocs(c, r); err != nil {
		return err
	}
	if err := show(c, r); err != nil {
		return err
	}
	p.sayf("results and plots are in %s", c.Path("out"))
	return nil
}

func writeDocs(c *cli.Context, r report.Report) error {
	for _, path := range c.StringSlice("docs") {
		if err := r.WriteDocs(path); err != nil {
			return err
		}
	}
	return nil
}

func newReport(results []report.Result, about report.About) report.Report {
	order := append(bench.Scenarios(), bench.CorporaScenarios()...)
	slices.SortStableFunc(results, func(a, b report.Result) int {
		return slices.Index(order, a.Scenario) - slices.Index(order, b.Scenario)
	})
	return report.Report{Results: results, About: about, Baseline: bench.Baseline,
		References: []string{"erofs", bench.Limit}}
}

func show(c *cli.Context, r report.Report) error {
	if !c.Bool("json") {
		return r.Print(os.Stdout)
	}
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(r.Results)
}

func chosen(names []string) ([]string, error) {
	all, corpora := bench.Scenarios(), bench.CorporaScenarios()
	var out []string
	for _, name := range names {
		switch {
		case name == "all":
			out = append(out, all...)
		case name == "corpora":
			out = append(out, corpora...)
		case slices.Contains(all, name), slices.Contains(corpora, name):
			out = append(out, name)
		default:
			return nil, fmt.Errorf("scenario %q: want one of %s, or all, or corpora", name,
				strings.Join(append(all, corpora...), ", "))
		}
	}
	return out, nil
}

func aboutRun(ctx context.Context, opts bench.Options) report.About {
	tmp := opts.Tmp
	if tmp == "" {
		tmp = os.TempDir()
	}
	a := report.About{Machine: machine(tmp), Versions: versions(ctx), Time: time.Now().UTC(), Settings: map[string]string{
		"runs": fmt.Sprint(opts.Runs), "scale": fmt.Sprint(opts.Scale),
	}}
	if opts.Version != "" {
		a.Versions["containerd"] = opts.Version
	}
	a.Versions["gunzip"] = "Go's libraries"
	if opts.Igzip {
		a.Versions["gunzip"] = "igzip"
	}
	if opts.Unpacks > 1 {
		a.Settings["unpacks"] = fmt.Sprint(opts.Unpacks)
	}
	if len(opts.Images) > 0 {
		a.Settings["images"] = strings.Join(opts.Images, " ")
	}
	if path, err := node.MkfsErofs(); err == nil {
		if out, err := exec.CommandContext(ctx, path, "--version").Output(); err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			a.Versions["mkfs.erofs"] = strings.TrimSpace(first[strings.LastIndexByte(first, ' ')+1:])
		}
	}
	return a
}

func reportCommand() *cli.Command {
	return &cli.Command{
		Name:  "report",
		Usage: "tables and plots of earlier runs, without measuring",
		Flags: []cli.Flag{
			&cli.PathFlag{Name: "out", Value: "out/bench", Usage: "`DIR` with results.json"},
			&cli.StringSliceFlag{Name: "docs", Usage: "Markdown `FILE` to write the tables into, as run does; DIR is only read"},
			&cli.BoolFlag{Name: "json", Usage: "print results.json instead of tables"},
		},
		Action: func(c *cli.Context) error {
			kept, err := report.Read(c.Path("out"))
			if err != nil {
				return err
			}
			if len(kept.Results) == 0 {
				return fmt.Errorf("report: no results in %s: run `dedup-bench run --out %[1]s` first", c.Path("out"))
			}
			r := newReport(kept.Results, kept.About)
			if len(c.StringSlice("docs")) > 0 {
				return writeDocs(c, r)
			}
			if err := r.Write(c.Path("out")); err != nil {
				return err
			}
			return show(c, r)
		},
	}
}
