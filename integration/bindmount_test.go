package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// BuildKit hands the mounts of an image to the OCI runtime as they are, one by one: `RUN --mount=type=bind,from=IMAGE`
// without `source=`. Each has to stand by itself, and the runtime has to know its options.
func TestImageAsARuntimesMount(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, exact), startRegistry(t)
	ctx := testContext(t)
	base := push(t, r, "base:1", busybox(t))
	ref := push(t, r, "mounted:1", tortureImage(t)...)
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		pull(t, n, snapshotter, base)
		pull(t, n, snapshotter, ref)
	}
	implied := torture.ImpliedParents()
	for _, command := range []node.Command{node.Runc, node.Crun} {
		t.Run(command.Name, func(t *testing.T) {
			must(t, node.Require(ctx, nil, command))
			bin, err := node.LookPath(command.Name)
			must(t, err)
			for _, readonly := range []bool{true, false} {
				want := mountedByRuntime(t, n, bin, "overlayfs", base, ref, readonly)
				correctTorture(want)
				got := mountedByRuntime(t, n, bin, node.Snapshotter, base, ref, readonly)
				equal(t, want, got, rootfs.DiffOptions{Times: implied, Owners: implied})
			}
		})
	}
}

// mountedByRuntime runs a container of the image base in which the runtime mounts the image ref, and returns what is
// there.
func mountedByRuntime(t *testing.T, n *node.Node, bin, snapshotter, base, ref string, ro bool) (tree rootfs.Tree) {
	t.Helper()
	ctx := testContext(t)
	chain, err := n.ChainID(ctx, ref)
	must(t, err)
	sn, key := n.Client().SnapshotService(snapshotter), node.NewID("mounted")
	ctx, done, err := n.Client().WithLease(namespaces.WithNamespace(ctx, node.Namespace))
	must(t, err)
	defer func() { must(t, done(context.WithoutCancel(ctx))) }()
	create := sn.Prepare
	if ro {
		create = sn.View
	}
	mounts, err := create(ctx, key, chain)
	must(t, err)
	defer func() { must(t, sn.Remove(context.WithoutCancel(ctx), key)) }()
	err = n.Active(ctx, snapshotter, base, func(root string) error {
		return runBundle(ctx, bin, root, asSpec(mounts, "/mnt", ro), func(root string) (err error) {
			tree, err = rootfs.Dump(filepath.Join(root, "mnt"))
			return err
		})
	})
	must(t, err)
	return tree
}

// asSpec is what BuildKit makes of a snapshot's mounts.
func asSpec(mounts []mount.Mount, destination string, readonly bool) []specs.Mount {
	var list []specs.Mount
	for _, m := range mounts {
		options := slices.Clone(m.Options)
		if readonly && !slices.Contains(options, "ro") {
			options = append(options, "ro")
		}
		list = append(list, specs.Mount{Destination: destination, Type: m.Type, Source: m.Source, Options: options})
	}
	return list
}

// withoutUnified runs a program that does not see version 2 of cgroups beside version 1: crun refuses such a machine.
var withoutUnified = []string{"unshare", "--mount", "sh", "-c",
	`! [ -e /sys/fs/cgroup/unified ] || mount -t tmpfs none /sys/fs/cgroup/unified; exec "$@"`, "sh"}

// runBundle starts a container with a runtime, looks at its root file system from outside, and ends it.
func runBundle(ctx context.Context, bin, root string, mounts []specs.Mount, look func(root string) error) (err error) {
	id := node.NewID("bundle")
	bundle, err := os.MkdirTemp("", "bundle-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(bundle)
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: id}, oci.WithRootFSPath(root),
		oci.WithProcessArgs("sleep", "1000"), oci.WithEnv([]string{"PATH=/bin"}), oci.WithMounts(mounts))
	if err != nil {
		return err
	}
	spec.Version = "1.0.2" // all that older crun takes
	spec.Linux.CgroupsPath = "/" + id
	state := filepath.Join(bundle, "state")
	command := []string{bin, "--root", state}
	if filepath.Base(bin) == node.Crun.Name {
		command = append(withoutUnified, append(command, "--cgroup-manager", "disabled")...)
		spec.Linux.Resources = nil
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		return err
	}
	run := func(args ...string) (string, error) {
		args = append(command, args...)
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		log, err := os.Create(filepath.Join(bundle, "log")) // a pipe would stay open as long as the container
		if err != nil {
			return "", err
		}
		defer log.Close()
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, log
		if slices.Contains(args, "run") {
			cmd.Stdout = log
		}
		if err := cmd.Run(); err != nil {
			text, _ := os.ReadFile(log.Name())
			return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, text)
		}
		return out.String(), nil
	}
	if _, err := run("run", "--detach", "--bundle", bundle, id); err != nil {
		return err
	}
	defer func() {
		if _, derr := run("delete", "--force", id); err == nil {
			err = derr
		}
	}()
	out, err := run("state", id)
	if err != nil {
		return err
	}
	var at struct{ Pid int }
	if err := json.Unmarshal([]byte(out), &at); err != nil {
		return err
	}
	return look(fmt.Sprintf("/proc/%d/root", at.Pid))
}
