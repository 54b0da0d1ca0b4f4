package machine

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

//go:embed cell.sh
var cellScript string

// Cell runs a command in namespaces of its own on this machine's root file system. It has no network but a loopback
// device, which LoopbackUp starts, and sees no process but its own. This machine sees nothing of what it writes below
// /etc, /opt, /usr/local/bin, /var/lib and /run; what others have in /var/lib is read-only. dir, on a real file system,
// takes those writes. When the command ends, or ctx, its processes, mounts, network interfaces and cgroups go.
func Cell(ctx context.Context, dir string, output io.Writer, env []string, command ...string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: root's rights; namespaces and mounts need them", node.ErrMissing)
	}
	groups, controllers, err := makeGroups()
	if err != nil {
		return errors.Join(err, removeGroups(groups))
	}
	args := []string{"--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child",
		"--propagation", "private", "bash", "-c", cellScript, "cell", dir, strings.Join(controllers, " ")}
	cmd := exec.CommandContext(ctx, "bash", append([]string{"-c", enter(groups) + `exec unshare "$@"`, "enter"},
		append(args, command...)...)...)
	cmd.Stdout, cmd.Stderr, cmd.Env = output, output, env
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	// The kernel takes the end of the thread that started it for the parent's death.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return errors.Join(err, removeGroups(groups))
}

// LoopbackUp starts the loopback device of the network namespace that it is called in.
func LoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("start the loopback device: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("start the loopback device: %w", err)
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("start the loopback device: %w", err)
	}
	return nil
}
