package integration

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// kube is a node with a kubelet.
type kube struct {
	*node.Kubelet
	t   *testing.T
	n   *node.Node
	cri *node.CRI
	ctx context.Context
	bin string // the daemon's program
}

// TestKubelet runs a real kubelet, without an API server, on containerd with dedup as CRI's snapshotter. `make
// test-kubelet` does so.
func TestKubelet(t *testing.T) {
	if os.Getenv("DEDUP_KUBELET") == "" {
		t.Skip("set DEDUP_KUBELET=1 to build and run a kubelet (ten minutes once, then ten)")
	}
	for _, discard := range []bool{false, true} {
		t.Run(fmt.Sprintf("discard_unpacked_layers=%v", discard), func(t *testing.T) { kubeletLife(t, discard) })
	}
}

func kubeletLife(t *testing.T, discard bool) {
	r, dir := startRegistry(t), t.TempDir()
	pause, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	owned := ownedImage(t, "kubelet")
	app := push(t, r, "app:1", append(owned, layer(t, payload("kubelet", "app/large", 20<<20)))...)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	t.Cleanup(cancel)
	k := kube{t: t, ctx: ctx, bin: filepath.Join(dir, "containerd-dedup-grpc")}
	installBinary(t, k.bin)
	runc, err := node.BuildRunc(k.ctx, func(text string) { t.Log(text) })
	must(t, err)
	k.n = startDedup(t, node.Options{
		DaemonBinary: k.bin, Runc: runc, CRI: true, PauseImage: pushImage(t, r, "pause:1", pause),
		Plugins: map[string]map[string]any{
			"io.containerd.cri.v1.runtime": {"cni": emptyCNI(t, node.DefaultVersion)},
			"io.containerd.cri.v1.images":  {"discard_unpacked_layers": discard},
		},
	})
	k.cri, err = k.n.CRI(k.ctx)
	must(t, err)
	k.Kubelet, err = node.StartKubelet(k.ctx, k.n, nil)
	must(t, err)
	t.Cleanup(k.clean)

	k.apply("plain", podSpec(app, "while :; do date > /now; sleep 1; done", nil))
	plain := k.running("plain")
	k.apply("mapped", podSpec(app, "sleep 100000", map[string]any{"hostUsers": false}))
	k.seesOwners(k.running("mapped"))
	k.statistics("plain")
	k.survives(plain)
	k.exceeds(app)
	unused := push(t, r, "unused:1", owned[0], layer(t, payload("kubelet-unused", "unused", 24<<20)))
	k.collects(unused, !discard)
}

// podSpec is a pod of one container.
func podSpec(ref, command string, more map[string]any) map[string]any {
	container := map[string]any{
		"name": "main", "image": ref, "command": []string{"sh", "-c", command}, "imagePullPolicy": "IfNotPresent",
		"volumeMounts": []any{map[string]any{"name": "image", "mountPath": "/volume", "readOnly": true}},
	}
	spec := map[string]any{
		"restartPolicy": "Always", "terminationGracePeriodSeconds": 1, "containers": []any{container},
		"volumes": []any{map[string]any{
			"name": "image", "image": map[string]any{"reference": ref, "pullPolicy": "IfNotPresent"},
		}},
	}
	for key, value := range more {
		spec[key] = value
	}
	return spec
}

func (k *kube) apply(name string, spec map[string]any) {
	k.t.Helper()
	b, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "namespace": "default"}, "spec": spec,
	})
	must(k.t, err)
	must(k.t, os.WriteFile(filepath.Join(k.Manifests(), name+".json"), b, 0o600))
}

// containers are those of a pod in a state.
func (k *kube) containers(pod string, state cri.ContainerState) []*cri.Container {
	k.t.Helper()
	l, err := k.cri.ListContainers(k.ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		State:         &cri.ContainerStateValue{State: state},
		LabelSelector: map[string]string{"io.kubernetes.pod.name": pod + "-node"},
	}})
	must(k.t, err)
	return l.Containers
}

