package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Kubelet is a kubelet without an API server on a node's CRI: it runs the pods whose manifests lie in a directory.
type Kubelet struct {
	node    *Node
	process *process
	port    int
}

// StartKubelet starts Kubernetes' kubelet, which is built like Build does (some ten minutes, once). config is added to
// its KubeletConfiguration. The caller closes it, before the node.
func StartKubelet(ctx context.Context, n *Node, config map[string]any) (*Kubelet, error) {
	bin, err := BuildKubelet(ctx, n.opts.Say)
	if err != nil {
		return nil, err
	}
	k := &Kubelet{node: n}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k.port = l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		return nil, err
	}
	all := KubeletConfig("unix://"+n.Address(), k.port)
	maps.Copy(all, map[string]any{
		"staticPodPath": k.Manifests(), "podLogsDir": k.path("logs"), "volumePluginDir": k.path("plugins"),
	})
	maps.Copy(all, config)
	b, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(k.Manifests(), 0o755), os.MkdirAll(k.path("logs"), 0o755),
		os.WriteFile(k.path("config.json"), b, 0o600)); err != nil {
		return nil, err
	}
	// Root of a user namespace has to get to its files.
	for _, parent := range []string{n.dir, filepath.Join(n.dir, "s"), k.path("")} {
		if err := os.Chmod(parent, 0o711); err != nil {
			return nil, err
		}
	}
	k.process, err = startProcess("kubelet", n.LogPath("kubelet"), append(os.Environ(), "PATH="+os.Getenv("PATH")),
		bin, "--config", k.path("config.json"), "--root-dir", k.path("root"),
		"--cert-dir", k.path("certs"), "--hostname-override", "node", "--v", "2")
	if err != nil {
		return nil, err
	}
	return k, nil
}

// KubeletConfig is the KubeletConfiguration of a kubelet that serves on loopback, to everyone, and leaves the machine's
// cgroups and the images on its disk alone.
func KubeletConfig(endpoint string, port int) map[string]any {
	return map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"containerRuntimeEndpoint": endpoint, "address": "127.0.0.1", "port": port, "healthzPort": 0,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false},
		},
		"authorization": map[string]any{"mode": "AlwaysAllow"},
		"cgroupDriver":  "cgroupfs", "cgroupsPerQOS": false, "enforceNodeAllocatable": []string{}, "failSwapOn": false,
		"fileCheckFrequency": "1s", "syncFrequency": "2s", "imageMinimumGCAge": "1s", "registryPullQPS": 0,
		"featureGates": map[string]bool{"ImageVolume": true},
		"evictionHard": map[string]string{"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "0%"},
	}
}

func (k *Kubelet) path(name string) string { return filepath.Join(k.node.dir, "kube", name) }

// Manifests is the directory of the pods' manifests.
func (k *Kubelet) Manifests() string { return k.path("manifests") }

// URL is that of a path of its server, which has a certificate of its own making.
func (k *Kubelet) URL(path string) string { return fmt.Sprintf("https://127.0.0.1:%d%s", k.port, path) }

// Stop ends the kubelet. Pods go on.
func (k *Kubelet) Stop() error { return k.process.stop(unix.SIGTERM, 20*time.Second) }
