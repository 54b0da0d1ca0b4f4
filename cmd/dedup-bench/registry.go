package main

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

// registryCommand serves a registry in a process of its own, so that its CPU time and
// its garbage collector are not the harness's. It ends when its standard input does,
// so it cannot outlive who started it.
func registryCommand() *cli.Command {
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

// registryProcess is a registryCommand that runs.
type registryProcess struct {
	addr, dir string
	stdin     io.Closer
	cmd       *exec.Cmd
}

func startRegistry(ctx context.Context, dir string) (*registryProcess, error) {
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
	return &registryProcess{addr: strings.TrimSpace(line), dir: dir, stdin: stdin, cmd: cmd}, nil
}

// Close ends the process.
func (r *registryProcess) Close() error {
	if err := errors.Join(r.stdin.Close(), r.cmd.Wait()); err != nil && r.cmd.ProcessState == nil {
		return fmt.Errorf("stop registry: %w", err)
	}
	return nil
}
