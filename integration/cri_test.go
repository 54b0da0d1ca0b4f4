package integration

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// A pod's whole life over the CRI socket, as a kubelet has it.
func TestCRI(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) { criLife(t, version) })
	}
}

func criLife(t *testing.T, version string) {
	r := startRegistry(t)
	pauseImage, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	pause := pushImage(t, r, "pause:1", pauseImage)
	app := push(t, r, "app:1", busybox(t), layer(t, image.Dir("app"), payload(version, "app/file", 2<<20)))
	n := startDedup(t, node.Options{Version: version, CRI: true, PauseImage: pause})
	ctx := testContext(t)
	c, err := n.CRI(ctx)
	must(t, err)
	defer c.Close()

	spec := &cri.ImageSpec{Image: app}
	must(t, c.Pull(ctx, app))
	status, err := c.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
	must(t, err)
	if status.Image == nil || status.Image.Size == 0 {
		t.Fatalf("image status: %v", status)
	}
	criPod(t, n, c, app, ctx)
	images, err := c.ListImages(ctx, &cri.ListImagesRequest{})
	must(t, err)
	if len(images.Images) != 2 {
		t.Errorf("%d images", len(images.Images))
	}
	criFsInfo(t, n, c, ctx)

	// To the kubelet one image has three names, and it removes all of them.
	forget(t, n, namespaces.WithNamespace(ctx, node.CRINamespace), nil) // collects what the pod left
	settle(t, n)
	var shown shownImage
	for names, i := range shownImages(t, n) {
		if strings.HasPrefix(names, node.CRINamespace+" ") && slices.Contains(i.Names, app) {
			shown = i
		}
	}
	if len(shown.Names) != 3 || shown.FreedBytes < 2<<20 {
		t.Errorf("dedupctl images: %+v", shown)
	}
	before := usage(t, n.DedupRoot())
	_, err = c.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: status.Image.Id}})
	must(t, err)
	k8s := namespaces.WithNamespace(ctx, node.CRINamespace)
	lease := func() { forget(t, n, k8s, nil) } // collects garbage now
	lease()
	eventually(t, "the app's layer to be gone", func() bool {
		left, err := filepath.Glob(filepath.Join(n.DedupRoot(), "layers", "*"))
		must(t, err)
		return len(left) == 1
	})
	settle(t, n)
	// A pack that goes with the image has a few blocks and an inode of its own, which the report does not count.
	const pack = 4 * 4096
	if got := before.Sub(usage(t, n.DedupRoot())); !near(shown.FreedBytes, got.Bytes) &&
		!near(shown.FreedBytes+pack, got.Bytes) ||
		got.Inodes < shown.FreedInodes || got.Inodes > shown.FreedInodes+1 {
		t.Errorf("removing the image frees %+v, dedupctl images said %+v", got, shown)
	}
	if _, err := c.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: pause}}); err != nil {
		t.Error(err)
	}

	rebuilt := push(t, r, "app:2", busybox(t), layer(t, image.Dir("app"), payload(version, "app/file", 2<<20),
		payload(version, "app/other", 700_000)))
	for _, ref := range []string{app, rebuilt} {
		must(t, c.Pull(ctx, ref))
		criFsInfo(t, n, c, ctx)
	}
}

// criPod runs a container in a sandbox on the host's network and takes both down.
func criPod(t *testing.T, n *node.Node, c *node.CRI, app string, ctx context.Context) {
	t.Helper()
	logs := t.TempDir()
	hostNetwork := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	largest := map[string]string{snapshots.LabelSnapshotMaxSize: "100000000"}
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: node.NewID("pod"), Uid: node.NewID("uid"), Namespace: "test"},
		LogDirectory: logs, Annotations: largest,
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: hostNetwork},
		},
	}
	pod, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox})
	must(t, err)
	created, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: pod.PodSandboxId, SandboxConfig: sandbox,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: app}, Annotations: largest,
			Command: []string{"sh", "-c", "echo started; exec sleep 100000"}, LogPath: "main.log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: hostNetwork}},
		},
	})
	must(t, err)
	id := created.ContainerId
	// docs/kubernetes.md says who can have a maximum size.
	for key, want := range map[string]bool{pod.PodSandboxId: true, id: false} {
		info, err := n.Client().SnapshotService(node.Snapshotter).Stat(namespaces.WithNamespace(ctx, node.CRINamespace), key)
		must(t, err)
		if _, got := info.Labels[snapshots.LabelSnapshotMaxSize]; got != want {
			t.Errorf("CRI passes max-size on: %v, want %v; labels %v", got, want, info.Labels)
		}
	}
	_, err = c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
	must(t, err)
	done, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id,
		Cmd: []string{"sh", "-c", "wc -c < /app/file; echo new > /app/new; cat /app/new"}, Timeout: 60})
	must(t, err)
	if got := string(done.Stdout); done.ExitCode != 0 || got != "2097152\nnew\n" {
		t.Errorf("exit %d, %q, %s", done.ExitCode, got, done.Stderr)
	}
	eventually(t, "statistics of the container", func() bool {
		stats, err := c.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
		must(t, err)
		one, err := c.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
		must(t, err)
		return len(stats.Stats) == 1 && one.Stats.GetWritableLayer().GetUsedBytes().GetValue() > 0
	})
	log, err := os.ReadFile(filepath.Join(logs, "main.log"))
	if err != nil || !strings.Contains(string(log), "started") {
		t.Errorf("the log says %q, %v", log, err)
	}
	_, err = c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id})
	must(t, err)
	_, err = c.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
	must(t, err)
	_, err = c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId})
	must(t, err)
	_, err = c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
	must(t, err)
}

// criFsInfo: what the kubelet is told of its image file system is what the store takes.
func criFsInfo(t *testing.T, n *node.Node, c *node.CRI, ctx context.Context) {
	t.Helper()
	var disk, told int64
	eventually(t, "the image file system's numbers", func() bool { // CRI adds snapshots up every ten seconds
		disk = 0
		for _, dir := range []string{"packs", "layers", "chains"} {
			used, err := rootfs.Usage(filepath.Join(n.DedupRoot(), dir))
			must(t, err)
			disk += used.Bytes
		}
		info, err := c.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
		must(t, err)
		if len(info.ImageFilesystems) == 0 {
			return false
		}
		fs := info.ImageFilesystems[0]
		if fs.FsId.GetMountpoint() != n.DedupRoot() {
			t.Errorf("the image file system is %s, want %s", fs.FsId.GetMountpoint(), n.DedupRoot())
		}
		told = int64(fs.UsedBytes.GetValue())
		return told > disk*99/100 && told < disk*101/100
	})
	t.Logf("the kubelet sees %d bytes, the store takes %d", told, disk)
}

// eventually waits for what happens in the background.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 1200 {
		if done() {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("waited in vain for %s", what)
}
