package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Nerdctl is nerdctl for a node's containerd, in a containerd namespace of its own and with one snapshotter.
type Nerdctl struct {
	node *Node
	bin  string
	dir  string
	env  []string
}

// NewNerdctl builds nerdctl if need be. With BuildKit, which may be nil, it builds images.
func NewNerdctl(ctx context.Context, n *Node, snapshotter string, b *BuildKit) (*Nerdctl, error) {
	bin, err := BuildNerdctl(ctx, n.opts.Say)
	if err != nil {
		return nil, err
	}
	c := &Nerdctl{node: n, bin: bin, dir: filepath.Join(n.dir, "nerdctl-"+snapshotter)}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return nil, fmt.Errorf("set up nerdctl: %w", err)
	}
	data, err := encode(table{
		"address": n.Address(), "namespace": c.Namespace(), "snapshotter": snapshotter,
		"data_root": filepath.Join(c.dir, "root"), "cni_path": filepath.Join(c.dir, "cni"),
		"cni_netconfpath": filepath.Join(c.dir, "net.d"), "hosts_dir": []string{}, "cdi_spec_dirs": []string{},
		"cgroup_manager": "cgroupfs",
	})
	if err != nil {
		return nil, err
	}
	config := filepath.Join(c.dir, "nerdctl.toml")
	if err := os.WriteFile(config, data, 0o600); err != nil {
		return nil, fmt.Errorf("set up nerdctl: %w", err)
	}
	c.env = append(n.env(), "NERDCTL_TOML="+config, "HOME="+c.dir, "DOCKER_CONFIG="+c.dir,
		"PATH="+filepath.Join(n.dir, "bin")+":/usr/bin:/bin") // it runs tar
	if b != nil {
		c.env = append(c.env, "BUILDKIT_HOST="+b.Address())
		err := os.Symlink(filepath.Join(b.tools, "buildctl"), filepath.Join(n.dir, "bin/buildctl"))
		if err != nil && !os.IsExist(err) {
			return nil, fmt.Errorf("set up nerdctl: %w", err)
		}
	}
	return c, nil
}

// Namespace is the containerd namespace that it works in.
func (c *Nerdctl) Namespace() string { return filepath.Base(c.dir) }

// Run runs nerdctl and returns its standard output.
func (c *Nerdctl) Run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.bin, args...)
	cmd.Env = c.env
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("nerdctl %s: %w\n%s%s", strings.Join(args, " "), err,
			tail(errOut.Bytes(), 20), tail(out.Bytes(), 5))
	}
	return out.String(), nil
}
