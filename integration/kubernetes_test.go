package integration

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// manifests are what deploy/kubernetes/dedup-snapshotter.yaml holds.
type manifests struct {
	config corev1.ConfigMap
	daemon appsv1.DaemonSet
	class  nodev1.RuntimeClass
}

// readManifests decodes the file into Kubernetes' own types; a key that they do not have is an error.
func readManifests(t *testing.T) (m manifests) {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	data, err := os.ReadFile(filepath.Join(root, "deploy/kubernetes/dedup-snapshotter.yaml"))
	must(t, err)
	// The machine's network is that of everything that is tested at the same time.
	_, port, err := net.SplitHostPort(freeAddress(t))
	must(t, err)
	data = bytes.ReplaceAll(data, []byte("9741"), []byte(port))
	docs := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for _, into := range []any{&m.config, &m.daemon, &m.class} {
		doc, err := docs.Read()
		must(t, err)
		if err := sigsyaml.UnmarshalStrict(doc, into); err != nil {
			t.Fatalf("%v\n%s", err, doc)
		}
	}
	if _, err := docs.Read(); !errors.Is(err, io.EOF) {
		t.Error("more documents than are looked at")
	}
	return m
}

// The manifests fit together, and the daemon's pod has what mounting for containerd takes.
func TestManifests(t *testing.T) {
	m := readManifests(t)
	if m.config.Kind != "ConfigMap" || m.daemon.Kind != "DaemonSet" || m.class.Kind != "RuntimeClass" {
		t.Errorf("kinds are %s, %s, %s", m.config.Kind, m.daemon.Kind, m.class.Kind)
	}
	template := m.daemon.Spec.Template
	for k, v := range m.daemon.Spec.Selector.MatchLabels {
		if template.Labels[k] != v {
			t.Errorf("the selector's %s=%s is no label of the pod", k, v)
		}
	}
	for k, v := range m.class.Scheduling.NodeSelector {
		if template.Spec.NodeSelector[k] != v {
			t.Errorf("pods of the class go to nodes without the daemon: %s=%s", k, v)
		}
	}
	volumes := map[string]corev1.Volume{}
	for _, v := range template.Spec.Volumes {
		volumes[v.Name] = v
	}
	container := template.Spec.Containers[0]
	want := map[string]corev1.MountPropagationMode{
		"/run/containerd-dedup-grpc":     corev1.MountPropagationBidirectional,
		"/run/containerd":                corev1.MountPropagationHostToContainer,
		"/var/lib/containerd-dedup-grpc": "", "/var/lib/containerd/io.containerd.content.v1.content": "",
	}
	for _, vm := range container.VolumeMounts {
		v, ok := volumes[vm.Name]
		var mode corev1.MountPropagationMode
		if vm.MountPropagation != nil {
			mode = *vm.MountPropagation
		}
		switch {
		case !ok:
			t.Errorf("there is no volume %s", vm.Name)
		case v.ConfigMap != nil && v.ConfigMap.Name != m.config.Name:
			t.Errorf("there is no ConfigMap %s", v.ConfigMap.Name)
		case v.HostPath == nil:
		case v.HostPath.Path != vm.MountPath || mode != want[vm.MountPath]:
			t.Errorf("%s of the node is at %s, propagation %q", v.HostPath.Path, vm.MountPath, mode)
		default:
			delete(want, vm.MountPath)
		}
	}
	if len(want) > 0 {
		t.Errorf("not mounted: %v", want)
	}
	if p := container.SecurityContext.Privileged; p == nil || !*p {
		t.Error("Kubernetes refuses Bidirectional without privileged")
	}
}

// The DaemonSet's pod serves pods of its RuntimeClass, on a fresh machine through CRI as a kubelet starts them: both
// mount in containerd's sight, other pods stay with overlayfs, and containers outlive the daemon's pod.
func TestDaemonSet(t *testing.T) {
	t.Parallel()
	daemonSetServes(t, false)
}

// So it does where CRI pulls by itself, not through the transfer service, for a setting that keeps layers.
func TestDaemonSetWhereCRIPulls(t *testing.T) {
	t.Parallel()
	daemonSetServes(t, true)
}

