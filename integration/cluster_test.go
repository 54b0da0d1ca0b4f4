package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const (
	systemPods = "/api/v1/namespaces/kube-system/pods"
	daemonSets = "/apis/apps/v1/namespaces/kube-system/daemonsets"
	ownPods    = "/api/v1/namespaces/default/pods"
)

// cluster is a Kubernetes of one node: etcd, API server, scheduler, controllers and a kubelet, as units of a machine.
type cluster struct {
	*kubelet
	t      *testing.T
	server string
	client http.Client
}

const clusterToken = "for-loopback"

// startCluster boots a machine with containerd, set up for the DaemonSet, and starts a cluster on it.
func startCluster(t *testing.T, discard bool) *cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Minute)
	t.Cleanup(cancel)
	say := func(text string) { t.Log(text) }
	kubelet, err := node.BuildKubelet(ctx, say)
	must(t, err)
	programs, err := node.BuildCluster(ctx, say)
	must(t, err)
	runc, err := node.BuildRunc(ctx, say)
	must(t, err)
	trust := &tls.Config{InsecureSkipVerify: true} // the server signs its certificate itself
	c := &cluster{t: t, server: "https://" + freeAddress(t)}
	c.client = http.Client{Transport: &http.Transport{TLSClientConfig: trust}, Timeout: 30 * time.Second}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(c.server, "https://"))
	must(t, err)
	c.kubelet = bootKubelet(t, discard, func(o *machine.Options) {
		maps.Copy(o.Files, clusterFiles(t, c.server))
		for name, command := range clusterUnits("http://"+freeAddress(t), "http://"+freeAddress(t), port) {
			o.Files["/etc/systemd/system/"+name+".service"] = "[Service]\nRestart=always\nRestartSec=1\n" +
				"ExecStart=/usr/local/bin/" + command + "\n"
		}
		for target, source := range map[string]string{
			"kubelet": kubelet, "new-runc": runc, "etcd": filepath.Join(programs, "server"),
			"kube-apiserver":          filepath.Join(programs, "kube-apiserver"),
			"kube-controller-manager": filepath.Join(programs, "kube-controller-manager"),
			"kube-scheduler":          filepath.Join(programs, "kube-scheduler"),
		} {
			o.Binds = append(o.Binds, machine.Bind{Source: source, Target: "/usr/local/bin/" + target})
		}
		o.Binds = append(o.Binds, machine.Bind{Source: "/dev/kmsg", Target: "/dev/kmsg"})
	})
	// runc looks for itself below what is mounted on its path.
	c.run(t, `install /usr/local/bin/new-runc /usr/local/sbin/runc
chmod 755 /opt/cni/bin/*
systemctl restart containerd # asks runc what it can
systemctl start etcd kube-apiserver`)
	eventually(t, "the API server", func() bool { return c.call("GET", "/readyz", nil, nil) == nil })
	c.run(t, "systemctl start kube-controller-manager kube-scheduler kubelet")
	label := map[string]any{"metadata": map[string]any{"labels": c.m.class.Scheduling.NodeSelector}}
	eventually(t, "the node", func() bool { return c.call("PATCH", "/api/v1/nodes/node", label, nil) == nil })
	return c
}

// clusterFiles configure the cluster and its node's network.
func clusterFiles(t *testing.T, server string) map[string]string {
	t.Helper()
	_, port, err := net.SplitHostPort(freeAddress(t))
	must(t, err)
	var number int
	_, err = fmt.Sscan(port, &number)
	must(t, err)
	config := node.KubeletConfig("unix:///run/containerd/containerd.sock", number)
	config["resolvConf"] = ""
	access := map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{
			"server": server, "insecure-skip-tls-verify": true,
		}}},
		"users":    []any{map[string]any{"name": "c", "user": map[string]any{"token": clusterToken}}},
		"contexts": []any{map[string]any{"name": "c", "context": map[string]any{"cluster": "c", "user": "c"}}},
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	files := map[string]string{
		"/etc/kube/tokens.csv":            clusterToken + ",admin,admin,system:masters\n",
		"/etc/kube/key.pem":               string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"/etc/cni/net.d/10-test.conflist": `{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"test"}]}`,
		"/opt/cni/bin/loopback":           cniScript, "/opt/cni/bin/test": cniScript,
	}
	for name, value := range map[string]any{"kubelet.json": config, "config": access} {
		b, err := json.Marshal(value)
		must(t, err)
		files["/etc/kube/"+name] = string(b)
	}
	return files
}

