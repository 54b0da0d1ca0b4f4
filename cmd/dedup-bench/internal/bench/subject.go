package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// Subject is one snapshotter under one setting.
type Subject struct {
	Name        string // in results
	Snapshotter string // as containerd knows it
	Fidelity    string // of dedup; "" is the daemon's default
	// Socket of a snapshotter that somebody else runs; Root is its directory, "" where
	// it is not known, and then there are no figures of its disk.
	Socket, Root string
}

// Baseline is the subject that others are divided by.
const Baseline = "overlayfs"

var builtin = []Subject{
	{Name: Baseline, Snapshotter: "overlayfs"},
	{Name: "native", Snapshotter: "native"},
	{Name: "erofs", Snapshotter: "erofs"},
	{Name: "dedup", Snapshotter: node.Snapshotter},
	{Name: "dedup-exact", Snapshotter: node.Snapshotter, Fidelity: "exact"},
	{Name: "dedup-normalized", Snapshotter: node.Snapshotter, Fidelity: "normalized"},
	{Name: Limit},
}

// ParseSubjects reads names ("all" is every snapshotter built in) and NAME=unix:///SOCKET[?root=DIR].
func ParseSubjects(texts []string) ([]Subject, error) {
	var subjects []Subject
	for _, text := range texts {
		if text == "all" {
			subjects = append(subjects, builtin[:len(builtin)-1]...)
			continue
		}
		s, err := parseSubject(text)
		if err != nil {
			return nil, err
		}
		subjects = append(subjects, s)
	}
	var names []string
	for _, s := range subjects {
		if slices.Contains(names, s.Name) {
			return nil, fmt.Errorf("subject %s is named twice", s.Name)
		}
		names = append(names, s.Name)
	}
	return subjects, nil
}

func parseSubject(text string) (Subject, error) {
	name, address, foreign := strings.Cut(text, "=")
	i := slices.IndexFunc(builtin, func(s Subject) bool { return s.Name == name })
	if !foreign {
		if i < 0 {
			return Subject{}, fmt.Errorf("subject %q: want overlayfs, native, erofs, dedup, dedup-exact, dedup-normalized, limit, all, or NAME=unix:///path/of/socket[?root=DIR]", text)
		}
		return builtin[i], nil
	}
	address, root, _ := strings.Cut(address, "?root=")
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok || !filepath.IsAbs(path) || name == "" || i >= 0 {
		return Subject{}, fmt.Errorf("subject %q: want NAME=unix:///path/of/socket[?root=DIR], and a name that is not taken", text)
	}
	return Subject{Name: name, Snapshotter: name, Socket: path, Root: root}, nil
}

// usable gets what a subject needs and says why it cannot run here.
func (s Subject) usable(ctx context.Context, daemon string, say func(string)) error {
	switch {
	case s.Socket != "":
		_, err := peer(s.Socket)
		return err
	case s.Snapshotter == "erofs":
		_, err := node.BuildErofs(ctx, say)
		return err
	case s.Snapshotter == node.Snapshotter && daemon == "":
		root, err := node.ModuleRoot()
		if err != nil {
			return err
		}
		daemon = filepath.Join(root, "bin/containerd-dedup-grpc")
		fallthrough
	case s.Snapshotter == node.Snapshotter:
		if _, err := os.Stat(daemon); err != nil {
			return fmt.Errorf("the daemon is not built, run `make build`: %w", err)
		}
	}
	return nil
}

// peer is the process that serves a socket, so that its CPU time and memory count.
func peer(socket string) (pid int, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, fmt.Errorf("nobody serves it: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if inner = err; err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid, errors.Join(err, inner)
}

// options of a node for this subject.
func (s Subject) options(o Options, dir string) node.Options {
	opts := node.Options{
		Parent: dir, Version: o.Version, ExternalGzip: o.Igzip, DaemonBinary: o.Daemon, Say: o.Say,
		NoDedup: s.Snapshotter != node.Snapshotter,
	}
	if s.Fidelity != "" {
		opts.Daemon = map[string]any{"fidelity": s.Fidelity}
	}
	if s.Socket != "" {
		opts.Proxies = map[string]string{s.Snapshotter: s.Socket}
	}
	if o.Unpacks > 1 {
		opts.Plugins = map[string]map[string]any{"io.containerd.transfer.v1.local": {"max_concurrent_unpacks": o.Unpacks}}
	}
	if s.Snapshotter == "erofs" {
		// What containerd's documentation recommends; sorting would cost it a copy of each layer.
		if opts.Plugins == nil {
			opts.Plugins = map[string]map[string]any{}
		}
		opts.Plugins["io.containerd.differ.v1.erofs"] = map[string]any{"mkfs_options": []string{"--sort=none"}}
	}
	return opts
}

func (s Subject) root(n *node.Node) string {
	if s.Socket != "" {
		return s.Root
	}
	return n.SnapshotterRoot(s.Snapshotter)
}

// used is what the snapshotter's directory costs; ok is false where nobody said where it is.
func (s Subject) used(n *node.Node) (u rootfs.Used, ok bool, err error) {
	root := s.root(n)
	if root == "" {
		return u, false, nil
	}
	u, err = rootfs.Usage(root)
	return u, err == nil, err
}
