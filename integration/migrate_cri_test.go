package integration

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/pelletier/go-toml/v2"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const criImages = "io.containerd.cri.v1.images"

// A kubelet's node moves from overlayfs to dedup: after migrate and the switch of CRI's snapshotter all images are
// there, nothing is pulled, the old pod runs on and a new one runs from dedup.
func TestMigrateCRI(t *testing.T) {
	t.Parallel()
	r := startRegistry(t)
	pauseImage, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	pause := pushImage(t, r, "pause:1", pauseImage)
	app := push(t, r, "app:1", busybox(t), dataLayer(t))
	n := startDedup(t, node.Options{CRI: true, PauseImage: pause,
		Plugins: map[string]map[string]any{criImages: {"snapshotter": "overlayfs"}}})
	ctx := testContext(t)
	c, err := n.CRI(ctx)
	must(t, err)
	must(t, c.Pull(ctx, app))
	oldPod, old := startPod(t, c, app, "sh", "-c", reader)
	must(t, c.Close())

	states, _ := migrate(t, n, false, "--namespace", node.CRINamespace)
	if states["app:1"] != "migrated" || states["pause:1"] != "migrated" {
		t.Errorf("%v", states)
	}
	setSnapshotter(t, n, node.Snapshotter)
	before, err := r.Log()
	must(t, err)
	must(t, n.RestartContainerd(ctx))
	if c, err = n.CRI(ctx); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	list, err := c.ListImages(ctx, &cri.ListImagesRequest{})
	must(t, err)
	if len(list.Images) != 2 {
		t.Errorf("after the switch the kubelet sees %d images", len(list.Images))
	}
	newPod, fresh := startPod(t, c, app, "sh", "-c", reader)
	after, err := r.Log()
	must(t, err)
	if len(after) != len(before) {
		t.Errorf("the registry was asked: %+v", after[len(before):])
	}
	for id, want := range map[string]string{oldPod: "overlayfs", old: "overlayfs", newPod: node.Snapshotter,
		fresh: node.Snapshotter} {
		got, err := n.Client().ContainerService().Get(namespaces.WithNamespace(ctx, node.CRINamespace), id)
		must(t, err)
		if got.Snapshotter != want {
			t.Errorf("container %s is on %s, want %s", id, got.Snapshotter, want)
		}
	}
	for _, id := range []string{old, fresh} {
		eventually(t, "the container to read its files again and again", func() bool {
			done, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id,
				Cmd: []string{"sh", "-c", "test $(wc -c < /rounds) -gt 3"}, Timeout: 60})
			return err == nil && done.ExitCode == 0
		})
	}
	_, m := migrate(t, n, false, "--namespace", node.CRINamespace, "--remove-old")
	if m.Kept != 2 || len(m.Containers) != 2 {
		t.Errorf("with the old pod: %+v", m)
	}
	removePod(t, c, oldPod)
	k8s := namespaces.WithNamespace(ctx, node.CRINamespace)
	forget(t, n, k8s, nil)
	must(t, n.Client().SnapshotService("overlayfs").Walk(k8s, func(_ context.Context, info snapshots.Info) error {
		t.Errorf("overlayfs still has %s %s", info.Kind, info.Name)
		return nil
	}))
	removePod(t, c, newPod)
}

// setSnapshotter changes CRI's snapshotter in containerd's configuration.
func setSnapshotter(t *testing.T, n *node.Node, name string) {
	t.Helper()
	path := filepath.Join(n.Dir(), "containerd.toml")
	data, err := os.ReadFile(path)
	must(t, err)
	var config map[string]any
	must(t, toml.Unmarshal(data, &config))
	config["plugins"].(map[string]any)[criImages].(map[string]any)["snapshotter"] = name
	data, err = toml.Marshal(config)
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
}

// startPod runs a container in a pod on the host's network.
func startPod(t *testing.T, c *node.CRI, ref string, command ...string) (pod, container string) {
	t.Helper()
	ctx := testContext(t)
	hostNetwork := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: node.NewID("pod"), Uid: node.NewID("uid"), Namespace: "test"},
		LogDirectory: t.TempDir(),
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: hostNetwork},
		},
	}
	run, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox})
	must(t, err)
	created, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: run.PodSandboxId, SandboxConfig: sandbox,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: ref}, Command: command,
			LogPath: "main.log",
			Linux: &cri.LinuxContainerConfig{
				SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: hostNetwork},
			},
		},
	})
	must(t, err)
	_, err = c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId})
	must(t, err)
	return run.PodSandboxId, created.ContainerId
}

func removePod(t *testing.T, c *node.CRI, pod string) {
	t.Helper()
	ctx := testContext(t)
	_, err := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod})
	must(t, err)
	_, err = c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
	must(t, err)
}
