package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// `ctr image mount` shows what it shows with overlayfs, with every containerd.
func TestImageMount(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	implied := torture.ImpliedParents()
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			opts := exact
			opts.Version = version
			n, r := startDedup(t, opts), startRegistry(t)
			ctx := testContext(t)
			ref := push(t, r, "mounted:1", tortureImage(t)...)
			look := func(snapshotter string, flags ...string) (tree rootfs.Tree) {
				pull(t, n, snapshotter, ref)
				dir := t.TempDir()
				args := append([]string{"images", "mount", "--snapshotter", snapshotter}, flags...)
				_, err := n.Ctr(ctx, append(args, ref, dir)...)
				must(t, err)
				tree, derr := rootfs.Dump(dir)
				_, err = n.Ctr(ctx, "images", "unmount", "--rm", "--snapshotter", snapshotter, dir)
				must(t, err)
				must(t, derr)
				return tree
			}
			want := look("overlayfs")
			correctTorture(want)
			for _, flags := range [][]string{nil, {"--rw"}} {
				equal(t, want, look(node.Snapshotter, flags...), rootfs.DiffOptions{Times: implied, Owners: implied})
			}
		})
	}
}

// CRI copies an image's files into a VOLUME, with their owners and modes. It does so before anybody has started the
// container.
func TestVolumeCopyUp(t *testing.T) {
	t.Parallel()
	r := startRegistry(t)
	pauseImage, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	pause := pushImage(t, r, "pause:1", pauseImage)
	big, owned := payload("volume", "vol/big", 1<<20), image.File("vol/owned", "tiny")
	owned.UID, owned.GID, owned.Mode = 7, 8, 0o640
	dir := image.Dir("vol")
	dir.UID, dir.GID, dir.Mode = 9, 10, 0o750
	img, err := image.New(image.Options{Env: []string{"PATH=/bin"}}, busybox(t), layer(t, dir, big, owned))
	must(t, err)
	file, err := img.ConfigFile()
	must(t, err)
	file = file.DeepCopy()
	file.Config.Volumes = map[string]struct{}{"/vol": {}}
	img, err = mutate.ConfigFile(img, file)
	must(t, err)
	ref := pushImage(t, r, "volume:1", img)

	n := startDedup(t, node.Options{CRI: true, PauseImage: pause})
	ctx := testContext(t)
	c, err := n.CRI(ctx)
	must(t, err)
	defer c.Close()
	must(t, c.Pull(ctx, ref))
	hostNetwork := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: node.NewID("pod"), Uid: node.NewID("uid"), Namespace: "test"},
		LogDirectory: t.TempDir(),
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: hostNetwork},
		},
	}
	pod, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox})
	must(t, err)
	created, err := c.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: pod.PodSandboxId, SandboxConfig: sandbox,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: ref},
			Command: []string{"sleep", "100000"},
			Linux: &cri.LinuxContainerConfig{
				SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: hostNetwork},
			},
		},
	})
	must(t, err)
	_, err = c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId})
	must(t, err)
	script := "stat -c '%n %u:%g %a %s' /vol/*; stat -c '%u:%g %a' /vol; grep -c ' /vol ' /proc/mounts; " +
		"tail -c 4 /vol/big | wc -c; cat /vol/owned"
	done, err := c.ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: created.ContainerId, Timeout: 60, Cmd: []string{"sh", "-c", script},
	})
	must(t, err)
	if want := "/vol/big 0:0 644 1048576\n/vol/owned 7:8 640 4\n9:10 750\n1\n4\ntiny"; string(done.Stdout) != want {
		t.Errorf("exit %d: %q, want %q; %s", done.ExitCode, done.Stdout, want, done.Stderr)
	}
	_, err = c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId})
	must(t, err)
	_, err = c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId})
	must(t, err)
}

// Another runtime than runc runs containers as well.
func TestCrun(t *testing.T) {
	t.Parallel()
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Skip("needs crun (apt-get install crun)")
	}
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ref := push(t, r, "crun:1", busybox(t), dataLayer(t))
	pull(t, n, node.Snapshotter, ref)
	for _, flags := range [][]string{nil, {"--read-only"}, {"--user", "7:8"}} {
		flags = append(flags, "--runc-binary", crun, "--runc-root", filepath.Join(n.Dir(), "crun"))
		out, err := n.RunWith(testContext(t), node.Snapshotter, flags, ref, "sh", "-c", "wc -c < /data/a; ls /data | wc -l")
		if err != nil && strings.Contains(err.Error(), "unknown version specified") {
			t.Skipf("needs a crun that knows containerd's version of the OCI specification: %v", err)
		}
		must(t, err)
		if out != "9000\n6\n" {
			t.Errorf("%v: %q", flags, out)
		}
	}
}
