package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
)

// Ctr runs ctr and returns what it wrote to its standard output. The error holds what it
// wrote to its standard error. It works in the containerd namespace of ctx, if that has one.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	namespace := Namespace
	if ns, ok := namespaces.Namespace(ctx); ok {
		namespace = ns
	}
	all := append([]string{"--address", n.Address(), "--namespace", namespace}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(n.dir, "bin/ctr"), all...)
	cmd.Env = n.env()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, tail(errOut.Bytes(), 20))
	}
	return out.String(), nil
}

// Pull pulls an image from a registry on loopback and unpacks it with a snapshotter.
func (n *Node) Pull(ctx context.Context, snapshotter, ref string) error {
	_, err := n.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", snapshotter, ref)
	return err
}

// PullClient is Pull as nerdctl does it: with containerd's client library, unpacking what arrives.
func (n *Node) PullClient(ctx context.Context, snapshotter, ref string, opts ...client.RemoteOpt) error {
	plain := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts)),
	})
	opts = append([]client.RemoteOpt{client.WithPullUnpack, client.WithPullSnapshotter(snapshotter),
		client.WithResolver(plain)}, opts...)
	_, err := n.client.Pull(ctx, ref, opts...)
	if err != nil {
		return fmt.Errorf("client pull %s: %w", ref, err)
	}
	return nil
}

// Import imports an OCI layout or a docker archive from a tar and unpacks it.
func (n *Node) Import(ctx context.Context, snapshotter, path string) error {
	_, err := n.Ctr(ctx, "image", "import", "--snapshotter", snapshotter, path)
	return err
}

// PullLocal is Pull with ctr's own client instead of containerd's transfer service: all blobs are
// fetched first, and snapshots are prepared without a label that tells what they are for.
func (n *Node) PullLocal(ctx context.Context, snapshotter, ref string) error {
	_, err := n.Ctr(ctx, "image", "pull", "--local", "--plain-http", "--snapshotter", snapshotter, ref)
	return err
}

var containers atomic.Int64

// NewID returns a container or snapshot name that nobody else on this machine uses: the
// names of cgroups are shared by all nodes.
func NewID(prefix string) string {
	return fmt.Sprintf("%s-%d-%d", prefix, os.Getpid(), containers.Add(1))
}

// Run runs a command in a new container of an image and returns what it wrote; the container is removed at its end.
func (n *Node) Run(ctx context.Context, snapshotter, ref string, command ...string) (string, error) {
	return n.RunWith(ctx, snapshotter, nil, ref, command...)
}

func (n *Node) RunWith(ctx context.Context, snapshotter string, flags []string, ref string, command ...string) (string,
	error) {
	id := NewID("run")
	args := append([]string{"run", "--rm"}, n.runFlags(snapshotter)...)
	return ctrOutput(ctx, n, id, append(args, flags...), append([]string{ref, id}, command...))
}

// ctrOutput runs ctr, and returns what the process in the container wrote, to either of its outputs. The shim writes it
// into a file: ctr reads from a FIFO, and loses what is in there if a container ends before ctr has come to read it.
// The shim may lose the end of the error output: its copyPipes closes the file at the end of the standard output. A
// test that looks for a message of the process says 2>&1.
func ctrOutput(ctx context.Context, n *Node, id string, flags, args []string) (string, error) {
	path := filepath.Join(n.dir, "output-"+id)
	defer os.Remove(path)
	said, err := n.Ctr(ctx, slices.Concat(flags, []string{"--log-uri", "file://" + path}, args)...)
	out, rerr := os.ReadFile(path)
	if errors.Is(rerr, os.ErrNotExist) { // it did not come so far
		rerr = nil
	}
	if err != nil {
		return said + string(out), errors.Join(fmt.Errorf("%w\n%s", err, tail(out, 20)), rerr)
	}
	return said + string(out), rerr
}

// RunDetached starts a container and returns its id; Exec runs further commands in it.
func (n *Node) RunDetached(ctx context.Context, snapshotter, ref string, command ...string) (string, error) {
	id := NewID("detached")
	args := append([]string{"run", "--detach"}, n.runFlags(snapshotter)...)
	_, err := n.Ctr(ctx, append(append(args, ref, id), command...)...)
	return id, err
}

func (n *Node) runFlags(snapshotter string) []string {
	return []string{"--snapshotter", snapshotter, "--runc-root", filepath.Join(n.dir, "runc")}
}

// Exec runs a command in a running container and returns what it wrote.
func (n *Node) Exec(ctx context.Context, id string, command ...string) (string, error) {
	process := NewID("exec")
	return ctrOutput(ctx, n, process, []string{"task", "exec", "--exec-id", process}, append([]string{id}, command...))
}

// RemoveContainer kills a container's task and removes the container and its snapshot.
func (n *Node) RemoveContainer(ctx context.Context, id string) error {
	c, err := n.client.LoadContainer(ctx, id)
	if err != nil {
		return fmt.Errorf("load container %s: %w", id, err)
	}
	return removeContainer(ctx, c)
}