// Where CRI gives up layers that one snapshotter has unpacked (EKS, GKE), another one has nothing to unpack, and no pod
// of the class could start: the command that sets a node up for the DaemonSet refuses, and says what to do. It does not
// once the setting is another.
func TestDaemonSetWhereLayersGo(t *testing.T) {
	t.Parallel()
	k := bootUnconfigured(t, "discard_unpacked_layers = true")
	const install = "dedupctl config containerd --write --daemonset --yes"
	if out, err := k.machine.Run(testContext(t), install); err == nil ||
		!strings.Contains(err.Error(), "discard_unpacked_layers is true in /etc/containerd/config.toml") {
		t.Errorf("%s: %v", out, err)
	}
	k.run(t, "[ ! -e /etc/containerd/conf.d/dedup-snapshotter.toml ]")
	k.run(t, "sed -i s/discard_unpacked_layers.*/discard_unpacked_layers=false/ /etc/containerd/config.toml; "+install)
}

func daemonSetServes(t *testing.T, byItself bool) {
	t.Helper()
	k := bootKubelet(t, byItself)
	k.startDaemonSet(t)
	if byItself {
		k.run(t, "journalctl -u containerd | grep 'Falling back to local image pull mode'")
	}

	app := k.startPod(t, k.m.class.Handler, "app")
	plain := k.startPod(t, "", "plain")
	if got := k.rootfs(t, app); !strings.Contains(got, "/run/containerd-dedup-grpc/chains/") {
		t.Errorf("a pod of the class runs from %s", got)
	}
	if got := k.rootfs(t, plain); strings.Contains(got, "dedup") {
		t.Errorf("a pod without class runs from %s", got)
	}

	k.remove(t, k.daemon)
	if out := k.exec(t, app, "cat /data | wc -c; echo new > /new; cat /new"); out != "300000\nnew\n" {
		t.Errorf("without the daemon a container reads %q", out)
	}
	// Nor do other pods need it, above all its own: it could never come back on a node that has to pull its image.
	k.images["app"] = k.images["unknown"]
	other := k.startPod(t, "", "other")
	k.startDaemonSet(t)
	second := k.startPod(t, k.m.class.Handler, "second")
	if out := k.exec(t, second, "cat /data | wc -c"); out != "300000\n" {
		t.Errorf("a container of the daemon's next pod reads %q", out)
	}
	for _, p := range []pod{app, second, plain, other} {
		k.remove(t, p)
	}
	eventually(t, "chain images of gone pods to be unmounted on the node", func() bool {
		return k.run(t, "grep -c /run/containerd-dedup-grpc/chains/ /proc/mounts || true") == "0\n"
	})
}

// kubelet starts pods on a machine as the kubelet does.
type kubelet struct {
	criPods
	machine *machine.Machine
	m       manifests
	images  map[string]string // name -> reference
	daemon  pod
}

// bootKubelet boots a node that is set up for the DaemonSet, and on which CRI pulls by itself or not.
func bootKubelet(t *testing.T, byItself bool, more ...func(*machine.Options)) *kubelet {
	t.Helper()
	setting := ""
	if byItself {
		setting = "max_concurrent_downloads = 2" // one of those that the transfer service does not have
	}
	k := bootUnconfigured(t, setting, more...)
	k.run(t, "dedupctl config containerd --write --daemonset --yes; systemctl restart containerd")
	c, err := node.DialCRI(testContext(t), k.machine.Path("/run/containerd/containerd.sock"))
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	k.criPods = criPods{CRI: c, logs: "/var/log/pods", namespaces: hostNetwork()}
	return k
}

// bootUnconfigured boots a node whose containerd has a runtime for dedup, and a setting of CRI's images.
func bootUnconfigured(t *testing.T, setting string, more ...func(*machine.Options)) *kubelet {
	t.Helper()
	r := startRegistry(t)
	root, err := node.ModuleRoot()
	must(t, err)
	k := &kubelet{m: readManifests(t), images: map[string]string{}}
	pause, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	k.images["pause"] = pushImage(t, r, "pause:1", pause)
	k.images["app"] = push(t, r, "app:1", busybox(t), layer(t, payload("daemonset", "data", 300000)))
	k.images["unknown"] = push(t, r, "unknown:1", layer(t, payload("unknown", "data", 300000)), busybox(t))
	daemon := daemonLayer(t, root)
	k.images["daemon"] = push(t, r, "daemon:1", busybox(t), daemon)
	k.images["newer"] = push(t, r, "daemon:2", busybox(t), daemon, layer(t, image.File("newer", "newer\n")))
	k.images["owned"] = push(t, r, "owned:1", ownedImage(t, "daemonset")...)
	runtime, err := os.ReadFile(filepath.Join(root, "deploy/kubernetes/containerd-runtime.toml"))
	must(t, err)
	k.machine = bootMachine(t, func(_ *testing.T, o *machine.Options) {
		o.Files["/etc/hosts"] = "127.0.0.1 localhost\n"
		o.Files["/etc/containerd/conf.d/runtime.toml"] = strings.Replace(string(runtime), "SystemdCgroup = true",
			"SystemdCgroup = false", 1)
		o.Files["/etc/containerd/config.toml"] = "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n" +
			"[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"" + k.images["pause"] + "\"\n" +
			"[plugins.\"io.containerd.cri.v1.images\"]\n  " + setting + "\n" +
			// What a container on this machine, which may be one itself, cannot do.
			"[plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n  disable_apparmor = true\n"
		for name, text := range k.m.config.Data {
			o.Files["/configmap/"+name] = text
		}
		o.Binds = append(o.Binds, machine.Bind{Source: filepath.Join(root, "bin/dedupctl"),
			Target: "/usr/local/bin/dedupctl"})
		for _, add := range more {
			add(o)
		}
	})
	return k
}

