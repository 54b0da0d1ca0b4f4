package integration

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// nerdctl and CRI with images whose blobs are gone: what runs, runs without the registry; what wants a blob fetches it,
// once, and says what is missing where the registry has gone.
func TestTrimmedClients(t *testing.T) {
	needClients(t)
	t.Parallel()
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	must(t, err)
	other, bb := startRegistry(t), busybox(t)
	pauseImage, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, bb)
	must(t, err)
	n := startDedup(t, node.Options{CRI: true, PauseImage: pushImage(t, other, "pause:1", pauseImage)})
	ctl, err := node.NewNerdctl(testContext(t), n, node.Snapshotter, nil)
	must(t, err)
	nerdctl := func(args ...string) error {
		_, err := ctl.Run(testContext(t), args...)
		return err
	}
	c, err := n.CRI(testContext(t))
	must(t, err)
	defer c.Close()

	names := []string{"push", "save", "convert", "commit", "tag", "late"}
	refs, own := map[string]string{}, map[string]*image.Layer{}
	for _, name := range names {
		own[name] = layer(t, image.Dir("app"), payload(name, "app/file", 2<<20))
		refs[name] = push(t, r, name+":1", bb, own[name])
		must(t, nerdctl("pull", "--quiet", refs[name]))
	}
	pod := push(t, r, "pod:1", bb, layer(t, image.Dir("app"), payload("pod", "app/file", 2<<20)))
	must(t, c.Pull(testContext(t), pod))
	trim(t, n)
	for name, l := range own {
		wantBlobs(t, name, has(t, n, ctl.Namespace(), l), false)
	}
	log, err := r.Fetched()
	must(t, err)
	must(t, c.Pull(testContext(t), pod))
	criPod(t, n, c, pod, testContext(t))
	for _, name := range names {
		must(t, nerdctl("run", "--rm", "--net", "none", refs[name], "wc", "-c", "/app/file"))
	}
	if after, err := r.Fetched(); err != nil || len(after) != len(log) {
		t.Errorf("%d blobs were fetched for images that only run, %v", len(after)-len(log), err)
	}

	must(t, nerdctl("push", "--quiet", refs["push"]))
	must(t, nerdctl("save", "--output", filepath.Join(t.TempDir(), "saved.tar"), refs["save"]))
	must(t, nerdctl("image", "convert", "--zstd", "--oci", refs["convert"], "converted:1"))
	must(t, nerdctl("run", "--detach", "--net", "none", "--name", "box", refs["commit"], "sleep", "100000"))
	must(t, nerdctl("commit", "box", other.Ref("committed:1")))
	must(t, nerdctl("push", "--quiet", other.Ref("committed:1")))
	must(t, nerdctl("rm", "--force", "box"))
	must(t, nerdctl("tag", refs["tag"], other.Ref("tagged:1")))
	must(t, nerdctl("push", "--quiet", other.Ref("tagged:1")))
	fetched, err := r.Fetched()
	must(t, err)
	for _, name := range names {
		times := 0
		for _, h := range fetched {
			if h == own[name].Hash {
				times++
			}
		}
		if want := map[bool]int{true: 1, false: 2}[name == "late"]; times > want {
			t.Errorf("the layer of %s was fetched %d times", name, times)
		}
	}
	must(t, r.Close())
	err = nerdctl("save", "--output", filepath.Join(t.TempDir(), "late.tar"), refs["late"])
	if err == nil || !strings.Contains(err.Error(), "refused") && !strings.Contains(err.Error(), "not found") {
		t.Errorf("save without a registry: %v", err)
	}
	must(t, nerdctl("run", "--rm", "--net", "none", refs["late"], "wc", "-c", "/app/file"))
	if _, err := c.ImageStatus(testContext(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: pod}}); err != nil {
		t.Error(err)
	}
	fsck(t, n, 0)
}

