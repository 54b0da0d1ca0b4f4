package integration

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// publicHosts are the registries that the suites pull from; one on loopback answers for all of them.
var publicHosts = []string{"ghcr.io", "registry.k8s.io", "registry-1.docker.io", "gcr.io", "k8s.gcr.io"}

// suiteImages makes images as the suites want them.
type suiteImages struct {
	t    *testing.T
	r    *registry.Registry
	base []*image.Layer // busybox for each platform, with the users that images of public registries have
}

// suitePlatforms are those of each image. All get the same programs, in layers that differ.
var suitePlatforms = []v1.Platform{
	{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"},
	{OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "linux", Architecture: "ppc64le"},
	{OS: "linux", Architecture: "s390x"},
}

// eachPlatform is a layer for each platform that differs from the others in its times.
func eachPlatform(t *testing.T, entries []image.Entry) (layers []*image.Layer) {
	t.Helper()
	for i := range suitePlatforms {
		for j := range entries {
			entries[j].Time = image.DefaultTime.Add(time.Duration(i) * time.Second)
		}
		layers = append(layers, layer(t, entries...))
	}
	return layers
}

// pushSuiteImages fills a registry, and returns the environment that names the images by digest.
func pushSuiteImages(t *testing.T, r *registry.Registry) []string {
	t.Helper()
	s := suiteImages{t, r, eachPlatform(t, suiteBase(t))}
	shell := image.Options{
		Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	}
	busybox := s.push("containerd/busybox:1.36", shell)
	s.push("e2e-test-images/busybox:1.29-2", shell)
	s.push("containerd/alpine:3.14.0", shell, s.alpine())
	s.push("e2e-test-images/resource-consumer:1.10", image.Options{Cmd: []string{"sleep", "100000"}, Env: shell.Env})
	program := pauseProgram(t)
	paused := eachPlatform(t, []image.Entry{{Name: "pause", Mode: 0o755, Content: program}})
	s.push("e2e-test-images/nonewprivs:1.3", image.Options{Entrypoint: []string{"/nnp"}},
		layer(t, image.Entry{Name: "nnp", Mode: 0o4755, Content: program}))
	pause := image.Options{Entrypoint: []string{"/pause"}, User: "65535:65535"}
	for _, tag := range []string{"3.6", "3.9", "3.10.2"} {
		pause.Env = []string{"VERSION=" + tag} // another image
		s.pushLayers("pause:"+tag, pause, paused)
	}
	volumes := shell
	volumes.Volumes = []string{"/test_dir", "C:/weird_test_dir", "/:colon_prefixed"}
	var copied []*image.Layer
	for dir, file := range map[string]string{
		"test_dir": "test_file", "C:/weird_test_dir": "weird_test_file", ":colon_prefixed": "colon_prefixed_file",
	} {
		copied = append(copied, layer(t, image.Dir(dir), image.File(dir+"/"+file, "test_content\n")))
	}
	s.push("containerd/volume-copy-up:2.2", volumes, copied...)
	owned := image.Dir("test_dir")
	owned.UID, owned.GID = 65534, 65534
	volumes.Volumes = []string{"/test_dir"}
	s.push("containerd/volume-ownership:2.1", volumes, layer(t, owned), layer(t, payload("suites", "large", 8<<20)))
	s.webServers()
	digest := s.critestImages()
	return []string{
		node.DigestRef + "=ghcr.io/containerd/busybox@" + busybox,
		node.CritestDigestRef + "=gcr.io/k8s-staging-cri-tools/test-image-digest@" + digest,
	}
}

// suiteScripts are programs that busybox here does not have as the images of public registries do.
var suiteScripts = map[string]string{
	"bin/bash": "#!/bin/sh\nexec sh \"$@\"\n",
	"bin/ipcs": "#!/bin/sh\ncat /proc/sysvipc/shm\n",
	// It ends on a signal as process 1, too.
	"bin/nc":    "#!/bin/sh\ntrap 'kill $!; exit 143' TERM\nbusybox nc \"$@\" &\nwait $!\n",
	"bin/pgrep": "#!/bin/sh\nfor p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = \"$1\" ] && echo ${p#/proc/}; done\n",
	// It takes memory for a while.
	"bin/stress": "#!/bin/sh\ndd if=/dev/zero bs=110M count=1 | sleep 30\n",
}

// suiteBase is busybox with more users and programs.
func suiteBase(t *testing.T) []image.Entry {
	t.Helper()
	var entries []image.Entry
	all, err := inputs.Busybox(testContext(t), nil)
	must(t, err)
	for _, e := range all {
		switch e.Name {
		case "etc/passwd":
			e.Content += "daemon:x:1:1:daemon:/usr/sbin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\n" +
				"www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n"
		case "etc/group":
			e.Content += "daemon:x:1:\nsys:x:3:\nwheel:x:10:root\nwww-data:x:33:\nnobody:x:65534:\nnogroup:x:65533:\n"
		}
		if e.Link == "busybox" { // a path may be masked without the others
			e = image.Entry{Name: e.Name, Type: tar.TypeLink, Link: "bin/busybox", Mode: 0o755}
		}
		if script, ok := suiteScripts[e.Name]; ok {
			e = image.Entry{Name: e.Name, Mode: 0o755, Content: script}
		}
		entries = append(entries, e)
	}
	for _, dir := range []string{"home", "mnt", "run", "usr", "usr/bin", "usr/sbin", "var", "var/run", "var/www"} {
		entries = append(entries, image.Dir(dir))
	}
	for name, script := range suiteScripts {
		if !slices.ContainsFunc(entries, func(e image.Entry) bool { return e.Name == name }) {
			entries = append(entries, image.Entry{Name: name, Mode: 0o755, Content: script})
		}
	}
	return append(entries, image.Entry{Name: "usr/bin/passwd", Mode: 0o4755, Content: "#!/bin/sh\n"})
}

func (s suiteImages) alpine() *image.Layer {
	return layer(s.t, image.Symlink("bin/sh", "/bin/busybox"),
		image.File("etc/os-release", "NAME=\"Alpine Linux\"\nID=alpine\nVERSION_ID=3.14.0\n"))
}

// pauseProgram is all that the pause image has: one static program.
func pauseProgram(t *testing.T) string {
	t.Helper()
	root, err := node.ModuleRoot()
	must(t, err)
	bin := filepath.Join(t.TempDir(), "pause")
	cmd := exec.CommandContext(testContext(t), "go", "build", "-ldflags=-s -w", "-o", bin, "./integration/pause")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build pause: %v\n%s", err, out)
	}
	content, err := os.ReadFile(bin)
	must(t, err)
	return string(content)
}

