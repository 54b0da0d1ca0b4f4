package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
)

// Namespace is the containerd namespace that a node's methods work in.
const Namespace = "default"

// Options describe a node. The zero value is containerd DefaultVersion with the dedup
// plugins configured, and no daemon running yet.
type Options struct {
	// Version of containerd; "" is DefaultVersion.
	Version string
	// Parent of the node's directory; "" is os.TempDir(). It has to be on a real file
	// system: overlayfs cannot have an overlayfs upperdir.
	Parent string
	// NoDedup leaves the dedup plugins out of containerd's configuration.
	NoDedup bool
	// NoDiffer leaves only the dedup differ out.
	NoDiffer bool
	// NoRemapIDs leaves out the capability to map owners, as a node has it that was set up before that was there.
	NoRemapIDs bool
	// Proxies are further proxy snapshotters: name -> path of the socket.
	Proxies map[string]string
	// CRI switches containerd's CRI plugin on.
	CRI bool
	// PauseImage is the reference of what CRI runs in a sandbox.
	PauseImage string
	// Runc is the runtime's path; "" is the distribution's.
	Runc string
	// ExternalGzip lets containerd and the daemon find igzip and unpigz.
	ExternalGzip bool
	// LogLevel of containerd; "" is "info".
	LogLevel string
	// Plugins are further plugin settings of containerd, by plugin id.
	Plugins map[string]map[string]any
	// DaemonBinary is the dedup daemon; "" is bin/containerd-dedup-grpc in the module.
	DaemonBinary string
	// Daemon are further keys of the daemon's configuration.
	Daemon map[string]any
	// Say is told about slow steps; may be nil.
	Say func(string)

	erofs string // path of a usable mkfs.erofs
}

// Node is a running containerd. Its methods may be called concurrently, except those
// that start, stop or kill a process.
type Node struct {
	*layout
	*services
}

// layout is where a node's files lie, and what its processes are configured with.
type layout struct {
	opts  Options
	tools Tools
	dir   string
}

// services are a node's processes: containerd, the dedup daemon, and the client of the former.
type services struct {
	*layout
	containerd *process
	daemon     *process
	client     *client.Client
}

// Start builds what is missing and starts containerd. The caller closes the node.
func Start(ctx context.Context, opts Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("%w: root's rights; containerd, mounts and runc need them", ErrMissing)
	}
	if opts.Version == "" {
		opts.Version = DefaultVersion
	}
	if opts.Parent == "" {
		opts.Parent = os.TempDir()
	}
	if opts.LogLevel == "" {
		opts.LogLevel = "info"
	}
	if opts.Runc == "" {
		if err := Require(ctx, opts.Say, Runc); err != nil {
			return nil, err
		}
	}
	tools, err := Build(ctx, opts.Version, opts.Say)
	if err != nil {
		return nil, err
	}
	dir, err := newDir(opts.Parent)
	if err != nil {
		return nil, err
	}
	files := &layout{opts: opts, tools: tools, dir: dir}
	n := &Node{layout: files, services: &services{layout: files}}
	if err := n.setUp(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) setUp(ctx context.Context) error {
	for _, sub := range []string{"bin", "c", "s", "runc", "dedup", "run", "log", "tmp", "mnt", "opt"} {
		if err := os.Mkdir(filepath.Join(n.dir, sub), 0o700); err != nil {
			return fmt.Errorf("set up node: %w", err)
		}
	}
	if err := n.fillBin(); err != nil {
		return err
	}
	for name, render := range map[string]func() ([]byte, error){
		"containerd.toml": n.containerdConfig, "dedup.toml": n.daemonConfig,
	} {
		data, err := render()
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(n.dir, name), data, 0o600); err != nil {
			return fmt.Errorf("set up node: %w", err)
		}
	}
	return n.StartContainerd(ctx)
}

// Dir is the node's directory.
func (l *layout) Dir() string { return l.dir }

// Tools are the containerd binaries that the node runs.
func (l *layout) Tools() Tools { return l.tools }

// Address of containerd's socket.
func (l *layout) Address() string { return filepath.Join(l.dir, "run/containerd.sock") }