// running waits until a pod's container runs, and returns its id.
func (k *kube) running(pod string) string {
	k.t.Helper()
	for range 600 {
		if l := k.containers(pod, cri.ContainerState_CONTAINER_RUNNING); len(l) == 1 {
			return l[0].Id
		}
		time.Sleep(200 * time.Millisecond)
	}
	log, _ := os.ReadFile(k.n.LogPath("kubelet"))
	lines := strings.Split(string(log), "\n")
	k.t.Fatalf("pod %s does not run; the kubelet says:\n%s", pod, strings.Join(lines[max(0, len(lines)-25):], "\n"))
	return ""
}

func (k *kube) exec(id, command string) string {
	k.t.Helper()
	out, err := k.cri.ExecSync(k.ctx, &cri.ExecSyncRequest{
		ContainerId: id, Cmd: []string{"sh", "-c", command}, Timeout: 30,
	})
	must(k.t, err)
	if out.ExitCode != 0 {
		k.t.Errorf("%s: exit %d: %s", command, out.ExitCode, out.Stderr)
	}
	return string(out.Stdout)
}

// seesOwners: a pod with hostUsers: false sees the image's owners, in its root and in an image volume.
func (k *kube) seesOwners(id string) {
	k.t.Helper()
	if ids := strings.Fields(k.exec(id, "cat /proc/self/uid_map")); len(ids) < 3 || ids[1] == "0" {
		k.t.Fatalf("hostUsers: false maps %v", ids)
	}
	const want = "0:0 /\n1:2 /app\n3:4 /app/file\n65534:65535 /app/high\n0:0 /app/large\n5:6 /app/link\n7:8 /app/owned\n"
	if got := k.exec(id, "stat -c '%u:%g %n' / /app /app/*"); got != want {
		k.t.Errorf("owners in a pod with hostUsers: false:\n%s", got)
	}
	got := k.exec(id, "cd /volume && stat -c '%u:%g /%n' app app/*")
	if got == "" || !strings.HasSuffix(want, got) {
		k.t.Errorf("owners in an image volume with hostUsers: false:\n%s", got)
	}
	k.exec(id, "echo more >> /app/owned && [ $(stat -c %u:%g /app/owned) = 7:8 ]")
}

// summary is what the kubelet tells of the node's disk.
type summary struct {
	Node struct {
		Runtime struct{ ImageFs, ContainerFs fsStats }
	}
	Pods []struct {
		PodRef     struct{ Name string }
		Containers []struct{ Rootfs fsStats }
	}
}

type fsStats struct{ UsedBytes, CapacityBytes, InodesUsed int64 }

