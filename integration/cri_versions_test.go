package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// cniScript stands in for CNI's plugins: pods get a network namespace with nothing in it.
const cniScript = `#!/bin/sh
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}' ;;
ADD)
	echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],'
	echo '"ips":[{"address":"10.88.0.2/16","interface":0}]}' ;;
esac
`

// emptyCNI makes plugins of cniScript, and returns what tells a containerd where they are.
func emptyCNI(t *testing.T, version string) map[string]any {
	t.Helper()
	dir, conf := t.TempDir(), t.TempDir()
	list := []byte(`{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"test"}]}`)
	must(t, os.WriteFile(filepath.Join(conf, "10-test.conflist"), list, 0o600))
	for _, name := range []string{"loopback", "test"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(cniScript), 0o755))
	}
	if node.AtLeast(version, 2, 1) {
		return map[string]any{"bin_dirs": []string{dir}, "conf_dir": conf}
	}
	return map[string]any{"bin_dir": dir, "conf_dir": conf}
}

// each2x runs a test on each containerd 2.x.
func each2x(t *testing.T, test func(t *testing.T, version string)) {
	t.Helper()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		if node.AtLeast(version, 2, 0) {
			t.Run(version, func(t *testing.T) { test(t, version) })
		}
	}
}

// sleeper pushes what CRI runs in a pod's sandbox.
func sleeper(t *testing.T, r *registry.Registry) string {
	t.Helper()
	img, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	return pushImage(t, r, "pause:1", img)
}

// A pod with hostUsers: false sees its image's owners, in its root, in a VOLUME and in an image volume, on each
// containerd 2.x, and takes no copy of the image. `make test-kubelet` runs this: it needs a runc that maps mounts.
func TestCRIUserNamespace(t *testing.T) {
	if os.Getenv("DEDUP_KUBELET") == "" {
		t.Skip("set DEDUP_KUBELET=1 to build runc 1.4")
	}
	runc, err := node.BuildRunc(testContext(t), func(text string) { t.Log(text) })
	must(t, err)
	each2x(t, func(t *testing.T, version string) { mappedPod(t, version, runc) })
}

func mappedPod(t *testing.T, version, runc string) {
	const large = 20 << 20
	r := startRegistry(t)
	img, err := image.New(image.Options{Env: []string{"PATH=/bin"}}, append(ownedImage(t, "cri-userns"),
		layer(t, payload("cri-userns", "app/large", large)))...)
	must(t, err)
	file, err := img.ConfigFile()
	must(t, err)
	file = file.DeepCopy()
	file.Config.Volumes = map[string]struct{}{"/app": {}}
	withVolume, err := mutate.ConfigFile(img, file)
	must(t, err)
	app, copied := pushImage(t, r, "app:1", img), pushImage(t, r, "volume:1", withVolume)
	n := startDedup(t, node.Options{
		Version: version, Runc: runc, CRI: true, PauseImage: sleeper(t, r),
		Plugins: map[string]map[string]any{"io.containerd.cri.v1.runtime": {"cni": emptyCNI(t, version)}},
	})
	reachable(t, n)
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()
	offersUserNamespaces(t, c)
	ids := []*cri.IDMapping{{HostId: 100000, Length: 65536}}
	pods := criPods{CRI: c, logs: t.TempDir(), namespaces: &cri.NamespaceOption{
		Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: &cri.UserNamespace{Uids: ids, Gids: ids},
	}}
	start := func(name, ref string) pod {
		config := &cri.ContainerConfig{Image: &cri.ImageSpec{Image: ref}, Command: []string{"sleep", "100000"}}
		if node.AtLeast(version, 2, 1) { // older ones have no image volumes
			config.Mounts = []*cri.Mount{{ContainerPath: "/volume", Image: &cri.ImageSpec{Image: app}, Readonly: true,
				UidMappings: ids, GidMappings: ids}}
		}
		return pods.start(t, "", name, config)
	}
	const owners = "0:0 /\n1:2 /app\n3:4 /app/file\n65534:65535 /app/high\n0:0 /app/large\n5:6 /app/link\n7:8 /app/owned\n"
	first := start("first", app)
	settle(t, n)
	before := usage(t, n.DedupRoot())
	for name, ref := range map[string]string{"second": app, "volume": copied} {
		p := start(name, ref)
		if got := pods.exec(t, p, "stat -c '%u:%g %n' / /app /app/*"); got != owners {
			t.Errorf("%s: owners in a pod with hostUsers: false:\n%s", name, got)
		}
		if got := pods.exec(t, p, "tr -s ' ' < /proc/self/uid_map"); got != " 0 100000 65536\n" {
			t.Errorf("%s: the mapping is %q", name, got)
		}
		if node.AtLeast(version, 2, 1) {
			got := pods.exec(t, p, "cd /volume && stat -c '%u:%g /%n' app app/*")
			if got == "" || !strings.HasSuffix(owners, got) {
				t.Errorf("%s: owners in an image volume:\n%s", name, got)
			}
		}
		if got := pods.exec(t, p, "echo x >> /app/owned && stat -c %u:%g /app/owned && wc -c < /app/large"); got !=
			fmt.Sprintf("7:8\n%d\n", large) {
			t.Errorf("%s: a file that was changed, and the size of another: %q", name, got)
		}
		defer pods.remove(t, p)
	}
	pods.remove(t, first)
	grown := usage(t, n.DedupRoot()).Sub(before)
	t.Logf("two pods more take %+v in the store", grown)
	if grown.Bytes > large/10 {
		t.Errorf("two pods with mappings take %+v: the image has been copied", grown)
	}
}

