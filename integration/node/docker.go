package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Docker is a dockerd on a node's containerd, without networks. Nothing is installed: the distribution's packages are
// unpacked into the cache.
type Docker struct {
	node    *Node
	tools   string
	process *process
}

// StartDocker fetches or builds dockerd if need be, starts it and waits until it serves. With a snapshotter it is
// Docker 29 with the containerd image store on that one, else the distribution's dockerd with its own storage driver
// overlay2. The caller closes it before the node.
func (n *Node) StartDocker(ctx context.Context, snapshotter string) (*Docker, error) {
	tools, err := fetchDocker(ctx, n.opts.Say)
	if err != nil {
		return nil, err
	}
	d := &Docker{node: n, tools: tools}
	bin := filepath.Join(tools, "usr/sbin/dockerd")
	args := []string{"--storage-driver", "overlay2"}
	if snapshotter != "" {
		if bin, err = BuildDockerd(ctx, n.opts.Say); err != nil {
			return nil, err
		}
		args = []string{"--storage-driver", snapshotter, "--feature", "containerd-snapshotter=true", "--feature",
			"time-namespaces=false"}
	}
	args = append(args, "--data-root", d.Root(), "--exec-root", filepath.Join(n.dir, "run/docker"), "--pidfile",
		filepath.Join(n.dir, "run/docker.pid"),
		"--containerd", n.Address(), "--host", d.host(),
		"--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false", "--userland-proxy=false")
	if d.process, err = startProcess("docker", n.LogPath("docker"), d.env(), bin, args...); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	err = d.process.waitReady(ctx, func(ctx context.Context) error {
		_, err := d.Run(ctx, "version")
		return err
	})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Root is Docker's directory.
func (d *Docker) Root() string { return filepath.Join(d.node.dir, "docker") }

func (d *Docker) host() string { return "unix://" + filepath.Join(d.node.dir, "run/docker.sock") }

// env has the unpacked libraries, and PATH with what dockerd starts.
func (d *Docker) env() []string {
	var env []string
	for _, kv := range d.node.env() {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			kv = "PATH=" + filepath.Join(d.tools, "usr/bin") + ":" + path
		}
		env = append(env, kv)
	}
	libs, _ := filepath.Glob(filepath.Join(d.tools, "usr/lib/*-linux-gnu"))
	more, _ := filepath.Glob(filepath.Join(d.tools, "lib/*-linux-gnu"))
	// A newer dockerd shall answer the distribution's older client.
	return append(env, "DOCKER_MIN_API_VERSION=1.24", "LD_LIBRARY_PATH="+strings.Join(append(libs, more...), ":"))
}

// Run runs Docker's client and returns its standard output. Builds are BuildKit's in dockerd.
func (d *Docker) Run(ctx context.Context, args ...string) (string, error) {
	return d.client(ctx, filepath.Join(d.tools, "usr/bin/docker"), "DOCKER_BUILDKIT=1", args)
}

// Compose builds Docker Compose if need be, runs it and returns its standard output. Builds are those of dockerd's own
// builder: with BuildKit, Compose wants a plugin of Docker's client.
func (d *Docker) Compose(ctx context.Context, args ...string) (string, error) {
	bin, err := BuildCompose(ctx, d.node.opts.Say)
	if err != nil {
		return "", err
	}
	return d.client(ctx, bin, "DOCKER_BUILDKIT=0", args)
}

func (d *Docker) client(ctx context.Context, bin, builder string, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, bin, args...)
	home := filepath.Join(d.node.dir, "docker-client") // no credentials of this machine
	cmd.Env = append(d.env(), "DOCKER_HOST="+d.host(), "HOME="+home, "DOCKER_CONFIG="+home, builder)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(bin), strings.Join(args, " "), err,
			tail(errOut.Bytes(), 20))
	}
	return out.String(), nil
}

// Stop ends dockerd, and with it what runs in containers.
func (d *Docker) Stop() error { return d.process.stop(unix.SIGTERM, 30*time.Second) }

// Close removes all containers and ends dockerd.
func (d *Docker) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var errs []error
	if ids, err := d.Run(ctx, "ps", "--all", "--quiet"); err == nil && ids != "" {
		_, err := d.Run(ctx, append([]string{"rm", "--force"}, strings.Fields(ids)...)...)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, d.Stop())...)
}

// fetchDocker unpacks the packages of dockerd and of the libraries that it needs into the cache.
func fetchDocker(ctx context.Context, say func(string)) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "tools", "docker")
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("get dockerd: %w", err)
	}
	unlock, err := Lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", fmt.Errorf("%w: dockerd, and there is no apt-get to get it with", ErrMissing)
	}
	if say != nil {
		say("getting dockerd with apt-get (once)")
	}
	staging := dir + ".new"
	if err := errors.Join(os.RemoveAll(staging), os.Mkdir(staging, 0o755)); err != nil {
		return "", fmt.Errorf("get dockerd: %w", err)
	}
	if err := downloadDocker(ctx, staging); err != nil {
		if uerr := apt(ctx, "update"); uerr != nil {
			return "", fmt.Errorf("%w: dockerd: %w", ErrMissing, uerr)
		}
		if err := downloadDocker(ctx, staging); err != nil {
			return "", fmt.Errorf("%w: dockerd: %w", ErrMissing, err)
		}
	}
	return dir, os.Rename(staging, dir)
}

func downloadDocker(ctx context.Context, dir string) error {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--no-recommends", "--no-suggests", "docker.io").Output()
	if err != nil {
		return fmt.Errorf("apt-cache depends docker.io: %w", err)
	}
	packages := []string{"docker.io"}
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: lib"); ok && !strings.Contains(name, "<") &&
			name != "c6" {
			packages = append(packages, "lib"+name)
		}
	}
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "download"}, packages...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download %s: %w\n%s", strings.Join(packages, " "), err, tail(out, 10))
	}
	archives, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return err
	}
	for _, a := range archives {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", a, dir).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w\n%s", a, err, tail(out, 10))
		}
		if err := os.Remove(a); err != nil {
			return err
		}
	}
	return nil
}