func (k *kube) summary() (s summary) {
	k.t.Helper()
	own := &tls.Config{InsecureSkipVerify: true} // it signs its certificate itself
	client := http.Client{Transport: &http.Transport{TLSClientConfig: own}, Timeout: 20 * time.Second}
	r, err := client.Get(k.URL("/stats/summary"))
	if err != nil {
		return s // it comes up after the pods
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	must(k.t, err)
	if err := json.Unmarshal(b, &s); err != nil {
		k.t.Logf("%s: %.200s", r.Status, b)
	}
	return s
}

// statistics: what the kubelet says of images and of what a container wrote is what the disk holds.
func (k *kube) statistics(pod string) {
	k.t.Helper()
	const written = 5 << 20
	k.exec(k.running(pod), fmt.Sprintf("head -c %d /dev/urandom > /written; sync", written))
	var images, container, disk int64
	for range 60 { // CRI adds up every few seconds
		used, err := rootfs.Usage(filepath.Join(k.n.DedupRoot(), "snapshots"))
		must(k.t, err)
		disk = k.stored() + used.Bytes
		s := k.summary()
		images, container = s.Node.Runtime.ImageFs.UsedBytes, 0
		for _, p := range s.Pods {
			if p.PodRef.Name == pod+"-node" && len(p.Containers) == 1 {
				container = p.Containers[0].Rootfs.UsedBytes
			}
		}
		if near(disk, images) && container > written && container < written+1<<20 {
			break
		}
		time.Sleep(time.Second)
	}
	k.t.Logf("/stats/summary: imageFs %d bytes used, du says %d; container %d bytes, it wrote %d",
		images, disk, container, written)
	if !near(disk, images) || container < written || container > written+1<<20 {
		k.t.Errorf("the kubelet's figures are not what the disk holds")
	}
}

// survives: pods go on while the daemon is stopped, killed, upgraded and started again, and restart after it.
func (k *kube) survives(id string) {
	k.t.Helper()
	upgrade := func() error {
		installBinary(k.t, k.bin)
		return k.n.StopDaemon()
	}
	for name, end := range map[string]func() error{
		"stopped": k.n.StopDaemon, "killed": k.n.KillDaemon, "upgraded": upgrade,
	} {
		must(k.t, end())
		if got := k.exec(id, "wc -c < /app/large"); strings.TrimSpace(got) != fmt.Sprint(20<<20) {
			k.t.Errorf("daemon %s: a running pod reads %q", name, got)
		}
		must(k.t, k.n.StartDaemon(k.ctx))
	}
	_, err := k.cri.StopContainer(k.ctx, &cri.StopContainerRequest{ContainerId: id})
	must(k.t, err)
	eventually(k.t, "the kubelet to restart the container", func() bool {
		l := k.containers("plain", cri.ContainerState_CONTAINER_RUNNING)
		return len(l) == 1 && l[0].Id != id
	})
}

// exceeds: the kubelet notices a container that writes more than its ephemeral-storage. It ends no static pod for it.
func (k *kube) exceeds(app string) {
	k.t.Helper()
	spec := podSpec(app, "head -c 30000000 /dev/urandom > /much; sleep 100000", nil)
	main := spec["containers"].([]any)[0].(map[string]any)
	main["resources"] = map[string]any{"limits": map[string]string{"ephemeral-storage": "10Mi"}}
	k.apply("greedy", spec)
	k.running("greedy")
	eventually(k.t, "the kubelet to notice", func() bool {
		log, err := os.ReadFile(k.n.LogPath("kubelet"))
		must(k.t, err)
		return strings.Contains(string(log), "cannot evict a critical pod") && strings.Contains(string(log), "greedy")
	})
	must(k.t, os.Remove(filepath.Join(k.Manifests(), "greedy.json")))
	eventually(k.t, "the pod to go", func() bool {
		return len(k.containers("greedy", cri.ContainerState_CONTAINER_RUNNING)) == 0
	})
}

// collects: what the kubelet removes of images that no pod uses comes back as space, be it that more is used than it
// wants (which it looks at every five minutes) or that too little is free.
func (k *kube) collects(unused string, threshold bool) {
	k.t.Helper()
	must(k.t, k.cri.Pull(k.ctx, unused))
	before := k.stored()
	var fs unix.Statfs_t
	must(k.t, unix.Statfs(k.n.DedupRoot(), &fs))
	config := map[string]any{"evictionHard": map[string]string{
		"imagefs.available": fmt.Sprint(fs.Bavail*uint64(fs.Bsize) + 10<<30),
	}}
	if threshold {
		config = map[string]any{"imageGCHighThresholdPercent": 1, "imageGCLowThresholdPercent": 0, "imageMinimumGCAge": "1ns"}
	}
	must(k.t, k.Stop())
	var err error
	k.Kubelet, err = node.StartKubelet(k.ctx, k.n, config)
	must(k.t, err)
	for range 600 {
		if before-k.stored() > 24<<20 {
			break
		}
		time.Sleep(time.Second)
	}
	after := k.stored()
	k.t.Logf("image garbage collection (threshold: %v): %d bytes before, %d after; the unused layer has %d",
		threshold, before, after, 24<<20)
	if before-after < 24<<20 {
		k.t.Error("the space of an unused image did not come back")
	}
	got := k.exec(k.running("plain"), "wc -c < /app/large")
	if strings.TrimSpace(got) != fmt.Sprint(20<<20) {
		k.t.Errorf("a pod that runs reads %q", got)
	}
}

// stored is what layers take on the disk.
func (k *kube) stored() (total int64) {
	k.t.Helper()
	for _, dir := range []string{"packs", "layers", "chains"} {
		used, err := rootfs.Usage(filepath.Join(k.n.DedupRoot(), dir))
		must(k.t, err)
		total += used.Bytes
	}
	return total
}

func (k *kube) clean() {
	if err := k.Stop(); err != nil {
		k.t.Error(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	l, err := k.cri.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	must(k.t, err)
	for _, p := range l.Items {
		if _, err := k.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			k.t.Error(err)
		}
		if _, err := k.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			k.t.Error(err)
		}
	}
	_ = k.cri.Close()
}
