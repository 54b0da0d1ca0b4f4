package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "pull two builds of one application with overlayfs and with dedup, and compare",
		Description: "Builds two images from a real Debian root file system and two separate pip installs,\n" +
			"the second with another owner, pushes each to a registry of its own on loopback,\n" +
			"pulls both with every subject on a fresh containerd, runs Python in a container of\n" +
			"each, and prints what it cost. Needs root.",
		Flags: []cli.Flag{
			&cli.PathFlag{Name: "out", Value: "out", Usage: "directory for demo.json"},
			&cli.IntFlag{Name: "runs", Value: 3, Usage: "repetitions; the table shows medians (and min-max)"},
			&cli.StringSliceFlag{Name: "subject", Value: cli.NewStringSlice("overlayfs", "dedup"),
				Usage: "snapshotters to measure, `NAME` may be overlayfs, native, erofs or dedup"},
			&cli.StringFlag{Name: "fidelity", Usage: "of dedup: exact, python or normalized (default: the daemon's)"},
			&cli.BoolFlag{Name: "igzip", Value: true, Usage: "let all subjects decompress with igzip (package isal), which " +
				"containerd and dedup use where it is installed; --igzip=false: with Go's libraries"},
			&cli.PathFlag{Name: "tmp", Usage: "directory for the nodes, on a disk as containerd would use (default: TMPDIR " +
				"or /tmp)"},
			&cli.PathFlag{Name: "docs", Usage: "Markdown `FILE` whose table (between <!-- demo --> and <!-- end of demo -->) " +
				"is written anew"},
			&cli.BoolFlag{Name: "json", Usage: "print demo.json instead of the table"},
		},
		Action: runDemo,
	}
}

func runDemo(c *cli.Context) (err error) {
	ctx, p := c.Context, newProgress(os.Stderr)
	subjects := c.StringSlice("subject")
	if err := checkDemo(c, subjects); err != nil {
		return err
	}
	igzip := c.Bool("igzip")
	if igzip {
		if err := node.Require(ctx, p.say, node.Igzip); err != nil {
			p.sayf("all subjects decompress with Go's libraries: %v", err)
			igzip = false
		}
	}
	images, err := demoImages(ctx, p)
	if err != nil {
		return err
	}
	tmp := c.Path("tmp")
	if tmp == "" {
		tmp = os.TempDir()
	}
	dir, err := os.MkdirTemp(tmp, "dedup-bench-")
	if err != nil {
		return fmt.Errorf("make a work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p.say("starting two registries on loopback and pushing one image to each")
	all, err := serve(ctx, dir, images)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll(all)) }()

	pl := plan{images: all, parent: tmp, fidelity: c.String("fidelity"), igzip: igzip,
		command: []string{"python3", "-c", inputs.Imports}}
	trials, err := interleave(ctx, p, pl, subjects, c.Int("runs"))
	if err != nil {
		return err
	}
	r := summarise(subjects, trials)
	r.Runs, r.Machine, r.Versions = c.Int("runs"), machine(tmp), versions(ctx)
	if r.Versions["gunzip"] = "Go's libraries"; igzip {
		r.Versions["gunzip"] = "igzip"
	}
	for _, img := range images {
		r.Images = append(r.Images, factsOf(img))
	}
	return finish(c, p, r)
}

// checkDemo fails early, before minutes of work.
func checkDemo(c *cli.Context, subjects []string) error {
	if c.Int("runs") < 1 || len(subjects) == 0 {
		return errors.New("demo: want at least one run and one subject")
	}
	if os.Geteuid() != 0 {
		return errors.New("demo: needs root: containerd, mounts and runc do; try sudo")
	}
	if slices.Contains(subjects, "erofs") {
		if _, err := node.MkfsErofs(); err != nil {
			return fmt.Errorf("demo: subject erofs: %w", err)
		}
	}
	if !slices.Contains(subjects, node.Snapshotter) {
		return nil
	}
	root, err := node.ModuleRoot()
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, "bin/containerd-dedup-grpc")); err != nil {
		return fmt.Errorf("demo: the daemon is not built, run `make build`: %w", err)
	}
	return nil
}

// interleave takes all subjects once, then all again in the opposite order, and so on, so
// that a machine that gets slower or faster meanwhile favours none.
func interleave(ctx context.Context, p *progress, pl plan, subjects []string, runs int) ([]trial, error) {
	var trials []trial
	order := slices.Clone(subjects)
	for run := range runs {
		for _, subject := range order {
			t, err := pl.take(ctx, subject)
			if err != nil {
				return nil, err
			}
			first, second := t.Steps[0], t.Steps[1]
			p.sayf("run %d of %d, %s: first pull %.2f s, rebuild %.2f s; python says: %s",
				run+1, runs, subject, first.Pull, second.Pull, strings.TrimSpace(second.Output))
			trials = append(trials, t)
		}
		slices.Reverse(order)
	}
	return trials, nil
}

func finish(c *cli.Context, p *progress, r demoReport) error {
	path := filepath.Join(c.Path("out"), "demo.json")
	if err := r.write(path); err != nil {
		return err
	}
	if docs := c.Path("docs"); docs != "" {
		if err := r.writeDocs(docs); err != nil {
			return err
		}
	}
	if c.Bool("json") {
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("print report: %w", err)
		}
		_, err = os.Stdout.Write(data)
		return err
	}
	fmt.Println()
	for _, img := range r.Images {
		fmt.Printf("%s: %d layers, %.1f MB compressed, %.1f MB of tar\n", img.Name, img.Layers, float64(img.Blobs)/1e6,
			float64(img.Tars)/1e6)
	}
	fmt.Printf("%s\n\n", r.caption())
	if err := r.print(os.Stdout); err != nil {
		return err
	}
	p.sayf("all figures are in %s", path)
	return nil
}

func factsOf(img demoImage) imageFacts {
	f := imageFacts{Name: img.name, Layers: len(img.layers)}
	for _, l := range img.layers {
		f.Blobs += l.Length
		f.Tars += l.TarSize
	}
	return f
}

func versions(ctx context.Context) map[string]string {
	v := map[string]string{"containerd": node.DefaultVersion}
	if runc, err := node.LookPath("runc"); err == nil {
		if out, err := exec.CommandContext(ctx, runc, "--version").Output(); err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			v["runc"] = strings.TrimPrefix(first, "runc version ")
		}
	}
	if root, err := node.ModuleRoot(); err == nil {
		if out, err := exec.CommandContext(ctx, "git", "-C", root, "rev-parse", "--short", "HEAD").Output(); err == nil {
			v["commit"] = strings.TrimSpace(string(out))
		}
	}
	return v
}
