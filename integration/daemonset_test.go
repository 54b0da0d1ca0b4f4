package integration

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The whole of deploy/kubernetes/dedup-snapshotter.yaml in a cluster of one node with a real kubelet, also where CRI
// pulls by itself, not through the transfer service. `make test-kubelet` does so.
func TestCluster(t *testing.T) {
	needCluster(t)
	for name, byItself := range map[string]bool{"transfer service": false, "CRI pulls": true} {
		t.Run(name, func(t *testing.T) { clusterLife(t, byItself) })
	}
}

const (
	dataSize = 300000 // of /data in bootKubelet's image
	// checker reads the image over and over, and notes when it reads anything else.
	checker = "while :; do [ $(wc -c < /data) = 300000 ] || date >> /bad; sleep 0.1; done"
	forever = "while :; do sleep 1; done"
)

func clusterLife(t *testing.T, byItself bool) {
	c := startCluster(t, byItself)
	c.apply()
	c.create("app", "app", checker, true)
	c.create("plain", "app", checker, false)
	app, plain := c.running("app"), c.running("plain")
	if got := c.rootfs(t, app); !strings.Contains(got, "/run/containerd-dedup-grpc/chains/") {
		t.Errorf("a pod of the class runs from %s", got)
	}
	if got := c.rootfs(t, plain); strings.Contains(got, "dedup") {
		t.Errorf("a pod without class runs from %s", got)
	}
	if byItself {
		c.run(t, "journalctl -u containerd | grep 'Falling back to local image pull mode'")
	}
	c.mapped()
	c.deleted(app)
	c.killed(app)
	c.upgraded(app)
	c.away()
	c.healthy("to the end", app)
	c.restarted(app)
	c.evicted()
	c.rebooted()
	c.removed()
}

// apply creates what the manifest has. Only the image is another.
func (c *cluster) apply() {
	c.t.Helper()
	c.m.daemon.Spec.Template.Spec.Containers[0].Image = c.images["daemon"]
	c.do("POST", "/api/v1/namespaces/kube-system/configmaps", c.m.config)
	c.do("POST", "/apis/node.k8s.io/v1/runtimeclasses", c.m.class)
	c.do("POST", daemonSets, c.m.daemon)
	c.served(c.images["daemon"])
}

// healthy: a pod that ran all the time has read nothing but its image, and a new pod runs.
func (c *cluster) healthy(when string, p pod) {
	c.t.Helper()
	if out := c.exec(c.t, p, "cat /bad 2>&1; echo x >> /new && wc -c < /data"); !strings.HasSuffix(out,
		fmt.Sprintf("No such file or directory\n%d\n", dataSize)) {
		c.t.Errorf("%s: a pod that runs reads %q", when, out)
	}
	name := strings.ReplaceAll(when, " ", "-")
	c.create(name, "app", forever, true)
	if out := c.exec(c.t, c.running(name), "wc -c < /data"); out != fmt.Sprintln(dataSize) {
		c.t.Errorf("%s: a new pod reads %q", when, out)
	}
	c.do("DELETE", ownPods+"/"+name, nil)
}

// mapped: a pod of the class with a user namespace of its own sees the owners that its image has.
func (c *cluster) mapped() {
	c.t.Helper()
	no := false
	c.create("mapped", "owned", forever, true, func(p *corev1.Pod) { p.Spec.HostUsers = &no })
	out := c.exec(c.t, c.running("mapped"), "stat -c %u:%g /app/owned /app/high; tr -s ' ' < /proc/self/uid_map")
	if !strings.HasPrefix(out, "7:8\n65534:65535\n") || strings.Contains(out, " 0 0 ") {
		c.t.Errorf("owners, and the mapping, of a pod with hostUsers: false: %q", out)
	}
	c.do("DELETE", ownPods+"/mapped", nil)
}

// deleted: the daemon's pod is deleted under running pods, and the DaemonSet has another one.
func (c *cluster) deleted(app pod) {
	c.t.Helper()
	before := c.served(c.images["daemon"])
	c.do("DELETE", systemPods+"/"+before.Name, nil)
	eventually(c.t, "another pod of the DaemonSet", func() bool {
		return c.served(c.images["daemon"]).UID != before.UID
	})
	c.healthy("after the pod was deleted", app)
}

// killed: the daemon is killed under running pods, and the kubelet starts it again.
func (c *cluster) killed(app pod) {
	c.t.Helper()
	status := c.served(c.images["daemon"]).Status.ContainerStatuses[0]
	id := strings.TrimPrefix(status.ContainerID, "containerd://")
	_, err := c.StopContainer(testContext(c.t), &cri.StopContainerRequest{ContainerId: id}) // without a grace period
	must(c.t, err)
	eventually(c.t, "the daemon's container to be restarted", func() bool {
		return c.served(c.images["daemon"]).Status.ContainerStatuses[0].RestartCount > status.RestartCount
	})
	c.healthy("after the daemon was killed", app)
}

// upgraded: the DaemonSet gets another image under running pods.
func (c *cluster) upgraded(app pod) {
	c.t.Helper()
	container := map[string]any{"name": "daemon", "image": c.images["newer"]}
	c.patch(map[string]any{"containers": []any{container}})
	p := c.served(c.images["newer"])
	id := strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
	if out := c.exec(c.t, pod{container: id}, "cat /newer; dedupctl doctor --json"); !strings.HasPrefix(out, "newer") {
		c.t.Errorf("the new image has %q", out)
	}
	c.healthy("after the upgrade", app)
}