// clusterUnits are the commands of a cluster's programs, by the name of their units.
func clusterUnits(etcd, peers, port string) map[string]string {
	const access = " --kubeconfig=/etc/kube/config"
	return map[string]string{
		"etcd": "etcd --data-dir=/var/lib/etcd --unsafe-no-fsync --listen-client-urls=" + etcd +
			" --advertise-client-urls=" + etcd + " --listen-peer-urls=" + peers + " --initial-advertise-peer-urls=" + peers +
			" --initial-cluster=default=" + peers,
		"kube-apiserver": "kube-apiserver --etcd-servers=" + etcd + " --bind-address=127.0.0.1 --secure-port=" + port +
			" --advertise-address=127.0.0.1 --endpoint-reconciler-type=none --service-cluster-ip-range=10.97.0.0/24" +
			" --cert-dir=/var/lib/kube --allow-privileged --authorization-mode=AlwaysAllow" +
			" --token-auth-file=/etc/kube/tokens.csv --service-account-issuer=https://kubernetes.default.svc" +
			" --service-account-key-file=/etc/kube/key.pem --service-account-signing-key-file=/etc/kube/key.pem" +
			// No controller of the cluster's makes accounts or takes a node's first taint away.
			" --disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
		"kube-controller-manager": "kube-controller-manager --controllers=daemonset-controller --secure-port=0" +
			" --leader-elect=false" + access,
		"kube-scheduler": "kube-scheduler --secure-port=0 --leader-elect=false" + access,
		"kubelet": "kubelet --config=/etc/kube/kubelet.json --root-dir=/var/lib/kubelet --cert-dir=/var/lib/kubelet/pki" +
			" --hostname-override=node --v=2" + access,
	}
}

// call asks the API server.
func (c *cluster) call(method, path string, body, into any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequest(method, c.server+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+clusterToken)
	req.Header.Set("Content-Type", "application/json")
	if method == "PATCH" {
		req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	if err != nil || into == nil {
		return err
	}
	return json.Unmarshal(answer, into)
}

func (c *cluster) do(method, path string, body any) {
	c.t.Helper()
	must(c.t, c.call(method, path, body, nil))
}

// fail stops the test with what the cluster knows of its pods.
func (c *cluster) fail(what string) {
	c.t.Helper()
	var events corev1.EventList
	_ = c.call("GET", "/api/v1/events", nil, &events)
	for _, e := range events.Items {
		c.t.Logf("%s %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
	}
	log, _ := c.machine.Run(testContext(c.t), `journalctl -q -n 30 -u kubelet; journalctl -q -n 5 -u kube-scheduler -u \
kube-controller-manager; journalctl -n 30 -u containerd | grep -v 'loading plugin'
tail -n 20 /var/log/pods/kube-system_dedup*/*/*.log`)
	c.t.Fatalf("%s\n%s", what, log)
}

// create makes a pod of an image; one of dedup's class has what docs/kubernetes.md says.
func (c *cluster) create(name, image, command string, class bool, more ...func(*corev1.Pod)) {
	c.t.Helper()
	grace, no := int64(1), false
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{Name: "main", Image: c.images[image], Command: []string{"sh", "-c", command}}},
		},
	}
	if class {
		p.Spec.RuntimeClassName = &c.m.class.Name
		p.Annotations = map[string]string{"io.containerd.cri.runtime-handler": c.m.class.Handler}
	}
	for _, change := range more {
		change(&p)
	}
	c.do("POST", ownPods, p)
}

// running waits until a pod runs, and returns its container.
func (c *cluster) running(name string) pod {
	c.t.Helper()
	for range 600 {
		var p corev1.Pod
		must(c.t, c.call("GET", ownPods+"/"+name, nil, &p))
		for _, s := range p.Status.ContainerStatuses {
			if id := strings.TrimPrefix(s.ContainerID, "containerd://"); s.State.Running != nil {
				return pod{container: id}
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	c.fail("pod " + name + " does not run")
	return pod{}
}

// served waits until the DaemonSet has one pod, of that image, which is ready, and returns it.
func (c *cluster) served(image string) corev1.Pod {
	c.t.Helper()
	for range 900 {
		var set appsv1.DaemonSet
		var pods corev1.PodList
		must(c.t, c.call("GET", daemonSets+"/"+c.m.daemon.Name, nil, &set))
		must(c.t, c.call("GET", systemPods, nil, &pods))
		s := set.Status
		if s.ObservedGeneration == set.Generation && s.NumberReady == 1 && s.UpdatedNumberScheduled == 1 &&
			len(pods.Items) == 1 {
			p := pods.Items[0]
			if p.Spec.Containers[0].Image == image && p.DeletionTimestamp == nil &&
				len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready {
				return p
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	c.fail("the DaemonSet is not ready with " + image)
	return corev1.Pod{}
}

// said waits for an event of a pod with a word in it, and returns its message.
func (c *cluster) said(name, word string) (message string) {
	c.t.Helper()
	eventually(c.t, "an event of pod "+name+" that says "+word, func() bool {
		var events corev1.EventList
		must(c.t, c.call("GET", "/api/v1/namespaces/default/events", nil, &events))
		for _, e := range events.Items {
			if e.InvolvedObject.Name == name && strings.Contains(e.Reason+": "+e.Message, word) {
				message = e.Reason + ": " + e.Message
			}
		}
		return message != ""
	})
	return message
}

// gone waits until no pod of a list is left.
func (c *cluster) gone(list string) {
	c.t.Helper()
	eventually(c.t, "the pods to go", func() bool {
		var pods corev1.PodList
		must(c.t, c.call("GET", list, nil, &pods))
		return len(pods.Items) == 0
	})
}

func needCluster(t *testing.T) {
	if os.Getenv("DEDUP_KUBELET") == "" {
		t.Skip("set DEDUP_KUBELET=1 to build and run a cluster of one node (twenty minutes once, then ten)")
	}
}
