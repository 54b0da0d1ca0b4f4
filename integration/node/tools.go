package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// DefaultVersion is the containerd that a node runs unless told otherwise.
const DefaultVersion = "2.4.2"

// Tools are the binaries of one containerd version.
type Tools struct {
	Version string
	Dir     string // holds containerd, ctr and containerd-shim-runc-v2
}

// Versions lists the containerd versions that Build can make, from the directories
// integration/tools/containerd-*.
func Versions() ([]string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(filepath.Join(root, "integration/tools/containerd-*"))
	if err != nil {
		return nil, fmt.Errorf("list containerd versions: %w", err)
	}
	var versions []string
	for _, dir := range dirs {
		versions = append(versions, strings.TrimPrefix(filepath.Base(dir), "containerd-"))
	}
	return versions, nil
}

// Build returns the tools of a containerd version, building them into the cache when
// they are not there yet (one to two minutes). say may be nil.
func Build(ctx context.Context, version string, say func(string)) (Tools, error) {
	pkg := "github.com/containerd/containerd/v2"
	if strings.HasPrefix(version, "1.") {
		pkg = "github.com/containerd/containerd"
	}
	dir, err := buildModule(ctx, "containerd-"+version, say,
		"-X "+pkg+"/version.Version=v"+version,
		pkg+"/cmd/containerd", pkg+"/cmd/ctr", pkg+"/cmd/containerd-shim-runc-v2")
	return Tools{Version: version, Dir: dir}, err
}

// BuildCrane returns the path of go-containerregistry's crane, built like Build does.
func BuildCrane(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "crane", say, "", "github.com/google/go-containerregistry/cmd/crane")
	return filepath.Join(dir, "crane"), err
}

// BuildDockerd returns the path of Docker 29's daemon, built like Build does (two minutes).
func BuildDockerd(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "dockerd", say, "", "github.com/moby/moby/v2/cmd/dockerd")
	return filepath.Join(dir, "dockerd"), err
}

// BuildCompose returns the path of Docker Compose, built like Build does (three minutes).
func BuildCompose(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "compose", say, "-X github.com/docker/compose/v5/internal.Version=v5.0.0",
		"github.com/docker/compose/v5/cmd")
	return filepath.Join(dir, "cmd"), err
}

// BuildBuildKit returns the directory of buildkitd and buildctl, built like Build does (three minutes).
func BuildBuildKit(ctx context.Context, say func(string)) (string, error) {
	return buildModule(ctx, "buildkit", say, "-X github.com/moby/buildkit/version.Version=v0.34.2",
		"github.com/moby/buildkit/cmd/buildkitd", "github.com/moby/buildkit/cmd/buildctl")
}

// BuildNerdctl returns the path of nerdctl, built like Build does (two minutes).
func BuildNerdctl(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "nerdctl", say, "-X github.com/containerd/nerdctl/v2/pkg/version.Version=v2.3.5",
		"github.com/containerd/nerdctl/v2/cmd/nerdctl")
	return filepath.Join(dir, "nerdctl"), err
}

// kubeVersion tells what is built of Kubernetes which version it has.
const kubeVersion = "-X k8s.io/component-base/version.gitVersion=v1.34.4"

// BuildKubelet returns the path of Kubernetes' kubelet, built like Build does (ten minutes).
func BuildKubelet(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "kubelet", say, kubeVersion, "k8s.io/kubernetes/cmd/kubelet")
	return filepath.Join(dir, "kubelet"), err
}

// BuildCluster returns the directory of what a cluster has beside its kubelets, built like Build does (ten minutes):
// kube-apiserver, kube-controller-manager, kube-scheduler, and etcd, whose program is called "server".
func BuildCluster(ctx context.Context, say func(string)) (string, error) {
	const cmd = "k8s.io/kubernetes/cmd/"
	return buildModule(ctx, "cluster", say, kubeVersion, "go.etcd.io/etcd/server/v3", cmd+"kube-apiserver",
		cmd+"kube-controller-manager", cmd+"kube-scheduler")
}

// BuildRunc returns the path of a runc that knows user namespaces of pods (1.2 or newer), built like Build does.
func BuildRunc(ctx context.Context, say func(string)) (string, error) {
	compiler := []Command{{"gcc", "gcc libc6-dev"}, {"pkg-config", "pkg-config libseccomp-dev"}}
	if err := Require(ctx, say, compiler...); err != nil {
		return "", err
	}
	if exec.CommandContext(ctx, "pkg-config", "--exists", "libseccomp").Run() != nil {
		if err := installPackages(ctx, say, "libseccomp", "libseccomp-dev"); err != nil {
			return "", err
		}
	}
	// Static, as its releases are: it runs itself with no rights on the node's files.
	dir, err := buildWith(ctx, "runc", say, "CGO_ENABLED=1", "-X main.version=1.4.3 -extldflags -static",
		"-tags=seccomp,netgo,osusergo", "github.com/opencontainers/runc")
	return filepath.Join(dir, "runc"), err
}

// BuildPromtool returns the path of Prometheus's promtool, built like Build does, but without service discovery, which
// is most of it. It still takes a few minutes.
func BuildPromtool(ctx context.Context, say func(string)) (string, error) {
	dir, err := buildModule(ctx, "promtool", say, "", "-tags=remove_all_sd",
		"github.com/prometheus/prometheus/cmd/promtool")
	return filepath.Join(dir, "promtool"), err
}

func buildModule(ctx context.Context, name string, say func(string), ldflags string, packages ...string) (string,
	error) {
	return buildWith(ctx, name, say, "CGO_ENABLED=0", ldflags, packages...)
}

// buildWith is buildModule with a variable of the environment.
func buildWith(
	ctx context.Context, name string, say func(string), env, ldflags string, packages ...string,
) (string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	src := filepath.Join(root, "integration/tools", name)
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("build %s: no such tool: %w", name, err)
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "tools", name+"-"+shortHash(mod))
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	unlock, err := Lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if say != nil {
		say("building " + name + " from the Go module proxy (once)")
	}
	staging := dir + ".new"
	if err := os.RemoveAll(staging); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	args := append([]string{"build", "-trimpath", "-ldflags", "-s -w " + ldflags, "-o", staging + "/"}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = src
	cmd.Env = append(os.Environ(), env, "GOFLAGS=-buildvcs=false", "GOWORK=off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s in %s: %w\n%s", name, src, err, out.String())
	}
	if err := os.Rename(staging, dir); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return dir, nil
}
