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

// BuildKit is a buildkitd whose worker is a node's containerd, without networks.
type BuildKit struct {
	node    *Node
	tools   string
	dir     string
	process *process
}

// StartBuildKit builds BuildKit if need be, starts it on a snapshotter of the node, in a containerd namespace of its
// own, and waits until it serves. The caller closes it before the node.
func StartBuildKit(ctx context.Context, n *Node, snapshotter string) (*BuildKit, error) {
	tools, err := BuildBuildKit(ctx, n.opts.Say)
	if err != nil {
		return nil, err
	}
	b := &BuildKit{node: n, tools: tools, dir: filepath.Join(n.dir, "buildkit-"+snapshotter)}
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	data, err := encode(b.config(snapshotter))
	if err != nil {
		return nil, err
	}
	config := filepath.Join(b.dir, "buildkitd.toml")
	if err := os.WriteFile(config, data, 0o600); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	b.process, err = startProcess("buildkitd", b.LogPath(), n.env(), filepath.Join(tools, "buildkitd"), "--config", config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	err = b.process.waitReady(ctx, func(ctx context.Context) error {
		_, err := b.Ctl(ctx, "debug", "workers")
		return err
	})
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (b *BuildKit) config(snapshotter string) table {
	return table{
		"root": b.Root(),
		"grpc": table{"address": []string{b.Address()}},
		"otel": table{"socketPath": filepath.Join(b.dir, "otel.sock")},
		"cdi":  table{"disabled": true},
		"worker": table{
			"oci": table{"enabled": false},
			"containerd": table{
				"enabled": true, "address": b.node.Address(), "namespace": b.Namespace(), "snapshotter": snapshotter,
				"networkMode": "host", "gc": false,
				"runtime": table{"name": "io.containerd.runc.v2", "options": table{"Root": filepath.Join(b.node.dir, "runc")}},
			},
		},
	}
}

// Root is the directory in which buildkitd keeps what it knows of its cache.
func (b *BuildKit) Root() string { return filepath.Join(b.dir, "root") }

// Namespace is the containerd namespace that it works in.
func (b *BuildKit) Namespace() string { return filepath.Base(b.dir) }

// Pid is that of buildkitd.
func (b *BuildKit) Pid() int { return b.process.pid() }

// Address is where it listens.
func (b *BuildKit) Address() string { return "unix://" + filepath.Join(b.dir, "buildkitd.sock") }

// LogPath is the file with its output.
func (b *BuildKit) LogPath() string { return b.node.LogPath(filepath.Base(b.dir)) }

// Ctl runs buildctl and returns its standard output. Its progress goes to standard error.
func (b *BuildKit) Ctl(ctx context.Context, args ...string) (string, error) {
	out, _, err := b.ctl(ctx, args...)
	return out, err
}

func (b *BuildKit) ctl(ctx context.Context, args ...string) (out, progress string, err error) {
	all := append([]string{"--addr", b.Address()}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(b.tools, "buildctl"), all...)
	cmd.Env = append(b.node.env(), "HOME="+b.dir) // no credentials of this machine
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		err = fmt.Errorf("buildctl %s: %w\n%s", strings.Join(args, " "), err, tail(stderr.Bytes(), 30))
		return stdout.String(), stderr.String(), err
	}
	return stdout.String(), stderr.String(), nil
}

// Build builds the Dockerfile in a directory, and returns the progress that buildctl has printed.
func (b *BuildKit) Build(ctx context.Context, dir string, flags ...string) (progress string, err error) {
	args := append([]string{"build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + dir, "--local", "dockerfile=" + dir}, flags...)
	_, progress, err = b.ctl(ctx, args...)
	return progress, err
}

// Close ends buildkitd; what it has in containerd stays.
func (b *BuildKit) Close() error { return b.process.stop(unix.SIGTERM, 20*time.Second) }