// patch changes the DaemonSet's pods.
func (c *cluster) patch(spec map[string]any) {
	c.t.Helper()
	c.do("PATCH", daemonSets+"/"+c.m.daemon.Name, map[string]any{
		"spec": map[string]any{"template": map[string]any{"spec": spec}},
	})
}

// away: while the node has no daemon, pods without the class are pulled and start. A pod of the class waits, says why,
// and runs when the daemon is back.
func (c *cluster) away() {
	c.t.Helper()
	c.patch(map[string]any{"nodeSelector": map[string]any{"nowhere": "true"}})
	c.gone(systemPods)
	c.create("other", "unknown", forever, false)
	c.create("early", "unknown", forever, true)
	c.running("other")
	c.t.Logf("a pod of the class without the daemon: %s", c.said("early", "dedup"))
	c.patch(map[string]any{"nodeSelector": map[string]any{"nowhere": nil}})
	c.running("early")
	c.served(c.images["newer"])
}

// restarted: the kubelet restarts a container of the class that ends.
func (c *cluster) restarted(app pod) {
	c.t.Helper()
	_, err := c.StopContainer(testContext(c.t), &cri.StopContainerRequest{ContainerId: app.container})
	must(c.t, err)
	eventually(c.t, "the kubelet to restart a container", func() bool {
		return c.running("app").container != app.container
	})
}

// evicted: a pod that writes more than its ephemeral-storage is evicted. One of the class is not: containerd adds up
// what containers write for the default snapshotter alone, and tells the kubelet 0 for all others
// (TestCRICountsOneSnapshotter). docs/kubernetes.md says so.
func (c *cluster) evicted() {
	c.t.Helper()
	greedy := func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{
			corev1.ResourceEphemeralStorage: resource.MustParse("10Mi"),
		}
	}
	const write = "head -c 30000000 /dev/urandom > /much; sleep 100000"
	c.create("uncounted", "app", write, true, greedy)
	c.create("greedy", "app", write, false, greedy)
	c.t.Logf("a pod without class that writes too much: %s", c.said("greedy", "Evicted"))
	eventually(c.t, "the pod to fail", func() bool {
		var p corev1.Pod
		must(c.t, c.call("GET", ownPods+"/greedy", nil, &p))
		return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "Evicted"
	})
	p := c.running("uncounted")
	if used := c.written(c.t, p); used != 0 {
		c.t.Errorf("containerd counts %d bytes of a pod of the class: docs/kubernetes.md says that it counts none", used)
	}
	if out := c.exec(c.t, p, "wc -c < /much"); out != "30000000\n" {
		c.t.Errorf("a pod of the class wrote %q", out)
	}
	c.do("DELETE", ownPods+"/uncounted", nil)
}

// rebooted: nothing of what ran is there any more, nor what was mounted in /run. The kubelet starts all pods at once,
// the daemon's among them, and all of them run in the end.
func (c *cluster) rebooted() {
	c.t.Helper()
	c.run(c.t, "systemctl stop kubelet")
	ctx := testContext(c.t)
	l, err := c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	must(c.t, err)
	for _, p := range l.Items {
		_, err := c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id})
		must(c.t, err)
	}
	c.run(c.t, `systemctl stop containerd
grep -o '/run/containerd-dedup-grpc[^ ]*' /proc/mounts | sort -r | xargs -r umount -l
rm -rf --one-file-system /run/containerd-dedup-grpc /run/containerd
systemctl start containerd kubelet`)
	for _, name := range []string{"app", "plain", "early", "other"} {
		eventually(c.t, "pod "+name+" after a reboot", func() bool {
			out, err := c.ExecSync(ctx, &cri.ExecSyncRequest{
				ContainerId: c.running(name).container, Cmd: []string{"wc", "-c", "/data"}, Timeout: 60,
			})
			return err == nil && string(out.Stdout) == fmt.Sprintf("%d /data\n", dataSize)
		})
	}
	c.served(c.images["newer"])
}

// removed: pods of the class go, then the DaemonSet, then what containerd's configuration has, as the page says.
func (c *cluster) removed() {
	c.t.Helper()
	for _, name := range []string{"app", "early", "greedy"} {
		c.do("DELETE", ownPods+"/"+name, nil)
	}
	eventually(c.t, "chain images of gone pods to be unmounted on the node", func() bool {
		return c.run(c.t, "grep -c /run/containerd-dedup-grpc/chains/ /proc/mounts || true") == "0\n"
	})
	c.do("DELETE", daemonSets+"/"+c.m.daemon.Name, nil)
	c.gone(systemPods)
	c.run(c.t, `rm /etc/containerd/conf.d/runtime.toml
dedupctl config containerd --remove --yes
systemctl restart containerd
grep containerd-dedup-grpc /proc/mounts && exit 1
rm -rf /var/lib/containerd-dedup-grpc /run/containerd-dedup-grpc`)
	c.create("last", "owned", forever, false)
	c.running("last")
	if out := c.exec(c.t, c.running("plain"), "wc -c < /data"); out != fmt.Sprintln(dataSize) {
		c.t.Errorf("a pod without class reads %q after the removal", out)
	}
	if out := c.run(c.t, "grep -il dedup /etc/containerd/config.toml /etc/containerd/conf.d/* || true"); out != "" {
		c.t.Errorf("containerd's configuration still speaks of dedup: %s", out)
	}
}