func (n *Node) removeContainers(ctx context.Context) error {
	spaces, err := n.client.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		all, err := n.client.Containers(ctx)
		errs = append(errs, err)
		for _, c := range all {
			errs = append(errs, removeContainer(ctx, c))
		}
	}
	return errors.Join(errs...)
}

func removeContainer(ctx context.Context, c client.Container) error {
	task, err := c.Task(ctx, nil)
	if err == nil {
		if _, err := task.Delete(ctx, client.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("kill container %s: %w", c.ID(), err)
		}
	}
	if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete container %s: %w", c.ID(), err)
	}
	return nil
}

// ChainID returns the name of the committed snapshot that holds an image's files.
func (n *Node) ChainID(ctx context.Context, ref string) (string, error) {
	img, err := n.client.GetImage(ctx, ref)
	if err != nil {
		return "", fmt.Errorf("get image %s: %w", ref, err)
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return "", fmt.Errorf("read the layers of %s: %w", ref, err)
	}
	return identity.ChainID(diffIDs).String(), nil
}

// View mounts a read-only view of a pulled image's files, calls look with its path, and
// takes the view down again.
func (n *Node) View(ctx context.Context, snapshotter, ref string, look func(root string) error) error {
	return n.withSnapshot(ctx, snapshotter, ref, snapshots.Snapshotter.View, look)
}

// Active is View for a new writable snapshot on an image.
func (n *Node) Active(ctx context.Context, snapshotter, ref string, look func(root string) error) error {
	return n.withSnapshot(ctx, snapshotter, ref, snapshots.Snapshotter.Prepare, look)
}

type makeSnapshot func(sn snapshots.Snapshotter, ctx context.Context, key, parent string,
	opts ...snapshots.Opt) ([]mount.Mount, error)

func (n *Node) withSnapshot(ctx context.Context, snapshotter, ref string, create makeSnapshot,
	look func(string) error) (err error) {
	chain, err := n.ChainID(ctx, ref)
	if err != nil {
		return err
	}
	ctx, done, err := n.client.WithLease(ctx)
	if err != nil {
		return fmt.Errorf("take a lease: %w", err)
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	sn, key := n.client.SnapshotService(snapshotter), NewID("snapshot")
	mounts, err := create(sn, ctx, key, chain)
	if err != nil {
		return fmt.Errorf("make a snapshot of %s with %s: %w", ref, snapshotter, err)
	}
	defer func() { err = errors.Join(err, sn.Remove(context.WithoutCancel(ctx), key)) }()
	return n.activated(ctx, key, mounts, look)
}

// activated is WithMounts for mounts of which containerd has to make some itself ("format/..."),
// as those of its erofs snapshotter.
func (n *Node) activated(ctx context.Context, key string, mounts []mount.Mount, look func(string) error) (err error) {
	if !slices.ContainsFunc(mounts, func(m mount.Mount) bool { return strings.Contains(m.Type, "/") }) {
		return n.WithMounts(mounts, look)
	}
	manager := n.client.MountManager()
	info, err := manager.Activate(ctx, key, mounts)
	if err != nil {
		return fmt.Errorf("activate mounts %+v: %w", mounts, err)
	}
	defer func() { err = errors.Join(err, deactivate(context.WithoutCancel(ctx), manager, key, info.Active)) }()
	return n.WithMounts(info.System, look)
}

// deactivate has containerd take down mounts that it made. containerd first forgets them, and then unmounts them
// without a lock. A garbage collection in between takes them for leftovers, and unmounts them too (2.4.2,
// core/mount/manager). Then Deactivate fails for a mount that is not there. All is well once the collection is done.
func deactivate(ctx context.Context, manager mount.Manager, key string, active []mount.ActiveMount) error {
	err := manager.Deactivate(ctx, key)
	if err == nil {
		return nil
	}
	gone := func(m mount.ActiveMount) bool {
		_, serr := os.Lstat(m.MountPoint)
		return errors.Is(serr, os.ErrNotExist)
	}
	for range 100 {
		if !slices.ContainsFunc(active, func(m mount.ActiveMount) bool { return !gone(m) }) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("deactivate mounts of %s: %w", key, err)
}

// WithMounts mounts in the node's directory, calls look with the path, and unmounts.
func (n *Node) WithMounts(mounts []mount.Mount, look func(root string) error) (err error) {
	root, err := os.MkdirTemp(filepath.Join(n.dir, "mnt"), "m-")
	if err != nil {
		return fmt.Errorf("make a mount point: %w", err)
	}
	defer func() { err = errors.Join(err, os.Remove(root)) }()
	if err := mount.All(mounts, root); err != nil {
		return fmt.Errorf("mount %+v: %w", mounts, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(root, 0)) }()
	return look(root)
}
