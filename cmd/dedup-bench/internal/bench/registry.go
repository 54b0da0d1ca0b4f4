package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// RegistryCommand serves a registry in a process of its own, so that its CPU time and
// its garbage collector are not the harness's. It ends when its standard input does,
// so it cannot outlive who started it.
func RegistryCommand() *cli.Command {
	return &cli.Command{
		Name:   "registry",
		Usage:  "serve a registry on loopback until standard input ends; prints its address",
		Hidden: true,
		Flags:  []cli.Flag{&cli.PathFlag{Name: "dir", Required: true}},
		Action: func(c *cli.Context) error {
			r, err := registry.Start(registry.Options{Dir: c.Path("dir")})
			if err != nil {
				return err
			}
			fmt.Println(r.Addr())
			_, err = io.Copy(io.Discard, os.Stdin)
			return errors.Join(err, r.Close())
		},
	}
}

// Registry is a RegistryCommand that runs.
type Registry struct {
	Addr, Dir string
	stdin     io.Closer
	cmd       *exec.Cmd
}

// StartRegistry serves dir from a process of its own until Close.
func StartRegistry(ctx context.Context, dir string) (*Registry, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	cmd := exec.CommandContext(ctx, exe, "registry", "--dir", dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us alone
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("start registry: it said nothing: %w", errors.Join(err, stdin.Close(), cmd.Wait()))
	}
	return &Registry{Addr: strings.TrimSpace(line), Dir: dir, stdin: stdin, cmd: cmd}, nil
}

// Pid of the process.
func (r *Registry) Pid() int { return r.cmd.Process.Pid }

// Close ends the process.
func (r *Registry) Close() error {
	if err := errors.Join(r.stdin.Close(), r.cmd.Wait()); err != nil && r.cmd.ProcessState == nil {
		return fmt.Errorf("stop registry: %w", err)
	}
	return nil
}