// offersUserNamespaces: without this a kubelet starts no pod with hostUsers: false.
func offersUserNamespaces(t *testing.T, c *node.CRI) {
	t.Helper()
	status, err := c.Status(testContext(t), &cri.StatusRequest{})
	must(t, err)
	for _, h := range status.RuntimeHandlers {
		if h.Features.GetUserNamespaces() {
			return
		}
	}
	t.Errorf("no runtime handler has user namespaces: %v", status.RuntimeHandlers)
}

// CRI counts what containers write for its default snapshotter alone, whichever that is, and says 0 of all others.
// docs/kubernetes.md says what this means for a DaemonSet.
func TestCRICountsOneSnapshotter(t *testing.T) {
	t.Parallel()
	each2x(t, func(t *testing.T, version string) {
		for _, counted := range []string{"overlayfs", node.Snapshotter} {
			t.Run(counted, func(t *testing.T) { countsOne(t, version, counted) })
		}
	})
}

func countsOne(t *testing.T, version, counted string) {
	const size = 3 << 20
	r := startRegistry(t)
	app := push(t, r, "app:1", busybox(t), layer(t, payload("counts", "data", 9000)))
	runtimes, platforms := map[string]any{}, map[string]any{}
	for handler, snapshotter := range map[string]string{"runc": "overlayfs", "dedup": node.Snapshotter} {
		runtimes[handler] = map[string]any{
			"runtime_type": "io.containerd.runc.v2", "snapshotter": snapshotter,
			"options": map[string]any{"Root": filepath.Join(t.TempDir(), "runc")},
		}
		platforms[handler] = map[string]any{"snapshotter": snapshotter}
	}
	n := startDedup(t, node.Options{
		Version: version, CRI: true, PauseImage: sleeper(t, r),
		Plugins: map[string]map[string]any{
			"io.containerd.cri.v1.runtime": {
				"containerd": map[string]any{"default_runtime_name": "runc", "runtimes": runtimes},
			},
			"io.containerd.cri.v1.images": {"snapshotter": counted, "runtime_platforms": platforms},
		},
	})
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()
	pods := criPods{CRI: c, logs: t.TempDir(), namespaces: hostNetwork()}
	started := map[string]pod{}
	for handler, snapshotter := range map[string]string{"runc": "overlayfs", "dedup": node.Snapshotter} {
		p := pods.start(t, handler, handler, &cri.ContainerConfig{
			Image: &cri.ImageSpec{Image: app}, Command: []string{"sleep", "100000"},
		})
		defer pods.remove(t, p)
		pods.exec(t, p, fmt.Sprintf("head -c %d /dev/urandom > /much; sync", size))
		started[snapshotter] = p
	}
	eventually(t, "what a container wrote", func() bool { return pods.written(t, started[counted]) >= size })
	for snapshotter, p := range started {
		if got := pods.written(t, p); (got != 0) != (snapshotter == counted) {
			t.Errorf("with %s as the default, CRI says that a container of %s wrote %d bytes", counted, snapshotter, got)
		}
	}
}