// DedupAddress is the daemon's socket.
func (l *layout) DedupAddress() string { return filepath.Join(l.dir, "run/dedup.sock") }

// DedupRoot is the daemon's root directory.
func (l *layout) DedupRoot() string { return filepath.Join(l.dir, "dedup") }

// HasErofs reports whether the erofs snapshotter can be used on this node.
func (l *layout) HasErofs() bool { return l.opts.erofs != "" }

// SnapshotterRoot is the directory in which a snapshotter keeps everything: what Usage
// of package rootfs measures.
func (l *layout) SnapshotterRoot(name string) string {
	if name == Snapshotter {
		return l.DedupRoot()
	}
	return filepath.Join(l.dir, "c", "io.containerd.snapshotter.v1."+name)
}

// LogPath is the file with the output of "containerd" or "dedup".
func (l *layout) LogPath(name string) string { return filepath.Join(l.dir, "log", name+".log") }

// Logs returns the last lines of all processes' logs, for a failure report.
func (l *layout) Logs(lines int) string {
	var out strings.Builder
	for _, name := range []string{"containerd", "dedup"} {
		if data, err := os.ReadFile(l.LogPath(name)); err == nil {
			fmt.Fprintf(&out, "--- the end of %s's log ---\n%s\n", name, tail(withoutNoise(data), lines))
		}
	}
	return out.String()
}

// withoutNoise leaves out the hundred lines in which containerd tells what it loads.
func withoutNoise(log []byte) []byte {
	var out []byte
	for line := range bytes.Lines(log) {
		if !bytes.Contains(line, []byte("loading plugin")) {
			out = append(out, line...)
		}
	}
	return out
}

func (l *layout) env() []string {
	var env []string
	for _, kv := range os.Environ() {
		key, _, _ := strings.Cut(kv, "=")
		switch key {
		case "PATH", "TMPDIR", "NOTIFY_SOCKET":
		default:
			env = append(env, kv)
		}
	}
	env = append(env, "PATH="+filepath.Join(l.dir, "bin"), "TMPDIR="+filepath.Join(l.dir, "tmp"))
	if !l.opts.ExternalGzip {
		env = append(env, "CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1")
	}
	return env
}

// StartContainerd starts containerd and waits until it serves.
func (s *services) StartContainerd(ctx context.Context) error {
	p, err := startProcess("containerd", s.LogPath("containerd"), s.env(),
		filepath.Join(s.dir, "bin/containerd"), "--config", filepath.Join(s.dir, "containerd.toml"))
	if err != nil {
		return err
	}
	s.containerd = p
	if err := s.recordPid("containerd.pid", p.pid()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience(90*time.Second))
	defer cancel()
	return p.waitReady(ctx, s.dialContainerd)
}

func (s *services) dialContainerd(ctx context.Context) error {
	if _, err := os.Stat(s.Address()); err != nil {
		return err
	}
	c, err := client.New(s.Address(), client.WithDefaultNamespace(Namespace), client.WithTimeout(30*time.Second))
	if err != nil {
		return err
	}
	if serving, err := c.IsServing(ctx); err != nil || !serving {
		_ = c.Close()
		return fmt.Errorf("containerd is not serving: %w", err)
	}
	if s.client != nil {
		_ = s.client.Close()
	}
	s.client = c
	return nil
}

// StopContainerd ends containerd in order; containers run on. A deadlock of containerd's own is not an error: it says
// nothing about what runs on containerd.
func (s *services) StopContainerd() error {
	err := s.containerd.stop(unix.SIGTERM, 60*time.Second)
	var h *hung
	if errors.As(err, &h) && isContainerdsDeadlock(h.stack) {
		if s.opts.Say != nil {
			s.opts.Say("containerd's garbage collection and its stop waited for each other; it was killed " +
				"(CONTRIBUTING.md, \"When a test fails\")")
		}
		return nil
	}
	return err
}

// KillContainerd ends containerd with SIGKILL.
func (s *services) KillContainerd() error { return s.containerd.stop(unix.SIGKILL, 60*time.Second) }

