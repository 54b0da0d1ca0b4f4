package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// edit replaces text of a file, each time that it is there.
type edit struct{ file, from, to string }

// suite is a module whose tests are built, with changes that let them run on another snapshotter and without the
// registries that they were written for.
type suite struct {
	module, version string
	edits           []edit
	tests           map[string]string // name of the binary -> package
	commands        []string          // further packages, of commands
}

// TestSnapshotter is the variable that tells containerd's client suite and what is built of its module which
// snapshotter to take where it names none; VolumeSnapshotter the one of its tests of image volumes.
const (
	TestSnapshotter   = "TEST_SNAPSHOTTER"
	VolumeSnapshotter = "DEDUP_TEST_VOLUME_SNAPSHOTTER"
	// DigestRef and CritestDigestRef are the images that the suites pull by digest.
	DigestRef        = "DEDUP_TEST_DIGEST_REF"
	CritestDigestRef = "DEDUP_TEST_CRITEST_DIGEST_REF"
)

func containerdSuites() suite {
	const volumes = `SnapshotService("overlayfs")`
	return suite{
		module: "github.com/containerd/containerd/v2", version: "v" + DefaultVersion,
		edits: []edit{
			{"defaults/defaults_linux.go", "package defaults\n", "package defaults\n\nimport (\n\t\"cmp\"\n\t\"os\"\n)\n"},
			{"defaults/defaults_linux.go", "\tDefaultSnapshotter = \"overlayfs\"\n", ""},
			{"defaults/defaults_linux.go", "\nconst (\n",
				"\nvar DefaultSnapshotter = cmp.Or(os.Getenv(\"" + TestSnapshotter + "\"), \"overlayfs\")\n\nconst (\n"},
			{"integration/image_volume_linux_test.go", volumes, `SnapshotService(os.Getenv("` + VolumeSnapshotter + `"))`},
			{"integration/client/container_idmapped_linux_test.go", `snapshotter = "overlayfs"`,
				"snapshotter = testSnapshotter"},
			{"integration/client/container_test.go", `"/tmp/runc-test"`, `t.TempDir()`},
			{"integration/images/image_list.go",
				`"ghcr.io/containerd/busybox@sha256:7b3ccabffc97de872a30dfd234fd972a66d247c8cfc69b0550f276481852627c"`,
				`os.Getenv("` + DigestRef + `")`},
		},
		tests:    map[string]string{"client.test": "./integration/client", "cri.test": "./integration"},
		commands: []string{"./integration/failpoint/cmd/..."},
	}
}

func critest() suite {
	return suite{
		module: "sigs.k8s.io/cri-tools", version: "v1.37.0",
		edits: []edit{
			{"pkg/validate/consts.go", "\nimport (\n", "\nimport (\n\t\"os\"\n"},
			{"pkg/validate/consts.go", "testImageWithDigest = testLinuxImageWithDigest",
				`testImageWithDigest = os.Getenv("` + CritestDigestRef + `")`},
		},
		tests: map[string]string{"critest": "./cmd/critest"},
	}
}

// BuildSuites returns the directory of containerd's integration tests, client.test and cri.test, and of what they run
// with, built like Build does (two minutes).
func BuildSuites(ctx context.Context, say func(string)) (string, error) {
	return buildSuite(ctx, "suites", containerdSuites(), say)
}

// BuildCritest returns the directory of cri-tools' critest, built like Build does (half a minute).
func BuildCritest(ctx context.Context, say func(string)) (string, error) {
	return buildSuite(ctx, "critest", critest(), say)
}

// BuildCNI returns the directory of CNI's bridge, loopback, host-local and portmap, built like Build does.
func BuildCNI(ctx context.Context, say func(string)) (string, error) {
	const plugins = "github.com/containernetworking/plugins/plugins/"
	return buildModule(ctx, "cni", say, "", plugins+"main/bridge", plugins+"main/loopback", plugins+"ipam/host-local",
		plugins+"meta/portmap")
}

func buildSuite(ctx context.Context, name string, s suite, say func(string)) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "tools", name+"-"+shortHash(fmt.Append(nil, s)))
	unlock, err := Lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if say != nil {
		say("building the tests of " + s.module + " from the Go module proxy (once)")
	}
	staging := dir + ".new"
	if err := errors.Join(os.RemoveAll(staging), os.MkdirAll(staging, 0o755)); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	source, err := s.copy(ctx)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	defer os.RemoveAll(source)
	for binary, pkg := range s.tests {
		if _, err := goCommand(ctx, source, "test", "-c", "-ldflags=-s -w", "-o", filepath.Join(staging, binary),
			pkg); err != nil {
			return "", fmt.Errorf("build %s: %w", name, err)
		}
	}
	if len(s.commands) > 0 {
		args := append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", staging + "/"}, s.commands...)
		if _, err := goCommand(ctx, source, args...); err != nil {
			return "", fmt.Errorf("build %s: %w", name, err)
		}
	}
	if err := os.Rename(staging, dir); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return dir, nil
}

// copy downloads the module, and returns a directory with a changed copy of it.
func (s suite) copy(ctx context.Context) (string, error) {
	out, err := goCommand(ctx, os.TempDir(), "mod", "download", "-json", s.module+"@"+s.version)
	if err != nil {
		return "", err
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return "", fmt.Errorf("download %s: %w", s.module, err)
	}
	dir, err := os.MkdirTemp("", "module-")
	if err != nil {
		return "", err
	}
	err = os.CopyFS(dir, os.DirFS(module.Dir))
	for _, e := range s.edits {
		err = errors.Join(err, e.apply(dir))
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	return dir, nil
}

func (e edit) apply(dir string) error {
	path := filepath.Join(dir, e.file)
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.Contains(string(text), e.from) {
		return fmt.Errorf("%s does not have %q: adapt the edits to this version", e.file, e.from)
	}
	return os.WriteFile(path, []byte(strings.ReplaceAll(string(text), e.from, e.to)), 0o644)
}

func goCommand(ctx context.Context, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off", "PWD="+dir)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("go %s: %w\n%s%s", strings.Join(args, " "), err, out.String(), tail(errs.Bytes(), 20))
	}
	return out.Bytes(), nil
}
