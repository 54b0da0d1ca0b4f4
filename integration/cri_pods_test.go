package integration

import (
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// criPods starts pods of one container over a CRI socket, as a kubelet does.
type criPods struct {
	*node.CRI
	logs       string // directory, in containerd's eyes
	namespaces *cri.NamespaceOption
	labels     *cri.SELinuxOption // nil: CRI chooses, where it does
}

type pod struct{ sandbox, container string }

// hostNetwork needs no CNI plugins.
func hostNetwork() *cri.NamespaceOption { return &cri.NamespaceOption{Network: cri.NamespaceMode_NODE} }

// start pulls a container's image and runs it in a pod of a runtime class with that handler.
func (c criPods) start(t *testing.T, handler, name string, config *cri.ContainerConfig) pod {
	t.Helper()
	ctx := testContext(t)
	if config.Linux == nil {
		config.Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}}
	}
	security := config.Linux.SecurityContext
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: node.NewID("uid"), Namespace: "test"},
		LogDirectory: c.logs,
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: c.namespaces, Privileged: security.Privileged, SelinuxOptions: c.labels,
		}},
	}
	config.Metadata, config.LogPath = &cri.ContainerMetadata{Name: name}, name+".log"
	security.NamespaceOptions, security.SelinuxOptions = c.namespaces, c.labels
	config.Image.RuntimeHandler = handler
	_, err := c.PullImage(ctx, &cri.PullImageRequest{Image: config.Image, SandboxConfig: sandbox})
	must(t, err)
	ran, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox, RuntimeHandler: handler})
	must(t, err)
	made, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: ran.PodSandboxId, Config: config,
		SandboxConfig: sandbox})
	must(t, err)
	_, err = c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: made.ContainerId})
	must(t, err)
	return pod{ran.PodSandboxId, made.ContainerId}
}

// exec runs a script in a pod, and returns what it wrote, errors last.
func (c criPods) exec(t *testing.T, p pod, script string) string {
	t.Helper()
	done, err := c.ExecSync(testContext(t), &cri.ExecSyncRequest{ContainerId: p.container,
		Cmd: []string{"sh", "-c", script}, Timeout: 60})
	must(t, err)
	return string(done.Stdout) + string(done.Stderr)
}

// written is what CRI says that a pod's container wrote.
func (c criPods) written(t *testing.T, p pod) uint64 {
	t.Helper()
	stats, err := c.ContainerStats(testContext(t), &cri.ContainerStatsRequest{ContainerId: p.container})
	must(t, err)
	return stats.Stats.GetWritableLayer().GetUsedBytes().GetValue()
}

func (c criPods) remove(t *testing.T, p pod) {
	t.Helper()
	ctx := testContext(t)
	_, err := c.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container, Timeout: 20})
	must(t, err)
	_, err = c.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: p.container})
	must(t, err)
	_, err = c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	must(t, err)
	_, err = c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	must(t, err)
}
