package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// rig is the daemon's and dedupctl's real binaries, on a store of their own.
type rig struct {
	ctl, daemon  string
	root, socket string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the daemon mounts overlayfs and EROFS")
	}
	dir := t.TempDir()
	const module = "github.com/dedup-snapshotter/dedup-snapshotter"
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-X main.version=v0.0.0-test", "-o", dir+"/",
		module+"/cmd/dedupctl", module+"/cmd/containerd-dedup-grpc")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// A socket's path has 107 bytes at most, and the names of tests are in TempDir's.
	run, err := os.MkdirTemp("", "dedupctl-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A daemon that stopped leaves mounts for containers.
		if err := errors.Join(mount.UnmountRecursive(run, 0), os.RemoveAll(run)); err != nil {
			t.Error(err)
		}
	})
	return &rig{
		ctl: filepath.Join(dir, "dedupctl"), daemon: filepath.Join(dir, "containerd-dedup-grpc"),
		root: filepath.Join(dir, "root"), socket: filepath.Join(run, "s"),
	}
}

// start runs the daemon until the test or stop ends it.
func (r *rig) start(t *testing.T) (stop func()) {
	t.Helper()
	config := filepath.Join(filepath.Dir(r.ctl), "config.toml")
	text := fmt.Sprintf("root = %q\naddress = %q\ncontainerd_address = %q\n", r.root, r.socket, r.socket+".none")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(r.daemon, "--config", config)
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("daemon: %v\n%s", err, &log)
		}
		points, _ := filepath.Glob(filepath.Join(filepath.Dir(r.socket), "chains", "*"))
		for _, p := range points {
			_ = syscall.Unmount(p, syscall.MNT_DETACH)
		}
	}
	t.Cleanup(stop)
	for range 3000 {
		if conn, err := net.Dial("unix", r.socket); err == nil {
			conn.Close()
			return stop
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the daemon does not listen on ", r.socket)
	return nil
}

// run runs dedupctl against the daemon.
func (r *rig) run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(r.ctl, append([]string{"--address", r.socket}, args...)...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	t.Logf("$ dedupctl %s\n%s%s", strings.Join(args, " "), &out, &errs)
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// json runs dedupctl and decodes what it prints.
func (r *rig) json(t *testing.T, v any, args ...string) {
	t.Helper()
	code, out, errs := r.run(t, append(args, "--json")...)
	if err := json.Unmarshal([]byte(out), v); err != nil || code != exitOK || errs != "" {
		t.Fatal(code, err, errs)
	}
}

// commit stores a directory of one file of 10,000 bytes and one of 3 as a layer, through the snapshots
// service, and leaves a view of it. Only the owner tells one from another.
func (r *rig) commit(t *testing.T, name string, uid int) {
	t.Helper()
	conn, err := dial(t.Context(), r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "dedup")
	ctx := namespaces.WithNamespace(t.Context(), "test")
	mounts, err := sn.Prepare(ctx, name+"-active", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range mounts[0].Options {
		upper, ok := strings.CutPrefix(o, "upperdir=")
		if !ok {
			continue
		}
		for file, bytes := range map[string]int{"large": 10_000, "small": 3} {
			path := filepath.Join(upper, file)
			if err := errors.Join(os.WriteFile(path, []byte(strings.Repeat("x", bytes)), 0o644), os.Chown(path, uid,
				uid)); err != nil {
				t.Fatal(err)
			}
		}
		for _, path := range []string{filepath.Join(upper, "large"), filepath.Join(upper, "small"), upper} {
			if err := os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := sn.Commit(ctx, name, name+"-active"); err != nil {
		t.Fatal(err)
	}
	if code, out, errs := r.run(t, "fsck"); code != exitOK { // its directory becomes a layer now, not when it is idle
		t.Fatal(code, out, errs)
	}
	if _, err := sn.View(ctx, name+"-view", name, snapshots.WithLabels(nil)); err != nil { // waits for the ingest
		t.Fatal(err)
	}
}

func TestDaemon(t *testing.T) {
	r := newRig(t)
	if code, _, errs := r.run(t, "status"); code != exitFailure || !strings.Contains(errs, "no socket "+r.socket) {
		t.Error(code, errs)
	}
	stop := r.start(t)
	t.Run("an empty store", func(t *testing.T) { checkEmpty(t, r) })
	r.commit(t, "one", 0)
	r.commit(t, "two", 1000)
	r.commit(t, "again", 1000)
	t.Run("status", func(t *testing.T) { checkStatus(t, r) })
	t.Run("layers", func(t *testing.T) { checkLayers(t, r) })
	t.Run("duplicates", func(t *testing.T) { checkDuplicates(t, r) })
	t.Run("config takes the daemon's root", func(t *testing.T) {
		var v ContainerdConfig
		r.json(t, &v, "config", "containerd", "--containerd-version", "2.1")
		if !strings.Contains(v.TOML, r.root) {
			t.Error(v.TOML)
		}
	})
	t.Run("a stranger is refused", func(t *testing.T) { checkStranger(t, r) })
	stop()
	if code, _, errs := r.run(t, "layers"); code != exitFailure ||
		!strings.Contains(errs, "systemctl start containerd-dedup-grpc") {
		t.Error(code, errs)
	}
}

func checkEmpty(t *testing.T, r *rig) {
	var s Status
	r.json(t, &s, "status")
	if s.Layers != 0 || s.LogicalBytes != 0 || s.Version != "v0.0.0-test" || s.Root != r.root || s.Fidelity != "python" ||
		s.Reuse != "known" {
		t.Errorf("%+v", s)
	}
	code, out, errs := r.run(t, "layers")
	if code != exitOK || out != "" || !strings.HasPrefix(errs, "no layers: nothing has been pulled") {
		t.Error(code, out)
	}
	if code, out, _ := r.run(t, "duplicates"); code != exitOK || !strings.Contains(out, "No two layers are equal") {
		t.Error(code, out)
	}
}

func checkStatus(t *testing.T, r *rig) {
	var s Status
	r.json(t, &s, "status")
	if s.Layers != 2 || s.Uses != 3 || s.Objects != 1 || s.LogicalBytes != 3*10_003 || s.ChainImages != 2 ||
		s.ChainMounts != 2 {
		t.Errorf("%+v", s)
	}
	// A pack, two trees, two images, and three directories.
	if s.StoredInodes != 8 || s.StoredBytes < 12_288 || s.FreeBytes <= 0 || s.TotalBytes < s.FreeBytes {
		t.Errorf("%+v", s)
	}
	_, out, _ := r.run(t, "status")
	for _, want := range []string{
		`(?m)^daemon +v0\.0\.0-test, fidelity python, reuse known$`,
		`(?m)^layers +2 for 0 diffIDs, used 3 times by snapshots$`,
		`(?m)^objects +1$`,
		`(?m)^logical +30\.0 kB, \d+ entries$`,
		`(?m)^chain images +2, 2 mounted$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("%s is not in\n%s", want, out)
		}
	}
}

func checkLayers(t *testing.T, r *rig) {
	var list []Layer
	r.json(t, &list, "layers")
	if len(list) != 2 || list[0].Uses+list[1].Uses != 3 || list[0].PayloadDigest != list[1].PayloadDigest ||
		list[0].ID == list[1].ID {
		t.Fatalf("%+v", list)
	}
	for _, l := range list {
		if _, err := os.Stat(filepath.Join(r.root, "layers", l.ID)); err != nil || l.LogicalBytes != 10_003 ||
			l.Fidelity != "python" {
			t.Errorf("%+v, %v", l, err)
		}
	}
	var one []Layer
	_, text, _ := r.run(t, "layers", "--json", list[1].ID[:10])
	if err := json.Unmarshal([]byte(text), &one); err != nil || len(one) != 1 || one[0].ID != list[1].ID {
		t.Errorf("the layer that begins with %s: %s", list[1].ID[:10], text)
	}
	code, out, errs := r.run(t, "layers", "--unused")
	if code != exitOK || out != "" || errs != "no layer matches; there are 2 in all\n" {
		t.Error(code, out, errs)
	}
	var sorted []Layer
	r.json(t, &sorted, "layers", "--sort", "uses")
	if len(sorted) != 2 || sorted[0].Uses < sorted[1].Uses {
		t.Errorf("sorted by uses: %+v", sorted)
	}
	_, out, _ = r.run(t, "layers")
	if !strings.HasPrefix(out, "LAYER ") || !strings.Contains(out, "2 layers, 20.0 kB; storing them added ") {
		t.Error(out)
	}
}

func checkDuplicates(t *testing.T, r *rig) {
	var d Duplicates
	r.json(t, &d, "duplicates")
	if len(d.Equal) != 1 || len(d.Equal[0].Layers) != 2 || d.Equal[0].LogicalBytes != 10_003 || d.Ratio <= 0 {
		t.Errorf("%+v", d)
	}
	for title, rows := range map[string][]DuplicateRow{"/": d.Paths, "(none)": d.Types} {
		if diff := cmp.Diff([]DuplicateRow{{Name: title, UsedFiles: 3, UsedBytes: 30_000, Objects: 1, StoredBytes: 10_000}},
			rows); diff != "" {
			t.Error(diff)
		}
	}
	_, out, _ := r.run(t, "duplicates")
	if !strings.Contains(out, "Layers equal but for mtime, uid and gid:") || !strings.Contains(out, "3 uses of 2 layers") {
		t.Error(out)
	}
}

// checkStranger asks as a user without rights: every verb that needs any refuses, and says what to do.
func checkStranger(t *testing.T, r *rig) {
	// The binary and the sockets' directory must not be what keeps it out.
	dir, err := os.MkdirTemp("", "dedupctl-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctl, config, containerd := filepath.Join(dir, "dedupctl"), filepath.Join(dir, "config.toml"),
		filepath.Join(dir, "containerd")
	b, err := os.ReadFile(r.ctl)
	if err := errors.Join(err, os.Chmod(dir, 0o755), os.WriteFile(ctl, b, 0o755), os.WriteFile(config, nil, 0o644),
		os.Chmod(filepath.Dir(r.socket), 0o755)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", containerd)
	if err == nil {
		err = os.Chmod(containerd, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, theirs := "permission denied on "+r.socket, "permission denied on "+containerd
	for verb, want := range map[string]string{
		"status": ours, "images": ours, "layers": ours, "duplicates": ours, "gc": ours, "gc --dry-run": ours, "fsck": ours,
		"fsck --repair": ours,
		"doctor":        "sudo dedupctl doctor", "complete --containerd-address " + containerd + " app:1": theirs,
		"migrate --containerd-address " + containerd:                                             theirs,
		"config containerd --containerd-address " + containerd:                                   theirs,
		"config containerd --write --yes --containerd-version 2.1 --containerd-config " + config: "permission denied",
		"analyze " + r.root: "permission denied",
	} {
		cmd := exec.Command(ctl, append([]string{"--address", r.socket}, strings.Fields(verb)...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, _ := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != exitFailure || !strings.Contains(string(out), want) ||
			!strings.Contains(string(out), "root") {
			t.Errorf("dedupctl %s: exit code %d, %s", verb, cmd.ProcessState.ExitCode(), out)
		}
	}
	if b, err := os.ReadFile(config); err != nil || len(b) > 0 {
		t.Errorf("a stranger wrote %q, %v", b, err)
	}
}

// other is a service that is not ours but containerd's.
type other struct {
	versionapi.UnimplementedVersionServer
}

func (other) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: "v1.7.35"}, nil
}

func TestOtherService(t *testing.T) {
	dir, err := os.MkdirTemp("", "dedupctl-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	versionapi.RegisterVersionServer(server, other{})
	go func() { _ = server.Serve(l) }()
	defer server.Stop()

	if code, _, errs := dedupctl(t, "status", "--address", socket); code != exitFailure ||
		!strings.Contains(errs, "does not know this request") {
		t.Error(code, errs)
	}
	code, out, errs := dedupctl(t, "config", "containerd", "--containerd-address", socket, "--address", socket+".none")
	if code != exitOK || !strings.HasPrefix(out, "# For containerd v1.7.35:") || !strings.Contains(out, "version = 2\n") {
		t.Error(code, out, errs)
	}
}
