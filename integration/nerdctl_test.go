package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// session plays one program against one snapshotter and notes what it says.
type session struct {
	t     *testing.T
	run   func(ctx context.Context, args ...string) (string, error)
	notes []string
	// names are replaced in notes: what differs between sessions by nature.
	names map[string]string
}

// do runs a command that must succeed, and returns what it printed.
func (s *session) do(args ...string) string {
	s.t.Helper()
	out, err := s.run(testContext(s.t), args...)
	must(s.t, err)
	return strings.TrimSpace(out)
}

// note is do, and keeps the output for the comparison.
func (s *session) note(args ...string) string {
	s.t.Helper()
	out := s.do(args...)
	s.keep(strings.Join(args, " "), out)
	return out
}

// fails notes that a command fails, as it should.
func (s *session) fails(args ...string) {
	s.t.Helper()
	if out, err := s.run(testContext(s.t), args...); err == nil {
		s.t.Errorf("%q went through: %s", args, out)
	}
}

func (s *session) keep(what, value string) {
	line := what + ": " + value
	names := slices.SortedFunc(maps.Keys(s.names), func(a, b string) int { return len(b) - len(a) })
	for _, name := range names { // the longest first: one may be in another
		line = strings.ReplaceAll(line, name, s.names[name])
	}
	s.notes = append(s.notes, line)
}

// nerdctl does with dedup what it does with overlayfs: images, containers, and what is left in the end. Builds,
// conversions and archives as well, if DEDUP_CLIENTS is set.
func TestNerdctl(t *testing.T) {
	t.Parallel()
	long := os.Getenv("DEDUP_CLIENTS") != ""
	n, r, other := startDedup(t, node.Options{}), startRegistry(t), startRegistry(t)
	base := push(t, r, "app:1", busybox(t), dataLayer(t))
	since := time.Now().Add(-time.Minute)
	var notes [][]string
	var committed, built []string
	for _, snapshotter := range beside {
		var b *node.BuildKit
		if long {
			b = startBuildKit(t, n, snapshotter)
		}
		ctl, err := node.NewNerdctl(testContext(t), n, snapshotter, b)
		must(t, err)
		target := other.Ref("committed:" + snapshotter)
		names := map[string]string{snapshotter: "SNAPSHOTTER", base: "BASE", target: "TARGET"}
		s := &session{t: t, run: ctl.Run, names: names}
		nerdctlImages(s, base)
		nerdctlContainers(s, base, target)
		committed = append(committed, target)
		if long {
			built = append(built, nerdctlBuild(s, other, base, snapshotter))
			nerdctlMoves(s, base, target)
		}
		nerdctlLeavesNothing(t, n, ctl, s, snapshotter)
		notes = append(notes, s.notes)
	}
	if diff := cmp.Diff(notes[0], notes[1]); diff != "" {
		t.Errorf("what nerdctl says (-overlayfs +dedup):\n%s", diff)
	}
	if m := sameImages(t, since, committed...); len(m.Layers) != 3 {
		t.Errorf("%d layers committed", len(m.Layers))
	}
	if long {
		if m := sameImages(t, since, built...); len(m.Layers) != 4 {
			t.Errorf("%d layers built", len(m.Layers))
		}
	}
}

// nerdctlImages pulls and looks at an image.
func nerdctlImages(s *session, base string) {
	s.do("pull", "--quiet", base)
	s.note("images", "--format", "{{.Repository}} {{.Tag}} {{.Digest}}")
	s.note("image", "inspect", "--format", "{{json .RootFS}} {{json .Config}}", base)
	s.note("image", "inspect", "--mode", "native", "--format", "{{json .Manifest}}", base)
	s.note("history", "--quiet", "--no-trunc", base)
}