// push pushes an image for several platforms and returns its digest.
func (s suiteImages) push(name string, opts image.Options, layers ...*image.Layer) string {
	s.t.Helper()
	return s.pushLayers(name, opts, s.base, layers...)
}

func (s suiteImages) pushLayers(name string, opts image.Options, base []*image.Layer, layers ...*image.Layer) string {
	s.t.Helper()
	repository, _, _ := strings.Cut(name, ":")
	opts.Labels = map[string]string{"repository": repository}
	index, err := image.NewIndex(opts, suitePlatforms, func(i int) []*image.Layer {
		return append([]*image.Layer{base[i]}, layers...)
	})
	must(s.t, err)
	must(s.t, image.PushIndex(testContext(s.t), s.r.Ref(name), index))
	digest, err := index.Digest()
	must(s.t, err)
	return digest.String()
}

// webServers are nginx and httpd as far as the suites look: a process of that name with a pid file, serving a page.
func (s suiteImages) webServers() {
	s.t.Helper()
	server := func(ref, name string, port int) {
		script := fmt.Sprintf("#!/bin/sh\necho $$ > /var/run/%s.pid\necho %s: start worker processes\n"+
			"trap 'exit 0' TERM QUIT\nbusybox httpd -f -p %d -h /html & wait\n", name, name, port)
		s.push(ref, image.Options{
			Env:        []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
			Entrypoint: []string{"/usr/sbin/" + name}, Cmd: []string{name + ": master process"},
		}, layer(s.t, image.Entry{Name: "usr/sbin/" + name, Mode: 0o755, Content: script}, image.Dir("html"),
			image.File("html/index.html", "<title>Welcome to "+name+"!</title>\n")))
	}
	server("containerd/nginx:1.27.0", "nginx", 80)
	server("e2e-test-images/nginx:1.14-2", "nginx", 80)
	server("e2e-test-images/httpd:2.4.39-4", "httpd", 80)
	server("k8s-staging-cri-tools/hostnet-nginx-"+runtime.GOARCH, "nginx", 12003)
}

// critestImages are those that critest pulls from the registry of its project; it returns the digest of one.
func (s suiteImages) critestImages() (digest string) {
	s.t.Helper()
	const project = "k8s-staging-cri-tools/"
	for name, user := range map[string]string{
		"test-image-user-uid": "1002", "test-image-user-username": "www-data", "test-image-user-uid-group": "1003:1004",
		"test-image-user-username-group": "www-data:1004",
	} {
		s.push(project+name, image.Options{Cmd: []string{"sh"}, User: user})
	}
	s.push(project+"test-image-predefined-group", image.Options{Cmd: []string{"sh"}, User: "1000"}, layer(s.t,
		image.File("etc/passwd", "root:x:0:0::/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n"),
		image.File("etc/group", "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")))
	file := func(name, file string) string {
		return s.push(project+name, image.Options{Cmd: []string{"sh"}}, layer(s.t, image.File(file, "")))
	}
	for _, name := range []string{"test-image-1", "test-image-2", "test-image-3", "test-image-latest"} {
		file(name, name)
	}
	for _, tag := range []string{"1", "2", "3"} {
		file("test-image-tags:"+tag, "same-image")
	}
	file("test-image-tag:test", "test")
	file("test-image-tag:all", "all")
	return file("test-image-digest", "test-image-digest")
}