// A registry that cannot give a blob back: the client hears why, nothing is lost, and the blob comes once it can.
func TestTrimmedAndTheRegistryFails(t *testing.T) {
	t.Parallel()
	var how atomic.Value
	how.Store("")
	r, err := registry.Start(registry.Options{Dir: t.TempDir(), Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			blob := req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/")
			switch {
			case how.Load() == "login":
				w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
				w.WriteHeader(http.StatusUnauthorized)
			case how.Load() == "gone" && blob:
				http.NotFound(w, req)
			case how.Load() == "other bytes" && blob:
				next.ServeHTTP(&spoiler{ResponseWriter: w}, req)
			default:
				next.ServeHTTP(w, req)
			}
		})
	}})
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	n := startDedup(t, node.Options{Daemon: map[string]any{"recipes": false}})
	bb, own := busybox(t), layer(t, payload("fails", "own", 90000))
	ref := push(t, r, "fails:1", bb, own)
	pull(t, n, node.Snapshotter, ref)
	before := dump(t, n, node.Snapshotter, ref)
	trim(t, n)
	// Other bytes come last: what comes after has to fetch in spite of what containerd got of them.
	for _, row := range [][2]string{
		{"login", "--user USER"}, {"gone", "does not have it any more"}, {"other bytes", "serves other bytes"},
	} {
		mode, want := row[0], row[1]
		how.Store(mode)
		out, err := dedupctl(t, n, completeArgs(n, ref)...)
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: complete says %q, %v; want %q", mode, out, err, want)
		}
		states, _ := migrate(t, n, true, "--undo")
		if states["fails:1"] != "incomplete" {
			t.Errorf("%s: undo of what is trimmed: %v", mode, states)
		}
		wantBlobs(t, mode, has(t, n, node.Namespace, bb, own), false)
		equal(t, before, dump(t, n, node.Snapshotter, ref), noRootTime)
		fsck(t, n, 0)
	}
	// A damaged layer that cannot be had again stays as it is, and is healed once it can.
	payloadOf(t, n, payload("fails", "own", 90000).Content).flip(t)
	fsck(t, n, 3)
	fsck(t, n, 3, "--repair")
	how.Store("")
	if healed := fsck(t, n, 0, "--repair"); len(healed.Fetched) == 0 {
		t.Errorf("healed by what? %+v", healed)
	}
	equal(t, before, dump(t, n, node.Snapshotter, ref), noRootTime)
	if out, err := dedupctl(t, n, completeArgs(n, ref)...); err != nil {
		t.Errorf("complete: %v: %s", err, out)
	}
	wantBlobs(t, "completed", has(t, n, node.Namespace, bb, own), true)
	if states, _ := migrate(t, n, false, "--undo"); states["fails:1"] != "migrated" {
		t.Errorf("undo of what was completed: %v", states)
	}
}

// spoiler changes a byte of what is served.
type spoiler struct {
	http.ResponseWriter
	done bool
}

func (s *spoiler) Write(p []byte) (int, error) {
	if !s.done && len(p) > 100 {
		s.done = true
		p = bytes.Clone(p)
		p[50] ^= 1
	}
	return s.ResponseWriter.Write(p)
}

// Docker with images whose blobs are gone: it runs, tags and commits them; push says what is missing, until dedupctl
// complete has fetched it.
func TestTrimmedDocker(t *testing.T) {
	t.Parallel()
	if os.Getenv("DEDUP_LONG") == "" {
		t.Skip("builds dockerd, which takes minutes: set DEDUP_LONG=1")
	}
	n, r, other := startDedup(t, node.Options{}), startRegistry(t), startRegistry(t)
	own := layer(t, payload("docker", "own", 90000))
	ref := push(t, r, "app:1", busybox(t), own)
	ctx := testContext(t)
	d, err := n.StartDocker(ctx, node.Snapshotter)
	must(t, err)
	defer func() { must(t, d.Close()) }()
	docker := func(args ...string) error {
		out, err := d.Run(ctx, args...)
		if err != nil {
			return fmt.Errorf("docker %q: %w: %s", args, err, out)
		}
		return nil
	}
	must(t, docker("pull", "--quiet", ref))
	out, err := dedupctl(t, n, "trim")
	must(t, err)
	if !strings.Contains(out, "docker save leaves out") {
		t.Errorf("trim does not warn of docker save: %s", out)
	}
	wantBlobs(t, "trimmed", has(t, n, dockerNamespace, own), false)
	must(t, docker("run", "--name", "box", "--network", "none", ref, "touch", "/new"))
	must(t, docker("tag", ref, other.Ref("tagged:1")))
	must(t, docker("commit", "box", other.Ref("committed:1")))
	must(t, docker("run", "--rm", "--network", "none", other.Ref("committed:1"), "cat", "/new"))
	saved := filepath.Join(t.TempDir(), "saved.tar")
	if err := docker("push", other.Ref("tagged:1")); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("push without the blobs: %v", err)
	}
	t.Logf("save without the blobs says: %v", docker("save", "--output", saved, ref)) // docs/blobs.md
	complete := append(completeArgs(n, "--namespace", dockerNamespace), ref)
	if out, err := dedupctl(t, n, complete...); err != nil {
		t.Fatalf("complete: %v: %s", err, out)
	}
	for _, args := range [][]string{
		{"push", other.Ref("tagged:1")}, {"push", other.Ref("committed:1")}, {"save", "--output", saved, ref}, {"rm", "box"},
	} {
		must(t, docker(args...))
	}
	must(t, docker("rmi", ref, other.Ref("tagged:1"), other.Ref("committed:1")))
	must(t, docker("load", "--input", saved))
	must(t, docker("run", "--rm", "--network", "none", ref, "cat", "/own"))
	fsck(t, n, 0)
}
