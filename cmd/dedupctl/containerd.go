package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/ctdconfig"
)

// process is who listens on a socket.
type process struct {
	pid int
	// config is the main config file of a containerd.
	config string
	// otherMounts: it sees other mounts than this process.
	otherMounts bool
}

// findContainerd finds the containerd that listens on a socket.
func findContainerd(ctx context.Context, socket string) (process, error) {
	p, err := listener(ctx, socket)
	if err != nil {
		return p, err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
	if err != nil {
		return p, fmt.Errorf("read containerd's command line: %w", err)
	}
	p.config = configArgument(strings.Split(strings.TrimRight(string(line), "\x00"), "\x00"))
	if !filepath.IsAbs(p.config) {
		dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.pid))
		if err != nil {
			return p, fmt.Errorf("find containerd's config: %w", err)
		}
		p.config = filepath.Join(dir, p.config)
	}
	return p, nil
}

// configArgument returns the config file that a containerd's command line names.
func configArgument(args []string) string {
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
	return ctdconfig.DefaultPath
}

// listener returns the process that listens on a unix socket.
func listener(ctx context.Context, socket string) (p process, err error) {
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
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return p, err
	}
	if cerr != nil {
		return p, fmt.Errorf("ask who listens on %s: %w", socket, cerr)
	}
	p.pid = int(cred.Pid)
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return p, err
	}
	its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", p.pid))
	if err != nil {
		return p, fmt.Errorf("find the process that listens on %s (pid %d, 0 for one in another pid namespace): %w", socket, p.pid, err)
	}
	p.otherMounts = own != its
	return p, nil
}
