package machine

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// packages are what the machine has beside Debian's smallest system.
const packages = "systemd-sysv,runc,sudo,make,ca-certificates"

// diskSize is the machine's disk; it is a sparse file.
const diskSize = 4 << 30

//go:embed boot.sh
var bootScript string

// Bind is a file or directory of this machine that the other one sees, read-only unless Writable.
type Bind struct {
	Source, Target string
	Writable       bool
}

// Options describe a machine.
type Options struct {
	// Dir is the machine's directory, on a real file system.
	Dir   string
	Binds []Bind
	// Files are written into the root before it boots: path -> content.
	Files map[string]string
	// Env are further variables of what Run runs, as NAME=value.
	Env []string
	// Say is told about slow steps; may be nil.
	Say func(string)
}

// Machine is a running machine.
type Machine struct {
	opts   Options
	groups []string // cgroup directories
	cmd    *exec.Cmd
	done   chan struct{}
	init   int // pid of the machine's process 1
}

// Boot boots a machine. The caller closes it. Where this machine cannot, the error is node.ErrMissing.
func Boot(ctx context.Context, opts Options) (_ *Machine, err error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: root's rights; namespaces and mounts need them", node.ErrMissing)
	}
	root, err := rootfs(ctx, opts.Say)
	if err != nil {
		return nil, err
	}
	m := &Machine{opts: opts}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	groups, controllers, err := makeGroups()
	m.groups = groups
	if err != nil {
		return nil, err
	}
	if err := m.makeDisk(ctx); err != nil {
		return nil, err
	}
	if err := m.start(root, controllers); err != nil {
		return nil, err
	}
	return m, m.awaitBoot(ctx)
}

func (m *Machine) path(elem ...string) string {
	return filepath.Join(append([]string{m.opts.Dir}, elem...)...)
}

func (m *Machine) makeDisk(ctx context.Context) error {
	f, err := os.Create(m.path("disk.img"))
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	mkfs, err := node.LookPath("mkfs.ext4")
	if err != nil {
		return fmt.Errorf("%w: mkfs.ext4", node.ErrMissing)
	}
	if out, err := exec.CommandContext(ctx, mkfs, "-q", "-F", f.Name()).CombinedOutput(); err != nil {
		return fmt.Errorf("make disk: %w\n%s", err, out)
	}
	files := m.path("files")
	for path, text := range m.opts.Files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(files, path)), 0o755); err != nil {
			return fmt.Errorf("make disk: %w", err)
		}
		if err := os.WriteFile(filepath.Join(files, path), []byte(text), 0o644); err != nil {
			return fmt.Errorf("make disk: %w", err)
		}
	}
	return errors.Join(os.MkdirAll(files, 0o755), os.Mkdir(m.path("root"), 0o755), os.Mkdir(m.path("disk"), 0o755))
}

// start starts process 1 in namespaces of its own.
func (m *Machine) start(root string, controllers []string) error {
	log, err := os.Create(m.path("boot.log"))
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	defer log.Close()
	args := []string{"--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child", "--propagation",
		"private",
		"bash", "-c", bootScript, "boot", m.opts.Dir, root, strings.Join(controllers, " ")}
	for _, b := range m.opts.Binds {
		mode := "ro"
		if b.Writable {
			mode = "rw"
		}
		args = append(args, mode, b.Source, b.Target)
	}
	m.cmd = exec.Command("bash", append([]string{"-c", enter(m.groups) + `exec unshare "$@"`, "enter"}, args...)...)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	// It must not outlive a test that dies.
	m.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	started := make(chan error)
	m.done = make(chan struct{})
	go func() {
		// The kernel takes the end of the thread that started it for the parent's death.
		runtime.LockOSThread()
		err := m.cmd.Start()
		started <- err
		if err == nil {
			_ = m.cmd.Wait()
		}
		close(m.done)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	return nil
}

// enter is what a shell runs before it makes the cgroup namespace, whose root the groups become.
func enter(groups []string) string {
	script := "set -e\n"
	for _, g := range groups {
		script += fmt.Sprintf("echo $$ > %q/cgroup.procs\n", g)
	}
	return script
}

func (m *Machine) awaitBoot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		if m.init = childOf(m.cmd.Process.Pid); m.init != 0 {
			// Where a unit of Debian's own fails in this setting the state is "degraded".
			out, err := m.Run(ctx, "systemctl is-system-running --wait")
			if state := strings.TrimSpace(out); err == nil || state == "degraded" {
				return nil
			}
		}
		select {
		case <-m.done:
			return fmt.Errorf("%w: a kernel that lets systemd run in namespaces:\n%s", node.ErrMissing, m.Log())
		case <-ctx.Done():
			return fmt.Errorf("the machine does not boot: %w\n%s", ctx.Err(), m.Log())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// childOf returns the only child of a process, 0 while there is none.
func childOf(pid int) (child int) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	_, _ = fmt.Sscan(string(data), &child)
	return child
}

// Log is the end of what systemd said while it booted.
func (m *Machine) Log() string {
	data, _ := os.ReadFile(m.path("boot.log"))
	return string(data[max(0, len(data)-4000):])
}

// Run runs a bash script in the machine as root, in root's home directory, and returns its standard output. It ends at
// the first command that fails. The error holds all that it printed.
func (m *Machine) Run(ctx context.Context, script string) (string, error) {
	cmd := exec.CommandContext(ctx, "nsenter", "--target", fmt.Sprint(m.init), "--all", "--root", "--wd", "--",
		"bash", "-euo", "pipefail", "-c", "cd /root\n"+script)
	cmd.Env = append([]string{"HOME=/root", "LANG=C.UTF-8",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, m.opts.Env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.TrimSpace(script), err, out.String(), errs.String())
	}
	return out.String(), nil
}

// Path returns where this machine sees a path of the other one.
func (m *Machine) Path(path string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.init), path)
}

// Close ends the machine and removes what it leaves outside of its directory.
func (m *Machine) Close() error {
	if m.done != nil {
		if m.init != 0 {
			_ = unix.Kill(m.init, unix.SIGKILL)
		}
		_ = m.cmd.Process.Kill()
		<-m.done
	}
	return removeGroups(m.groups)
}
