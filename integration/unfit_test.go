package integration

import (
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A layer that no container could be started from fails its pull, as with overlayfs: when it is applied, when it is
// known from an image where it fits. Nothing of it stays.
func TestLayersThatDoNotFit(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := layer(t, payload("unfit", "there", 8000))
	dir := layer(t, image.Dir("there"), payload("unfit", "there/file", 8000))
	for i, row := range []struct {
		name string
		bad  *image.Layer
		on   *image.Layer // what lies below
		says string
	}{
		{"hard link before its target", layer(t, image.Hardlink("l", "late"), payload("unfit", "late", 8000)), base,
			`hard link "l" names "late", which no layer below has`},
		{"hard link to nothing", layer(t, payload("unfit", "one", 8000), image.Hardlink("l", "nowhere")), base,
			`hard link "l" names "nowhere", which no layer below has`},
		{"hard link to a directory below", layer(t, payload("unfit", "two", 8000), image.Hardlink("l", "there")), dir,
			`hard link "l" names "there", which is a directory`},
		{"hard link in a base layer", layer(t, image.Hardlink("l", "nowhere")), nil,
			`hard link "l" names "nowhere", which no layer below has`},
	} {
		t.Run(row.name, func(t *testing.T) {
			layers := []*image.Layer{row.bad}
			if row.on != nil {
				layers = []*image.Layer{row.on, row.bad, layer(t, payload(row.name, "above", 8000))}
			}
			ref := push(t, r, "unfit:"+string(rune('a'+i)), layers...)
			if err := n.Pull(testContext(t), "overlayfs", ref); err == nil {
				t.Error("overlayfs takes it")
			}
			if err := n.Pull(testContext(t), node.Snapshotter, ref); err == nil || !strings.Contains(err.Error(), row.says) {
				t.Errorf("ctr says %v, want %q in it", err, row.says)
			}
			leavesNothing(t, n)
		})
	}
	// The same layer is fine on one image, and not on another.
	link := layer(t, image.Hardlink("l", "there"))
	good := push(t, r, "fit:1", base, link)
	pull(t, n, node.Snapshotter, good)
	if got := dump(t, n, node.Snapshotter, good); len(got) != 3 {
		t.Errorf("the image that fits shows %d names", len(got))
	}
	bad := push(t, r, "unfit:known", dir, link)
	if err := n.Pull(testContext(t), node.Snapshotter, bad); err == nil ||
		!strings.Contains(err.Error(), `names "there", which is a directory`) {
		t.Errorf("a known layer on another parent: ctr says %v", err)
	}
	if got := dump(t, n, node.Snapshotter, good); len(got) != 3 {
		t.Errorf("the image that fits shows %d names", len(got))
	}
}
