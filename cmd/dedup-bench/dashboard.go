package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

func dashboardCommand() *cli.Command {
	return &cli.Command{
		Name:  "dashboard",
		Usage: "play some minutes on a node, and draw Grafana's dashboard of them without Grafana",
		Description: "Pulls, runs, commits and removes images on a containerd with dedup, trims their blobs, and checks\n" +
			"the store. Scrapes the daemon meanwhile. Then integration/tools/dashboard evaluates every query of\n" +
			"the dashboard with Prometheus's engine, and draws the panels. A query that returns nothing is an\n" +
			"error. Needs root.",
		Flags: []cli.Flag{
			&cli.PathFlag{Name: "tmp", Usage: "directory for the disk (default: TMPDIR or /tmp)"},
			&cli.PathFlag{Name: "out", Value: "docs/monitoring/dashboard.svg", Usage: "the SVG `FILE` to write"},
			&cli.PathFlag{Name: "scrapes", Usage: "draw these scrapes instead, from the `DIR` of an earlier --keep"},
			&cli.PathFlag{Name: "keep", Usage: "keep the scrapes in `DIR`"},
		},
		Action: func(c *cli.Context) (err error) {
			scrapes := c.Path("scrapes")
			if scrapes != "" {
				return drawDashboard(c.Context, scrapes, c.Path("out"))
			}
			if os.Geteuid() != 0 {
				return errors.New("dashboard: needs root: containerd, mounts and runc do; try sudo")
			}
			if scrapes = c.Path("keep"); scrapes == "" {
				if scrapes, err = os.MkdirTemp("", "dedup-bench-scrapes-"); err != nil {
					return err
				}
				defer func() { err = errors.Join(err, os.RemoveAll(scrapes)) }()
			}
			tmp := c.Path("tmp")
			if tmp == "" {
				tmp = os.TempDir()
			}
			w := &watched{progress: newProgress(os.Stderr), scrapes: scrapes}
			if err := w.play(c.Context, tmp); err != nil {
				return err
			}
			return drawDashboard(c.Context, scrapes, c.Path("out"))
		},
	}
}

// drawDashboard runs the program that draws; it is a module of its own.
func drawDashboard(ctx context.Context, scrapes, out string) error {
	root, err := node.ModuleRoot()
	if err != nil {
		return err
	}
	var paths [2]string
	for i, path := range []string{scrapes, out} {
		if paths[i], err = filepath.Abs(path); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(paths[1]), 0o755); err != nil {
		return err
	}
	goBin, err := node.LookPath("go")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, goBin, "run", "-C", filepath.Join(root, "integration/tools/dashboard"), ".",
		"-board", filepath.Join(root, "deploy/grafana-dashboard.json"), "-scrapes", paths[0], "-out", paths[1])
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("draw the dashboard: %w", err)
	}
	return nil
}

// watched is a node whose daemon is scraped while a session is played.
type watched struct {
	*progress
	scrapes  string // directory
	node     *node.Node
	registry *bench.Registry
	home     string // directory of layers
}

// scrapeInterval is a short one: a session has minutes, not days.
const scrapeInterval = 2 * time.Second

func (w *watched) play(ctx context.Context, tmp string) (err error) {
	if w.home, err = os.MkdirTemp(tmp, "dedup-bench-"); err != nil {
		return fmt.Errorf("make a work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(w.home)) }()
	if w.registry, err = bench.StartRegistry(ctx, w.home); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.registry.Close()) }()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		return err
	}
	return bench.WithDisk(ctx, tmp, func(disk string) (err error) {
		opts := node.Options{Parent: disk, Say: w.say, Daemon: map[string]any{"metrics_address": address}}
		if w.node, err = node.Start(ctx, opts); err != nil {
			return err
		}
		defer func() {
			if err != nil && ctx.Err() == nil {
				err = fmt.Errorf("%w\n%s", err, w.node.Logs(20))
			}
			err = errors.Join(err, w.node.Close())
		}()
		if err := w.node.StartDaemon(ctx); err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- w.scrape(ctx, "http://"+address+"/metrics") }()
		err = w.session(ctx)
		cancel()
		return errors.Join(err, <-done)
	})
}

