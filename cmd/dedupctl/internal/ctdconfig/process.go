package ctdconfig

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Process is who listens on a socket.
type Process struct {
	Pid int
	// Args are its command line.
	Args []string
	// Mounts is its mount namespace; OtherMounts tells that it is not this process's own.
	Mounts      string
	OtherMounts bool
}

// Config returns the config file that the process was started with, else the default.
func (p Process) Config(byDefault string) (string, error) {
	path := configArgument(p.Args, byDefault)
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.Pid))
	if err != nil {
		return "", fmt.Errorf("find the config of pid %d: %w", p.Pid, err)
	}
	return filepath.Join(dir, path), nil
}

// configArgument returns the config file that a command line names.
func configArgument(args []string, byDefault string) string {
	for i, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		if i == 0 || strings.TrimLeft(name, "-") != "config" && name != "-c" || !strings.HasPrefix(name, "-") {
			continue
		}
		if given {
			return value
		}
		if i+1 < len(args) {
			return args[i+1]
		}
	}
	return byDefault
}

// Listener returns the process that listens on a unix socket.
func Listener(ctx context.Context, socket string) (p Process, err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return p, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return p, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return p, err
	}
	if cerr != nil {
		return p, fmt.Errorf("ask who listens on %s: %w", socket, cerr)
	}
	p.Pid = int(cred.Pid)
	proc := fmt.Sprintf("/proc/%d/", p.Pid)
	line, err := os.ReadFile(proc + "cmdline")
	if err != nil {
		return p, fmt.Errorf("look at the process that listens on %s (pid %d; 0 is one in another pid namespace): %w", socket,
			p.Pid, err)
	}
	p.Args = strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return p, err
	}
	if p.Mounts, err = os.Readlink(proc + "ns/mnt"); err != nil {
		return p, err
	}
	p.OtherMounts = own != p.Mounts
	return p, nil
}
