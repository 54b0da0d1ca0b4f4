package blobs

import (
	"strings"
	"testing"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

func chainOf(t *testing.T, digit string) content.ChainID {
	t.Helper()
	sum, err := content.ParseSum(strings.Repeat(digit, 64))
	if err != nil {
		t.Fatal(err)
	}
	return content.ChainID{Sum: sum}
}

// add puts a blob into a graph, with labels as containerd writes them.
func (g *graph) add(name string, size int64, labels map[string]string) {
	for k, v := range labels {
		if strings.HasPrefix(k, labelContent) {
			labels[k] = digest.FromString(v).String()
		}
	}
	g.blobs[digest.FromString(name)] = readNode(ctdcontent.Info{Size: size, Labels: labels}, []string{"dedup"})
}

// An index leads to its manifests, and those to what was unpacked of them; each blob goes with the last image of
// any namespace that leads to it, unless something else keeps it.
func TestUnpacked(t *testing.T) {
	first := &graph{namespace: "a", images: map[digest.Digest][]string{
		digest.FromString("index"):    {"z:2", "index:1"},
		digest.FromString("manifest"): {"manifest:1"},
		digest.FromString("other"):    {"other:1"}, // unpacked by another snapshotter
		digest.FromString("gone"):     {"gone:1"},  // its blobs are missing
	}, blobs: map[digest.Digest]*node{}}
	first.add("index", 100, map[string]string{"containerd.io/gc.ref.content.m.0": "amd64",
		"containerd.io/gc.ref.content.m.1": "arm64", "containerd.io/gc.ref.content.m.2": "missing"})
	first.add("amd64", 100, map[string]string{"containerd.io/gc.ref.content.config": "config",
		"containerd.io/gc.ref.content.l.0": "layer"})
	first.add("arm64", 100, map[string]string{"containerd.io/gc.ref.content.config": "config2",
		"containerd.io/gc.ref.content.0": "index"})
	first.add("config", 100, map[string]string{labelSnapshot + "dedup": "sha256:" + strings.Repeat("1", 64)})
	first.add("config2", 100, map[string]string{labelSnapshot + "dedup/x": strings.Repeat("2", 64), labelSnapshot +
		"dedup": "nonsense"})
	first.add("layer", 10_000, nil)
	first.add("manifest", 100, map[string]string{"containerd.io/gc.ref.content.config": "config3",
		"containerd.io/gc.ref.content.l.0": "layer",
		"containerd.io/gc.ref.content.l.1": "rooted", "containerd.io/gc.ref.content.l.2": "leased",
		"containerd.io/gc.ref.contents": "own", "containerd.io/gc.ref.content/l.3": "own"})
	first.add("config3", 100, map[string]string{labelSnapshot + "dedup": strings.Repeat("3", 64)})
	first.add("rooted", 100, map[string]string{labelRoot: "2020"})
	first.add("leased", 100, nil)
	first.add("own", 5000, nil)
	first.add("other", 100, map[string]string{"containerd.io/gc.ref.content.config": "config4"})
	first.add("config4", 100, map[string]string{labelSnapshot + "overlayfs": strings.Repeat("4", 64)})
	first.leases = []lease{{flat: true, blobs: []digest.Digest{digest.FromString("leased")},
		chains: []content.ChainID{chainOf(t, "9")}},
		{blobs: []digest.Digest{digest.FromString("amd64")}},
		{flat: true, blobs: []digest.Digest{digest.FromString("manifest"), digest.FromString("missing")}}}
	second := &graph{namespace: "b", images: map[digest.Digest][]string{digest.FromString("manifest"): {"manifest:1"}},
		blobs: map[digest.Digest]*node{}}
	second.add("manifest", 100, map[string]string{"containerd.io/gc.ref.content.config": "config3"})
	second.add("config3", 100, map[string]string{labelSnapshot + "dedup": strings.Repeat("3", 64)})

	const block = 4096
	want := []Unpacked{
		{Namespace: "a", Names: []string{"index:1", "z:2"}, Target: digest.FromString("index"),
			Chains: []content.ChainID{chainOf(t, "1"), chainOf(t, "2")},
			Blobs:  5*block + 3*block, FreedBlobs: 3 * block}, // not what the lease on amd64 leads to, nor the layer
		{Namespace: "a", Names: []string{"manifest:1"}, Target: digest.FromString("manifest"),
			Chains: []content.ChainID{chainOf(t, "3")},
			// own alone: the others are b's, rooted, leased or index's
			Blobs: 4*block + 3*block + 2*block, FreedBlobs: 2 * block},
		{Namespace: "b", Names: []string{"manifest:1"}, Target: digest.FromString("manifest"),
			Chains: []content.ChainID{chainOf(t, "3")}, Blobs: 2 * block},
	}
	got := unpacked([]*graph{first, second})
	for i := range got {
		if len(got[i].Chains) == 2 && got[i].Chains[0] != chainOf(t, "1") {
			got[i].Chains[0], got[i].Chains[1] = got[i].Chains[1], got[i].Chains[0]
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if d := cmp.Diff([]content.ChainID{chainOf(t, "9"), chainOf(t, "1")}, first.leasedChains()); d != "" {
		t.Errorf("leased (-want +got):\n%s", d)
	}
}
