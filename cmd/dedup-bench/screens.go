package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

func screensCommand() *cli.Command {
	return &cli.Command{
		Name:  "screens",
		Usage: "play the self-hosted Sentry case, from analyze to the freed disk, and write what is seen into the docs",
		Description: "Builds the images of five Python services in two releases, each with a pip install of its own.\n" +
			"Pulls them into a containerd with overlayfs on a disk of its own, and runs a container of each service.\n" +
			"Then does what an operator would: analyze, migrate, make the containers anew, remove what is old, look\n" +
			"around. Needs root.",
		Flags: []cli.Flag{
			&cli.PathFlag{Name: "tmp", Usage: "directory for the disk (default: TMPDIR or /tmp)"},
			&cli.StringSliceFlag{Name: "docs", Usage: "Markdown `FILE` in which the lines between <!-- screen: NAME --> and " +
				"<!-- end of screen --> are written anew"},
			&cli.IntFlag{Name: "releases", Value: 2, Usage: "1 is enough to try the command"},
		},
		Action: func(c *cli.Context) error {
			if os.Geteuid() != 0 {
				return errors.New("screens: needs root: containerd, mounts and runc do; try sudo")
			}
			tmp := c.Path("tmp")
			if tmp == "" {
				tmp = os.TempDir()
			}
			s := &screens{progress: newProgress(os.Stderr), shown: map[string]string{}}
			if err := s.play(c.Context, tmp, c.Int("releases")); err != nil {
				return err
			}
			for _, path := range c.StringSlice("docs") {
				if err := s.write(path); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// screens plays an operator's session and keeps what was seen.
type screens struct {
	*progress
	node    *node.Node
	replace *strings.Replacer // what a reader's node calls it
	shown   map[string]string // by name
}

// fleetImage is an image that is served.
type fleetImage struct{ service, ref string }

func (s *screens) play(ctx context.Context, tmp string, releases int) (err error) {
	home, err := os.MkdirTemp(tmp, "dedup-bench-")
	if err != nil {
		return fmt.Errorf("make a work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(home)) }()
	registry, err := bench.StartRegistry(ctx, home)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	fleet, err := s.fleet(ctx, registry, home, releases)
	if err != nil {
		return err
	}
	return bench.WithDisk(ctx, tmp, func(disk string) (err error) {
		if s.node, err = node.Start(ctx, node.Options{Parent: disk, Say: s.say}); err != nil {
			return err
		}
		defer func() {
			if err != nil && ctx.Err() == nil {
				err = fmt.Errorf("%w\n%s", err, s.node.Logs(20))
			}
			err = errors.Join(err, s.node.Close())
		}()
		s.replace = strings.NewReplacer(
			filepath.Join(s.node.Dir(), "containerd.toml"), "/etc/containerd/config.toml",
			filepath.Join(s.node.Dir(), "c"), "/var/lib/containerd", s.node.DedupRoot(), "/var/lib/containerd-dedup-grpc",
			s.node.DedupAddress(), "/run/containerd-dedup-grpc/containerd-dedup-grpc.sock", s.node.Address(),
			"/run/containerd/containerd.sock",
			filepath.Join(s.node.Dir(), "run"), "/run/containerd-dedup-grpc", registry.Addr, "registry.example", s.node.Dir(),
			"/node")
		return s.session(ctx, fleet)
	})
}

func (s *screens) fleet(ctx context.Context, r *bench.Registry, home string, releases int) (fleet []fleetImage,
	err error) {
	set, err := inputs.Open(s.say)
	if err != nil {
		return nil, err
	}
	base, err := set.Debian(ctx)
	if err != nil {
		return nil, err
	}
	all, err := set.Fleet(ctx)
	if err != nil {
		return nil, err
	}
	for _, release := range all {
		if release.Number > releases {
			continue
		}
		if err := image.Seed(home, base, release.Layer); err != nil {
			return nil, err
		}
		img, err := image.New(image.Options{Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"python3"}}, base, release.Layer)
		if err != nil {
			return nil, err
		}
		ref := fmt.Sprintf("%s/sentry/%s:%d", r.Addr, release.Service, release.Number)
		if err := image.Push(ctx, ref, img); err != nil {
			return nil, err
		}
		fleet = append(fleet, fleetImage{release.Service, ref})
	}
	return fleet, nil
}

// session is what happens on the node.
func (s *screens) session(ctx context.Context, fleet []fleetImage) error {
	s.sayf("pulling %d images with overlayfs, and running a container of each service", len(fleet))
	for _, img := range fleet {
		if err := s.node.Pull(ctx, "overlayfs", img.ref); err != nil {
			return err
		}
	}
	containers, err := s.start(ctx, "overlayfs", fleet)
	if err != nil {
		return err
	}
	if err := s.disk(ctx, "disk before", "overlayfs"); err != nil {
		return err
	}
	if err := s.dedupctl(ctx, "analyze", "analyze"); err != nil {
		return err
	}
	if err := s.node.StartDaemon(ctx); err != nil {
		return err
	}
	if err := s.dedupctl(ctx, "migrate", "migrate"); err != nil {
		return err
	}
	if err := s.dedupctl(ctx, "dry run", "migrate", "--remove-old", "--dry-run"); err != nil {
		return err
	}
	s.say("making the containers anew")
	for _, id := range containers {
		if err := s.node.RemoveContainer(ctx, id); err != nil {
			return err
		}
	}
	if _, err := s.start(ctx, node.Snapshotter, fleet); err != nil {
		return err
	}
	if err := s.dedupctl(ctx, "remove", "migrate", "--remove-old"); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.disk(ctx, "disk after", "overlayfs", node.Snapshotter); err != nil {
		return err
	}
	for _, verb := range []string{"status", "images", "layers", "duplicates", "fsck", "doctor"} {
		if err := s.dedupctl(ctx, verb, verb); err != nil {
			return err
		}
	}
	return s.illness(ctx)
}

// illness shows what doctor says of a daemon that does not run, and of a config that asks the wrong differ first.
func (s *screens) illness(ctx context.Context) error {
	if err := s.node.StopDaemon(); err != nil {
		return err
	}
	config := filepath.Join(s.node.Dir(), "containerd.toml")
	text, err := os.ReadFile(config)
	if err != nil {
		return fmt.Errorf("read containerd's config: %w", err)
	}
	wrong := differOrder.ReplaceAll(text, []byte("default = ['walking', '"+node.Differ+"']"))
	if err := os.WriteFile(config, wrong, 0o600); err != nil {
		return fmt.Errorf("write containerd's config: %w", err)
	}
	return s.dedupctl(ctx, "illness", "doctor", "--quiet")
}

// start runs a container of the newest image of each service.
func (s *screens) start(ctx context.Context, snapshotter string, fleet []fleetImage) (ids []string, err error) {
	newest := map[string]string{}
	for _, img := range fleet {
		newest[img.service] = img.ref
	}
	for _, service := range slices.Sorted(maps.Keys(newest)) {
		id, err := s.node.RunDetached(ctx, snapshotter, newest[service], "python3", "-c", "import time; time.sleep(1000)")
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// dedupctl shows one verb.
func (s *screens) dedupctl(ctx context.Context, name string, args ...string) error {
	root, err := node.ModuleRoot()
	if err != nil {
		return err
	}
	real := append([]string{"--address", s.node.DedupAddress()}, args...)
	switch args[0] {
	case "analyze":
		real = append(real, filepath.Join(s.node.Dir(), "c"))
	case "migrate":
		real = append(real, "--containerd-address", s.node.Address())
	case "doctor":
		real = append(real, "--config", filepath.Join(s.node.Dir(), "dedup.toml"))
	}
	return s.show(ctx, name, "dedupctl "+strings.Join(args, " "), filepath.Join(root, "bin/dedupctl"), real...)
}

// settle waits until packs are merged: what two layers brought at the same time lies in two packs until then.
func (s *screens) settle(ctx context.Context) error {
	const poll, calm = time.Second, 10
	last, same := uint64(0), 0
	for same < calm {
		var st unix.Statfs_t // the node has a disk of its own
		if err := errors.Join(syncfs(s.node.Dir()), unix.Statfs(s.node.Dir(), &st)); err != nil {
			return err
		}
		if same++; st.Bfree != last {
			last, same = st.Bfree, 0
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// disk shows what the directories with images hold.
func (s *screens) disk(ctx context.Context, name string, snapshotters ...string) error {
	if err := syncfs(s.node.Dir()); err != nil {
		return err
	}
	args := []string{"--si", "--summarize", "--one-file-system"}
	shown := "du --si -s"
	for _, sn := range snapshotters {
		args = append(args, s.node.SnapshotterRoot(sn))
		shown += " " + s.replace.Replace(s.node.SnapshotterRoot(sn))
	}
	return s.show(ctx, name, shown, "du", args...)
}

// show runs a command and keeps it with its output, as a reader's node would show them.
func (s *screens) show(ctx context.Context, name, shown, bin string, args ...string) error {
	var errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	const found = 3 // dedupctl doctor: this machine has a problem, which is worth seeing
	if err != nil && cmd.ProcessState.ExitCode() != found {
		return fmt.Errorf("%s: %w\n%s%s", shown, err, out, &errOut)
	}
	text := "$ " + shown + "\n" + container.ReplaceAllString(s.replace.Replace(string(out)), "container-")
	text = build.ReplaceAllString(text, "<version>$2")
	text = trailing.ReplaceAllString(text, "")
	s.shown[name] = text
	fmt.Println(text)
	return nil
}

// container is how the harness names containers.
var container = regexp.MustCompile(`detached-\d+-`)

// build is how `make build` names a version between releases.
var build = regexp.MustCompile(`\b[0-9a-f]{7,12}(-dirty)?( runs|, fidelity)`)

var differOrder = regexp.MustCompile(`default = \[[^]]*\]`)

// trailing blanks pad a table's last column.
var trailing = regexp.MustCompile(`(?m) +$`)

var screenMark = regexp.MustCompile(`(?s)(<!-- screen: ([a-z ]+) -->\n).*?(<!-- end of screen -->)`)

// write puts the screens into a Markdown file.
func (s *screens) write(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("write screens: %w", err)
	}
	var unknown error
	out := screenMark.ReplaceAllStringFunc(string(text), func(block string) string {
		m := screenMark.FindStringSubmatch(block)
		shown, ok := s.shown[m[2]]
		if !ok {
			unknown = errors.Join(unknown,
				fmt.Errorf("write screens: %s wants the screen %q, which is not among those that were seen", path, m[2]))
			return block
		}
		return m[1] + "```console\n" + strings.TrimRight(shown, "\n") + "\n```\n" + m[3]
	})
	if unknown != nil {
		return unknown
	}
	return os.WriteFile(path, []byte(out), 0o644)
}