// daemonLayer holds what the image of the DaemonSet needs.
func daemonLayer(t *testing.T, root string) *image.Layer {
	t.Helper()
	var entries []image.Entry
	for _, name := range []string{"containerd-dedup-grpc", "dedupctl"} {
		bin, err := os.ReadFile(filepath.Join(root, "bin", name))
		if errors.Is(err, os.ErrNotExist) {
			t.Skipf("needs bin/%s: run `make build`", name)
		}
		must(t, err)
		e := image.File("usr/bin/"+name, string(bin))
		e.Mode = 0o755
		entries = append(entries, e)
	}
	return layer(t, entries...)
}

func (k *kubelet) run(t *testing.T, script string) string {
	t.Helper()
	out, err := k.machine.Run(testContext(t), script)
	if err != nil {
		log, _ := k.machine.Run(testContext(t),
			"journalctl -n 60 -u containerd | grep -v 'loading plugin'; cat /var/log/pods/*.log")
		t.Fatal(err, log)
	}
	return out
}

// startDaemonSet starts the pod of the DaemonSet and waits until it serves.
func (k *kubelet) startDaemonSet(t *testing.T) {
	t.Helper()
	spec := k.m.daemon.Spec.Template.Spec
	hosts := map[string]string{}
	for _, v := range spec.Volumes {
		switch {
		case v.ConfigMap != nil:
			hosts[v.Name] = "/configmap"
		case v.HostPath.Type != nil && *v.HostPath.Type == corev1.HostPathDirectoryOrCreate:
			k.run(t, "mkdir -p "+v.HostPath.Path)
			fallthrough
		default:
			hosts[v.Name] = v.HostPath.Path
		}
	}
	c := spec.Containers[0]
	config := &cri.ContainerConfig{
		Image: &cri.ImageSpec{Image: k.images["daemon"]}, Command: c.Command,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			Privileged: *c.SecurityContext.Privileged, ReadonlyRootfs: *c.SecurityContext.ReadOnlyRootFilesystem,
		}},
	}
	for _, vm := range c.VolumeMounts {
		m := &cri.Mount{ContainerPath: vm.MountPath, HostPath: hosts[vm.Name], Readonly: vm.ReadOnly}
		switch {
		case vm.MountPropagation == nil:
		case *vm.MountPropagation == corev1.MountPropagationBidirectional:
			m.Propagation = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
		case *vm.MountPropagation == corev1.MountPropagationHostToContainer:
			m.Propagation = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		}
		config.Mounts = append(config.Mounts, m)
	}
	k.daemon = k.start(t, "", "daemon", config)
	probe := c.StartupProbe.HTTPGet
	url := "http://" + probe.Host + ":" + probe.Port.String() + probe.Path
	eventually(t, "the daemon's startup probe", func() bool {
		_, err := httpGet(url)
		return err == nil
	})
}

// startPod starts a pod that sleeps, of a runtime class with that handler.
func (k *kubelet) startPod(t *testing.T, handler, name string) pod {
	t.Helper()
	return k.start(t, handler, name, &cri.ContainerConfig{
		Image: &cri.ImageSpec{Image: k.images["app"]}, Command: []string{"/bin/sleep", "100000"},
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
	})
}

// rootfs returns the mount that is the root of a pod's container.
func (k *kubelet) rootfs(t *testing.T, p pod) string {
	t.Helper()
	return k.run(t, "grep /io.containerd.runtime.v2.task/k8s.io/"+p.container+"/rootfs /proc/mounts")
}