func (w *watched) scrape(ctx context.Context, url string) error {
	tick := time.NewTicker(scrapeInterval)
	defer tick.Stop()
	for {
		at := time.Now().UnixMilli()
		resp, err := http.Get(url)
		if err != nil {
			return fmt.Errorf("scrape: %w", err)
		}
		body, err := io.ReadAll(resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return fmt.Errorf("scrape: %w", err)
		}
		if err := os.WriteFile(filepath.Join(w.scrapes, fmt.Sprintf("%d.prom", at)), body, 0o644); err != nil {
			return fmt.Errorf("keep a scrape: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// session is what happens on the node, with a pause after each step.
func (w *watched) session(ctx context.Context) error {
	set, err := inputs.Open(w.say)
	if err != nil {
		return err
	}
	base, err := set.Debian(ctx)
	if err != nil {
		return err
	}
	var apps []*image.Layer
	for n := 1; n <= 2; n++ {
		app, err := set.App(ctx, n)
		if err != nil {
			return err
		}
		apps = append(apps, app)
	}
	own, err := image.FromEntries(w.home, image.LayerOptions{Compression: image.GoGzip},
		image.File("etc/service", string(bytes.Repeat([]byte("a service\n"), 100_000))))
	if err != nil {
		return err
	}
	bad, err := image.NewLayer(w.home, image.LayerOptions{}, func(to io.Writer) error {
		_, err := to.Write(bytes.Repeat([]byte("no tar "), 1000))
		return err
	})
	if err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{
		func(context.Context) error { return nil },
		func(ctx context.Context) error { return w.pull(ctx, "one/service:1", base, own, apps[0]) },
		func(ctx context.Context) error { return w.containers(ctx, "one/service:1", 5) },
		func(ctx context.Context) error { return w.pull(ctx, "two/service:2", base, own, apps[1]) },
		func(ctx context.Context) error { return w.containers(ctx, "two/service:2", 5) },
		func(ctx context.Context) error { return w.pull(ctx, "three/service:3", base, apps[0], own) },
		func(ctx context.Context) error { return w.commit(ctx, "three/service:3") },
		func(ctx context.Context) error {
			if err := w.pull(ctx, "four/damaged:1", base, bad); err == nil {
				return errors.New("a layer that is no tar was pulled")
			}
			return nil
		},
		func(ctx context.Context) error { return w.dedupctl(ctx, "fsck") },
		func(ctx context.Context) error { return w.dedupctl(ctx, "trim") },
		func(ctx context.Context) error { return w.complete(ctx, "one/service:1") },
		func(ctx context.Context) error { return w.remove(ctx, "two/service:2") },
		func(ctx context.Context) error { return w.containers(ctx, "three/service:3", 3) },
	} {
		if err := step(ctx); err != nil {
			return err
		}
		select {
		case <-time.After(6 * scrapeInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (w *watched) ref(name string) string { return w.registry.Addr + "/" + name }

func (w *watched) pull(ctx context.Context, name string, layers ...*image.Layer) error {
	if err := image.Seed(w.home, layers...); err != nil {
		return err
	}
	img, err := image.New(image.Options{Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Cmd: []string{"python3"}}, layers...)
	if err != nil {
		return err
	}
	if err := image.Push(ctx, w.ref(name), img); err != nil {
		return err
	}
	w.say("pulling " + name)
	return w.node.Pull(ctx, node.Snapshotter, w.ref(name))
}

// containers runs some, one after the other.
func (w *watched) containers(ctx context.Context, name string, count int) error {
	w.say("running containers of " + name)
	for range count {
		if _, err := w.node.Run(ctx, node.Snapshotter, w.ref(name), "python3", "-c", inputs.Imports); err != nil {
			return err
		}
	}
	return nil
}

// commit writes a layer of what a container has changed, and commits its snapshot.
func (w *watched) commit(ctx context.Context, name string) error {
	w.say("committing a container of " + name)
	c := w.node.Client()
	ctx, done, err := c.WithLease(ctx, leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	chain, err := w.node.ChainID(ctx, w.ref(name))
	if err != nil {
		return err
	}
	sn, key := c.SnapshotService(node.Snapshotter), node.NewID("changed")
	if _, err := sn.Prepare(ctx, key, chain); err != nil {
		return err
	}
	mounts, err := sn.Mounts(ctx, key)
	if err != nil {
		return err
	}
	err = w.node.WithMounts(mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "etc/changed"), bytes.Repeat([]byte("changed\n"), 1000), 0o644)
	})
	if err != nil {
		return err
	}
	if _, err := rootfs.CreateDiff(ctx, key, sn, c.DiffService()); err != nil {
		return fmt.Errorf("write a layer: %w", err)
	}
	return sn.Commit(ctx, node.NewID("committed"), key)
}

func (w *watched) remove(ctx context.Context, names ...string) error {
	for _, name := range names {
		w.say("removing " + name)
		if err := w.node.Client().ImageService().Delete(ctx, w.ref(name), images.SynchronousDelete()); err != nil {
			return err
		}
	}
	return nil
}

func (w *watched) complete(ctx context.Context, name string) error {
	return w.dedupctl(ctx, "complete", "--containerd-address", w.node.Address(), "--hosts-dir", "", "--plain-http",
		w.ref(name))
}

func (w *watched) dedupctl(ctx context.Context, verb string, args ...string) error {
	root, err := node.ModuleRoot()
	if err != nil {
		return err
	}
	w.say("dedupctl " + verb)
	args = append([]string{"--address", w.node.DedupAddress(), verb}, args...)
	out, err := exec.CommandContext(ctx, filepath.Join(root, "bin/dedupctl"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("dedupctl %s: %w\n%s", verb, err, out)
	}
	return nil
}
