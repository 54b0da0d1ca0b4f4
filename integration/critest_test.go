package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
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

var critestResult = regexp.MustCompile(
	`(?m)^\s*\[(FAIL|PANICKED|TIMEDOUT|INTERRUPTED)\] .*|^Ran \d+ of \d+ Specs.*|^(SUCCESS|FAIL)! .*`)

// cri-tools' own tests pass with dedup where they pass with overlayfs. DEDUP_CRITEST names the binary critest, made
// with `go test -c ./cmd/critest` in a clone of github.com/kubernetes-sigs/cri-tools; DEDUP_CRITEST_FOCUS chooses
// tests. Those that want images of public registries, or a pod network, fail with both.
func TestCritest(t *testing.T) {
	bin := os.Getenv("DEDUP_CRITEST")
	if bin == "" {
		t.Skip("DEDUP_CRITEST is not set to the path of critest")
	}
	failed := map[string]map[string]bool{}
	for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
		failed[snapshotter] = critest(t, bin, snapshotter)
	}
	for name := range failed[node.Snapshotter] {
		if !failed["overlayfs"][name] {
			t.Errorf("fails with dedup alone: %s", name)
		}
	}
}

// critest returns the names of the tests that fail.
func critest(t *testing.T, bin, snapshotter string) map[string]bool {
	t.Helper()
	r, dir := startRegistry(t), t.TempDir()
	pause, err := image.New(image.Options{Cmd: []string{"/bin/sleep", "100000"}}, busybox(t))
	must(t, err)
	pauseRef := pushImage(t, r, "pause:1", pause)
	ref := push(t, r, "busybox:1", busybox(t))
	must(t, os.MkdirAll(filepath.Join(dir, "net.d"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "net.d/10-test.conflist"),
		[]byte(`{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"test"}]}`), 0o600))
	for _, name := range []string{"loopback", "test"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(cniScript), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(dir, "images.yaml"),
		fmt.Appendf(nil, "defaultTestContainerImage: %s\nwebServerTestImage: %s\n", ref, ref), 0o600))
	opts := node.Options{CRI: true, PauseImage: pauseRef, NoDedup: snapshotter != node.Snapshotter,
		Plugins: map[string]map[string]any{
			"io.containerd.cri.v1.runtime": {"cni": map[string]any{"bin_dirs": []string{dir},
				"conf_dir": filepath.Join(dir, "net.d")}},
		}}
	start := startDedup
	if opts.NoDedup {
		start = startNode
	}
	n := start(t, opts)
	ctx, cancel := context.WithTimeout(testContext(t), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "--runtime-endpoint", "unix://"+n.Address(), "--image-endpoint", "unix://"+
		n.Address(),
		"--test-images-file", filepath.Join(dir, "images.yaml"), "--ginkgo.no-color", "--ginkgo.timeout", "3m",
		"--ginkgo.focus", os.Getenv("DEDUP_CRITEST_FOCUS"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	failed := map[string]bool{}
	ran := false
	for _, line := range critestResult.FindAllString(out.String(), -1) {
		ran = ran || bytes.HasPrefix([]byte(line), []byte("Ran "))
		t.Logf("%s: %s", snapshotter, line)
		if regexp.MustCompile(`^\s*\[`).MatchString(line) {
			failed[regexp.MustCompile(`^\s*\[\w+\] `).ReplaceAllString(line, "")] = true
		}
	}
	if !ran {
		t.Fatalf("critest ran nothing:\n%s", out.String())
	}
	return failed
}