// RestartContainerd stops containerd and starts it again.
func (s *services) RestartContainerd(ctx context.Context) error {
	if err := s.StopContainerd(); err != nil {
		return err
	}
	return s.StartContainerd(ctx)
}

// KeepContainerd starts containerd again, a few seconds after it has ended, until the function that it returns is
// called. Nothing else may start or stop containerd meanwhile.
func (s *services) KeepContainerd(ctx context.Context, pause time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-s.containerd.done:
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			_ = s.StartContainerd(ctx) // if it ends again, it is started again
		}
	}()
	return func() { cancel(); <-done }
}

// StartDaemon starts the dedup daemon and waits until its socket answers.
func (s *services) StartDaemon(ctx context.Context) error {
	bin := s.opts.DaemonBinary
	if bin == "" {
		root, err := ModuleRoot()
		if err != nil {
			return err
		}
		bin = filepath.Join(root, "bin/containerd-dedup-grpc")
	}
	if _, err := os.Stat(bin); err != nil {
		return fmt.Errorf("%w: the dedup daemon; run `make build`: %w", ErrMissing, err)
	}
	p, err := startProcess("dedup", s.LogPath("dedup"), s.env(), bin, "--config", filepath.Join(s.dir, "dedup.toml"))
	if err != nil {
		return err
	}
	s.daemon = p
	if err := s.recordPid("dedup.pid", p.pid()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience(90*time.Second))
	defer cancel()
	return p.waitReady(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.DedupAddress())
		if err == nil {
			err = conn.Close()
		}
		if err == nil {
			err = s.reaches(ctx)
		}
		return err
	})
}

// reaches tells whether a containerd that runs has noticed the daemon: where it has tried while there was none, it
// waits for a second before it tries again, and answers for the daemon with an error meanwhile.
func (s *services) reaches(ctx context.Context) error {
	if s.opts.NoDedup || s.client == nil {
		return nil
	}
	conn, err := net.Dial("unix", s.Address())
	if err != nil {
		return nil // it will find the daemon when it starts
	}
	conn.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, Namespace), 30*time.Second)
	defer cancel()
	sn, key := s.client.SnapshotService(Snapshotter), NewID("reached")
	if _, err := sn.View(ctx, key, ""); err != nil { // unlike a question, it always gets to the daemon
		return err
	}
	return sn.Remove(ctx, key)
}

// StopDaemon ends the dedup daemon in order; KillDaemon with SIGKILL.
func (s *services) StopDaemon() error { return s.daemon.stop(unix.SIGTERM, 60*time.Second) }

// KillDaemon ends the dedup daemon with SIGKILL.
func (s *services) KillDaemon() error { return s.daemon.stop(unix.SIGKILL, 60*time.Second) }

// Pids returns the processes whose CPU time is a pull's cost: containerd first, and the
// daemon when it runs.
func (s *services) Pids() []int {
	var pids []int
	for _, p := range []*process{s.containerd, s.daemon} {
		if p != nil && p.running() {
			pids = append(pids, p.pid())
		}
	}
	return pids
}

func (s *services) recordPid(name string, pid int) error {
	text := fmt.Sprintf("%d %s", pid, startTime(pid))
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
		return fmt.Errorf("record the pid of %s: %w", name, err)
	}
	return nil
}

// Client is the Go client of the node's containerd, in Namespace. It is replaced when
// containerd starts again.
func (s *services) Client() *client.Client { return s.client }

// Close ends containers, daemon and containerd, unmounts and removes everything. An
// error means that something did not end as it should.
func (n *Node) Close() error {
	var errs []error
	if n.client != nil && n.containerd.running() {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		errs = append(errs, n.removeContainers(ctx))
		cancel()
	}
	if n.client != nil {
		_ = n.client.Close()
	}
	if n.containerd != nil {
		errs = append(errs, n.StopContainerd())
	}
	if n.daemon != nil {
		errs = append(errs, n.StopDaemon())
	}
	errs = append(errs, destroy(n.dir))
	return errors.Join(errs...)
}

// patience is longer on an emulated machine, as DEDUP_SLOW says.
func patience(d time.Duration) time.Duration {
	if os.Getenv("DEDUP_SLOW") != "" {
		return 10 * d
	}
	return d
}