// nerdctlContainers runs, changes and commits a container, and pushes the result.
func nerdctlContainers(s *session, base, target string) {
	s.note("run", "--rm", "--net", "none", base, "sh", "-c", "cat /data/a | sha256sum; ls /data; cat /proc/1/comm")
	s.note("run", "--rm", "--net", "none", "--read-only", base, "sh", "-c", "touch /x || wc -c < /data/b")
	s.note("run", "--rm", "--net", "none", "--user", "7:8", base, "id", "-u")
	s.note("run", "--rm", "--net", "none", "--volume", "/anonymous", base, "ls", "/anonymous")
	s.do("run", "--detach", "--net", "none", "--name", "box", base, "sleep", "100000")
	s.note("exec", "box", "sh", "-c",
		"echo new > /data/new; rm /data/a; mv /data/b /data/moved; chmod 4755 /data/c; rm -r /root; ls /data")
	file := filepath.Join(s.t.TempDir(), "file")
	must(s.t, os.WriteFile(file, []byte("copied in"), 0o640))
	s.do("cp", file, "box:/data/copied")
	s.do("cp", "box:/data/moved", file+".out")
	out, err := os.ReadFile(file + ".out")
	must(s.t, err)
	s.keep("copied out", fmt.Sprint(len(out), string(out[:4])))
	s.note("exec", "box", "cat", "/data/copied")
	s.note("diff", "box")
	s.do("stop", "--time", "0", "box")
	s.note("ps", "--all", "--format", "{{.Names}} {{.Image}}")
	s.do("start", "box")
	s.note("exec", "box", "sh", "-c", // the time of what was copied in is that of the run
		"ls -l /data/c; ls -l /data/copied | awk '{print $1, $3, $4, $5, $9}'")
	s.note("inspect", "--format", "{{index .Config.Env 0}} {{.Driver}} {{.State.Status}}", "box")
	s.do("commit", "box", target)
	s.note("run", "--rm", "--net", "none", target, "sh", "-c",
		"ls -l /data | awk '{print $1, $5, $9}'; cat /data/new /data/copied; ls -d /root || true")
	s.do("push", "--quiet", target)
	s.do("rm", "--force", "box")
}

// nerdctlBuild builds an image with BuildKit and runs it.
func nerdctlBuild(s *session, r *registry.Registry, base, snapshotter string) string {
	ref := r.Ref("built:" + snapshotter)
	s.names[ref] = "BUILT"
	dir := contextDir(s.t, map[string]string{"file": "from the context", "Dockerfile": "FROM " + base +
		"\nCOPY file /\nRUN cat /file /data/small-a > /both && rm /data/b\n"})
	s.do("build", "--quiet", "--tag", ref, dir)
	s.note("run", "--rm", "--net", "none", ref, "sh", "-c", "cat /both; ls /data")
	s.do("push", "--quiet", ref)
	return ref
}

// nerdctlMoves takes images out and brings them back.
func nerdctlMoves(s *session, base, target string) {
	saved := filepath.Join(s.t.TempDir(), "saved.tar")
	s.do("save", "--output", saved, target)
	s.do("rmi", "--force", target)
	s.fails("run", "--rm", "--net", "none", "--pull", "never", target, "true")
	s.do("load", "--quiet", "--input", saved)
	s.note("run", "--rm", "--net", "none", "--pull", "never", target, "cat", "/data/new")
	s.do("tag", base, "tagged:1")
	s.note("run", "--rm", "--net", "none", "tagged:1", "cat", "/data/small-b")
	for _, how := range []string{"--zstd", "--estargz", "--uncompress"} {
		s.do("image", "convert", how, "--oci", base, "converted:1")
		s.note("run", "--rm", "--net", "none", "converted:1", "sh", "-c", "sha256sum /data/* | sha256sum")
		s.do("rmi", "--force", "converted:1")
	}
	s.do("rmi", "--force", target)
	s.do("pull", "--quiet", target) // what this machine has made, from the registry
	s.note("run", "--rm", "--net", "none", target, "ls", "/data")
}

// nerdctlLeavesNothing removes all and looks whether anything stays.
func nerdctlLeavesNothing(t *testing.T, n *node.Node, ctl *node.Nerdctl, s *session, snapshotter string) {
	t.Helper()
	s.do("container", "prune", "--force")
	s.do("image", "prune", "--all", "--force")
	s.do("system", "prune", "--all", "--volumes", "--force")
	s.note("images", "--quiet")
	ctx := namespaces.WithNamespace(testContext(t), ctl.Namespace())
	forget(t, n, ctx, nil)
	eventually(t, "snapshots of "+snapshotter+" to go", func() bool {
		var left []string
		must(t, n.Client().SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			left = append(left, info.Name)
			return nil
		}))
		return len(left) == 0
	})
}
