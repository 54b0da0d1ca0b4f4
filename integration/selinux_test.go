package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Under an enforcing policy a container with labels reads, runs and changes an image's files, and reads an image
// volume. It reads neither what has another label nor another container's files. An image that is mounted without a
// label it could not read: that is what the label is for. So it is whether containerd's client sets the labels, or CRI
// does with enable_selinux.
func TestSELinux(t *testing.T) {
	if selinux.EnforceMode() != selinux.Enforcing {
		t.Skip("needs SELinux in enforcing mode: integration/vm runs this there")
	}
	must(t, selinux.SecurityCheckContext("system_u:system_r:container_t:s0:c1,c2"))
	for _, pageCache := range []string{"private", "shared"} {
		t.Run(pageCache, func(t *testing.T) {
			r := startRegistry(t)
			n := startNode(t, node.Options{
				Daemon: map[string]any{"page_cache": pageCache}, CRI: true, PauseImage: sleeper(t, r),
				Plugins: map[string]map[string]any{"io.containerd.cri.v1.runtime": {"enable_selinux": true}},
			})
			// As file contexts would have it: what is made in there gets the same label.
			must(t, errors.Join(os.MkdirAll(n.DedupRoot(), 0o700), selinux.SetFileLabel(n.DedupRoot(), storeLabel)))
			must(t, n.StartDaemon(testContext(t)))
			ref := push(t, r, "app:1", busybox(t), layer(t, payload("selinux", "file", 100_000), image.File("small", "x")))
			pull(t, n, node.Snapshotter, ref)
			secret := filepath.Join(t.TempDir(), "secret")
			must(t, os.WriteFile(secret, []byte("secret"), 0o644))
			must(t, selinux.SetFileLabel(secret, "system_u:object_r:container_file_t:s0:c7,c8"))
			must(t, n.View(testContext(t), node.Snapshotter, ref, func(root string) error {
				for _, name := range []string{"", "file", "small", "bin/busybox"} {
					label, err := selinux.FileLabel(filepath.Join(root, name))
					if err != nil || label != "system_u:object_r:container_file_t:s0" {
						t.Errorf("label of %q in a view: %q, %v", name, label, err)
					}
				}
				plain := unlabelled(t, n)
				const script = `read self < /proc/self/attr/current; echo "self $self"
wc -c < /file; wc -c < /vol/file; echo y >> /file && wc -c < /file; mkdir /new && echo z > /new/file && cat /new/file
cat /secret; cat /plain/small; echo no > /vol/new; echo end`
				for _, level := range []string{"s0:c1,c2", "s0:c3,c4"} {
					out := runLabelled(t, n, ref, level, script, root+":/vol", secret+":/secret", plain+":/plain")
					t.Logf("%s", out)
					for _, want := range []string{"container_t:" + level, "\n100000\n100000\n100002\nz\n",
						"'/secret': Permission denied", "'/plain/small': Permission denied", "end"} {
						if !strings.Contains(out, want) {
							t.Errorf("no %q in what the container says", want)
						}
					}
				}
				return nil
			}))
			labelledPods(t, n, ref, secret)
		})
	}
}

