package integration

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// A damaged record of metadata.db harms its image alone; fsck names that; no garbage collection removes what the record
// may have been about; and with the image removed and pulled again all is as before.
func TestDamagedMetadata(t *testing.T) {
	t.Parallel()
	n := startDedup(t, node.Options{})
	reg, ctx := startRegistry(t), testContext(t)
	bb := busybox(t)
	harmed := push(t, reg, "harmed:1", bb, layer(t, payload("metadata", "harmed", 9000)))
	other := push(t, reg, "other:1", bb, layer(t, payload("metadata", "other", 9000)))
	var want []rootfs.Tree
	for _, ref := range []string{harmed, other} {
		pull(t, n, node.Snapshotter, ref)
		want = append(want, dump(t, n, node.Snapshotter, ref))
	}
	running, err := n.RunDetached(ctx, node.Snapshotter, other, "sh", "-c", "echo mine > /written; sleep 1000")
	must(t, err)
	chain, err := n.ChainID(ctx, harmed)
	must(t, err)

	must(t, n.StopDaemon())
	changeRecord(t, filepath.Join(n.DedupRoot(), "metadata.db"), chain)
	must(t, n.StartDaemon(ctx))
	if r := fsck(t, n, 3); !slices.Equal(r.images(), []string{harmed}) || r.Unused > 0 {
		t.Errorf("fsck finds %+v", r)
	}
	out, err := n.Run(ctx, node.Snapshotter, harmed, "true")
	if err == nil || !strings.Contains(out+err.Error(), "its record in metadata.db is damaged") ||
		!strings.Contains(out+err.Error(), "dedupctl fsck") {
		t.Errorf("a container of the harmed image: %q, %v", out, err)
	}
	if out, err := n.Run(ctx, node.Snapshotter, other, "echo", "fine"); err != nil || out != "fine\n" {
		t.Errorf("a container of the other image: %q, %v", out, err)
	}
	_, err = n.Ctr(ctx, "image", "rm", "--sync", harmed)
	must(t, err)
	pull(t, n, node.Snapshotter, harmed)
	if r := fsck(t, n, 3); len(r.images()) > 0 {
		t.Errorf("fsck finds %+v", r)
	}
	if r := fsck(t, n, 0, "--repair"); r.Fixed == 0 {
		t.Errorf("fsck --repair: %+v", r)
	}
	if r := fsck(t, n, 0); len(r.Findings) > 0 {
		t.Errorf("fsck finds %+v", r)
	}
	for i, ref := range []string{harmed, other} {
		equal(t, want[i], dump(t, n, node.Snapshotter, ref), rootfs.DiffOptions{})
	}
	if out, err := n.Exec(ctx, running, "cat", "/written"); err != nil || out != "mine\n" {
		t.Errorf("the running container: %q, %v", out, err)
	}
	must(t, n.RemoveContainer(ctx, running))
}

// changeRecord changes the layer in the record of the snapshot that is named by a chain.
func changeRecord(t *testing.T, path, chain string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	must(t, err)
	found := false
	must(t, db.Update(func(tx *bbolt.Tx) error {
		all := tx.Bucket([]byte("v1")).Bucket([]byte("snapshots"))
		return all.ForEachBucket(func(name []byte) error {
			if !bytes.HasSuffix(name, []byte(chain)) {
				return nil
			}
			found = true
			return all.Bucket(name).Bucket([]byte("labels")).Put([]byte("dedup-snapshotter.io/layer"),
				[]byte(strings.Repeat("ab", 32)))
		})
	}))
	must(t, db.Close())
	if !found {
		t.Fatalf("no snapshot is named by %s", chain)
	}
}
