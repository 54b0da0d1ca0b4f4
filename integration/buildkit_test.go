package integration

import (
	"fmt"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// startBuildKit starts a buildkitd on a snapshotter; it ends with the test.
func startBuildKit(t *testing.T, n *node.Node, snapshotter string) *node.BuildKit {
	t.Helper()
	b, err := node.StartBuildKit(testContext(t), n, snapshotter)
	must(t, err)
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// buildAndPush builds a directory with overlayfs and with dedup, and returns the references of the results.
func buildAndPush(t *testing.T, builders []*node.BuildKit, dir, ref string, flags ...string) (refs []string) {
	t.Helper()
	for i, b := range builders {
		out := ref + "-" + beside[i]
		_, err := b.Build(testContext(t), dir, append([]string{"--output", "type=image,push=true,name=" + out}, flags...)...)
		must(t, err)
		refs = append(refs, out)
	}
	return refs
}

// BuildKit builds with dedup what it builds with overlayfs: images mounted by the runtime, changes of every kind, and
// COPY --link. TestBuildKitMatrix has the long form.
func TestBuildKit(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := push(t, r, "base:1", busybox(t), dataLayer(t))
	entries := []image.Entry{image.Dir("deep"), payload("other", "deep/file", 20000), image.File("tiny", "t")}
	other := push(t, r, "other:1", layer(t, entries...))
	dir := contextDir(t, map[string]string{"copied": "from the context", "Dockerfile": fmt.Sprintf(`
FROM %[2]s AS other
FROM %[1]s AS stage
RUN --mount=type=bind,from=other,target=/x cat /x/deep/file /x/tiny | sha256sum > /sum && ! touch /x/new
RUN --mount=type=bind,from=other,target=/x,rw rm /x/tiny && touch /x/new && ls /x > /listed
RUN mv /data/b /data/renamed && echo more >> /data/c && ln /data/c /data/linked && rm /data/a
RUN chmod 4755 /data/small-a && chown 7:8 /data/small-b
RUN rm -r /data && mkdir /data && echo new > /data/new
FROM %[1]s
COPY --link --from=stage /sum /listed /from/
COPY --link copied /
COPY --from=stage /data /again
`, base, other)})
	var builders []*node.BuildKit
	for _, snapshotter := range beside {
		builders = append(builders, startBuildKit(t, n, snapshotter))
	}
	since := time.Now().Add(-time.Minute)
	final := sameImages(t, since, buildAndPush(t, builders, dir, r.Ref("built:1"))...)
	stage := sameImages(t, since, buildAndPush(t, builders, dir, r.Ref("built:2"), "--opt", "target=stage")...)
	if len(final.Layers) != 5 || len(stage.Layers) != 7 {
		t.Errorf("%d and %d layers", len(final.Layers), len(stage.Layers))
	}
}