// labelledPods run with the labels that CRI gives them: those that a pod asks for, or of CRI's choice.
func labelledPods(t *testing.T, n *node.Node, ref, secret string) {
	t.Helper()
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()
	const script = `read self < /proc/self/attr/current; echo "self $self"
wc -c < /file; wc -c < /vol/file; echo y >> /file && wc -c < /file; mkdir /new && echo z > /new/file && cat /new/file
cat /secret; cat /vol/small; echo no > /vol/new; echo end`
	seen := map[string]bool{}
	for name, labels := range map[string]*cri.SELinuxOption{
		"asked": {Level: "s0:c1,c2"}, "chosen": nil, "chosen-too": nil,
	} {
		pods := criPods{CRI: c, logs: t.TempDir(), namespaces: hostNetwork(), labels: labels}
		p := pods.start(t, "", name, &cri.ContainerConfig{
			Image: &cri.ImageSpec{Image: ref}, Command: []string{"sleep", "100000"},
			Mounts: []*cri.Mount{
				{ContainerPath: "/secret", HostPath: secret, Readonly: true},
				// The kubelet has image volumes relabelled.
				{ContainerPath: "/vol", Image: &cri.ImageSpec{Image: ref}, Readonly: true, SelinuxRelabel: true},
			},
		})
		out := pods.exec(t, p, script)
		t.Logf("pod %s: %s", name, out)
		_, level, _ := strings.Cut(strings.SplitN(out, "\n", 2)[0], "self system_u:system_r:container_t:")
		if level = strings.Trim(level, "\x00 "); !strings.HasPrefix(level, "s0:c") || seen[level] ||
			labels != nil && level != labels.Level {
			t.Errorf("pod %s has the level %q", name, level)
		}
		seen[level] = true
		for _, want := range []string{"\n100000\n100000\n100002\nz\n", "'/secret': Permission denied", "\nx", "end"} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in what pod %s says", want, name)
			}
		}
		mounts, err := os.ReadFile("/proc/mounts")
		must(t, err)
		want := regexp.MustCompile(p.container + `/rootfs overlay \S*context="?system_u:object_r:container_file_t:` + level)
		if !want.Match(mounts) {
			t.Errorf("pod %s: no root with the label of level %s in\n%s", name, level, mounts)
		}
		pods.remove(t, p)
	}
}

// storeLabel is what deploy/selinux/label.sh gives to all in root.
const storeLabel = "system_u:object_r:container_ro_file_t:s0"

// unlabelled mounts a chain image as it would be without a label.
func unlabelled(t *testing.T, n *node.Node) string {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(n.DedupRoot(), "chains", "*.erofs"))
	must(t, err)
	at := t.TempDir()
	for _, file := range images {
		if err := unix.Mount(file, at, "erofs", unix.MS_RDONLY, ""); err == nil {
			t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
			label, err := selinux.FileLabel(filepath.Join(at, "small"))
			t.Logf("without a label: %q, %v", label, err)
			return at
		}
	}
	t.Logf("no image of %d can be mounted by itself", len(images))
	return at
}

// runLabelled runs a script in a container that has labels, and volumes "from:to".
func runLabelled(t *testing.T, n *node.Node, ref, level, script string, volumes ...string) string {
	t.Helper()
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	c, err := client.New(n.Address())
	must(t, err)
	defer c.Close()
	img, err := c.GetImage(ctx, ref)
	must(t, err)
	var mounts []specs.Mount
	for _, v := range volumes {
		from, to, _ := strings.Cut(v, ":")
		mounts = append(mounts, specs.Mount{Type: "bind", Source: from, Destination: to, Options: []string{"rbind", "ro"}})
	}
	labels := func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		s.Process.SelinuxLabel = "system_u:system_r:container_t:" + level
		s.Linux.MountLabel = "system_u:object_r:container_file_t:" + level
		return nil
	}
	id := node.NewID("selinux")
	made, err := c.NewContainer(ctx, id, client.WithSnapshotter(node.Snapshotter), client.WithNewSnapshot(id, img),
		client.WithRuntime("io.containerd.runc.v2", &options.Options{Root: filepath.Join(n.Dir(), "runc")}),
		client.WithNewSpec(oci.WithImageConfig(img), oci.WithProcessArgs("sh", "-c", script), oci.WithMounts(mounts), labels))
	must(t, err)
	defer func() { must(t, made.Delete(ctx, client.WithSnapshotCleanup)) }()
	log := filepath.Join(n.Dir(), id+".log")
	task, err := made.NewTask(ctx, cio.LogFile(log))
	must(t, err)
	exit, err := task.Wait(ctx)
	must(t, errors.Join(err, task.Start(ctx)))
	<-exit
	_, err = task.Delete(ctx)
	out, rerr := os.ReadFile(log)
	must(t, errors.Join(err, rerr))
	return string(out)
}
