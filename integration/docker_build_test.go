package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// dockerStages has a stage of its own, changes of every kind, and copies between stages.
const dockerStages = `FROM %[1]s AS stage
RUN mv /data/b /data/renamed && echo more >> /data/c && ln /data/c /data/linked && rm /data/a
RUN chmod 4755 /data/small-a && chown 7:8 /data/small-b && ls /data > /listed
RUN rm -r /data && mkdir /data && echo new > /data/new
FROM %[1]s
COPY copied /copied/
COPY --from=stage /listed /from/
COPY --from=stage /data /again
RUN cat /copied/copied /from/listed /again/new > /all && rm /data/a
`

const composeFile = `name: stack
services:
  one:
    build: {context: ., network: none}
    image: %[1]s
    network_mode: none
    command: ["sh", "-c", "cat /all > /volume/all; echo wrote; sleep 100000"]
    volumes: ["shared:/volume"]
  two:
    image: %[1]s
    network_mode: none
    depends_on: [one]
    command: ["sh", "-c", "while ! test -s /volume/all; do sleep 0.1; done; cat /volume/all; sleep 100000"]
    volumes: ["shared:/volume"]
volumes:
  shared: {}
`

// dockerBuild is one Docker, on one snapshotter.
type dockerBuild struct {
	*testing.T
	n           *node.Node
	r           *registry.Registry
	d           *node.Docker
	snapshotter string
	dir         string // to build from
}

// Docker 29 builds with dedup what it builds with overlayfs. What it has pushed is known on this node: a pull reads
// no blob. A Compose file is built, runs and goes.
func TestDockerBuild(t *testing.T) {
	needClients(t)
	t.Parallel()
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"log_level": "debug"}}), startRegistry(t)
	base := push(t, r, "base:1", busybox(t), dataLayer(t))
	dir := contextDir(t, map[string]string{"copied": "from the context\n", "Dockerfile": fmt.Sprintf(dockerStages, base)})
	since := time.Now().Add(-time.Minute)
	var built, composed, shown []string
	for _, snapshotter := range beside {
		func() {
			d, err := n.StartDocker(testContext(t), snapshotter)
			must(t, err)
			defer func() { must(t, d.Close()) }()
			_, err = d.Run(testContext(t), "pull", "--quiet", base) // for this snapshotter, too: see docs/clients.md
			must(t, err)
			b := &dockerBuild{T: t, n: n, r: r, d: d, snapshotter: snapshotter, dir: dir}
			built = append(built, b.build())
			ref, out := b.compose()
			composed, shown = append(composed, ref), append(shown, out)
		}()
	}
	final := sameImages(t, since, built...)
	if len(final.Layers) != 6 {
		t.Errorf("%d layers", len(final.Layers))
	}
	sameImages(t, since, composed...)
	if d := cmp.Diff(shown[0], shown[1]); d != "" {
		t.Errorf("containers of the Compose file show (-overlayfs +dedup):\n%s", d)
	}
	fsck(t, n, 0)
}

func (b *dockerBuild) docker(args ...string) string {
	b.Helper()
	out, err := b.d.Run(testContext(b.T), args...)
	must(b.T, err)
	return strings.TrimSpace(out)
}

// build builds, runs, pushes, and pulls what was pushed.
func (b *dockerBuild) build() string {
	ref := b.r.Ref("built:" + b.snapshotter)
	b.docker("build", "--network", "none", "--tag", ref, b.dir)
	run := []string{"run", "--rm", "--network", "none", ref, "sh", "-c", "cat /all; ls /data"}
	want := "from the context\nc\nlinked\nrenamed\nsmall-a\nsmall-b\nsmall-c\nnew\nb\nc\nsmall-a\nsmall-b\nsmall-c"
	if out := b.docker(run...); out != want {
		b.Errorf("%s: %q, want %q", b.snapshotter, out, want)
	}
	b.docker("push", ref)
	before := ingests(b.T, b.n)
	b.docker("rmi", ref)
	b.docker("pull", "--quiet", ref)
	if d := cmp.Diff(before, ingests(b.T, b.n)); d != "" {
		b.Errorf("%s: a pull of what was pushed read blobs (-before +after):\n%s", b.snapshotter, d)
	}
	if out := b.docker(run...); out != want {
		b.Errorf("%s: pulled again: %q, want %q", b.snapshotter, out, want)
	}
	return ref
}

// compose builds a Compose file, starts it, pushes, and takes it down. It returns the image, and what its containers
// show.
func (b *dockerBuild) compose() (ref, shown string) {
	ref = b.r.Ref("composed:" + b.snapshotter)
	file := filepath.Join(b.dir, "compose-"+b.snapshotter+".yaml")
	must(b.T, os.WriteFile(file, fmt.Appendf(nil, composeFile, ref), 0o644))
	defer func() { must(b.T, os.Remove(file)) }()
	compose := func(args ...string) string {
		b.Helper()
		out, err := b.d.Compose(testContext(b.T), append([]string{"--file", file}, args...)...)
		must(b.T, err)
		return strings.TrimSpace(out)
	}
	compose("build", "--no-cache") // what another snapshotter's build has cached has no snapshot here: see docs/clients.md
	compose("up", "--detach", "--quiet-pull")
	eventually(b.T, "the second service to show what the first wrote", func() bool {
		shown = compose("logs", "--no-log-prefix", "two")
		return strings.Contains(shown, "small-c")
	})
	if out := compose("exec", "-T", "two", "cat", "/all"); !strings.Contains(out, "from the context") {
		b.Errorf("%s: exec shows %q", b.snapshotter, out)
	}
	compose("push", "--quiet", "one")
	compose("down", "--volumes", "--rmi", "all", "--timeout", "0")
	if left := b.docker("ps", "--all", "--quiet"); left != "" {
		b.Errorf("%s: compose down leaves %s", b.snapshotter, left)
	}
	lines := strings.Split(shown, "\n")
	return ref, strings.Join(slices.DeleteFunc(lines, func(l string) bool { return l == "" }), "\n")
}
