package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// dropper is one client of a node that drops blobs, with an image of its own over a base that all share.
type dropper struct {
	n        *node.Node
	ref, dir string
	rand     *rand.Rand
	pulled   bool
	exports  int
}

// step does one thing that succeeds where blobs are kept.
func (d *dropper) step(t *testing.T) error {
	ctx := testContext(t)
	if !d.pulled {
		d.pulled = true
		return d.n.Pull(ctx, node.Snapshotter, d.ref)
	}
	switch d.rand.IntN(5) {
	case 0:
		d.pulled = false
		_, err := d.n.Ctr(ctx, "image", "rm", "--sync", d.ref)
		return err
	case 1:
		_, err := dedupctl(t, d.n, "trim", d.ref)
		return err
	case 2:
		if out, err := dedupctl(t, d.n, completeArgs(d.n, d.ref)...); err != nil {
			return fmt.Errorf("complete: %w: %s", err, out)
		}
		d.exports++
		to := filepath.Join(d.dir, fmt.Sprint(d.exports, ".tar"))
		_, err := d.n.Ctr(ctx, "image", "export", to, d.ref)
		return err
	case 3:
		return d.n.Pull(ctx, node.Snapshotter, d.ref)
	}
	out, err := d.n.Run(ctx, node.Snapshotter, d.ref, "/bin/cat", "/own")
	if err == nil && !strings.Contains(out, d.ref) {
		err = errors.New("the container shows " + out)
	}
	return err
}

// Several clients pull, run, remove, trim, complete and export side by side, while the daemon drops blobs by itself:
// nothing fails. In the end no blob of a layer is left, and every image runs.
func TestDrop(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{Daemon: map[string]any{"blobs": "drop"}}), startRegistry(t)
	base, seed := busybox(t), rand.Uint64()
	t.Log("seed", seed)
	var clients []*dropper
	var eg errgroup.Group
	for i := range 4 {
		name := fmt.Sprint("drop", i)
		d := &dropper{n: n, dir: t.TempDir(), rand: rand.New(rand.NewPCG(seed, uint64(i)))}
		// The file names its image, which is known once it is pushed: the registry's address comes first.
		d.ref = push(t, r, name+":0", base)
		d.ref = push(t, r, name+":1", base, layer(t, payload(name, "data", 90000),
			image.File("own", strings.TrimSuffix(d.ref, ":0")+":1")))
		clients = append(clients, d)
		eg.Go(func() error {
			for range 12 {
				if err := d.step(t); err != nil {
					return fmt.Errorf("%s: %w", d.ref, err)
				}
			}
			return nil
		})
	}
	must(t, eg.Wait())
	fsck(t, n, 0)
	for _, d := range clients {
		if d.pulled {
			_, err := n.Ctr(testContext(t), "image", "rm", "--sync", d.ref)
			must(t, err)
		}
		pull(t, n, node.Snapshotter, d.ref)
	}
	last := layer(t, payload("drop", "last", 90000))
	pull(t, n, node.Snapshotter, push(t, r, "last:1", base, last))
	eventually(t, "the blobs of a pull to go", func() bool { return !has(t, n, node.Namespace, last)[0] })
	for _, d := range clients {
		out, err := n.Run(testContext(t), node.Snapshotter, d.ref, "/bin/cat", "/own")
		if err != nil || !strings.Contains(out, d.ref) {
			t.Errorf("%s: %q, %v", d.ref, out, err)
		}
	}
	trim(t, n)
	if left := layerFiles(t, n); left != 0 {
		t.Errorf("%d blobs of layers are left", left)
	}
	fsck(t, n, 0)
}

// A blob is gone only when its layer is whole on the disk, whenever the daemon is killed.
func TestTrimKilled(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := busybox(t)
	var refs []string
	for i := range 5 {
		name := fmt.Sprint("killed", i)
		own := layer(t, payload(name, "data", 90000), image.File("own", name))
		refs = append(refs, push(t, r, name+":1", base, own))
		pulled := make(chan error, 1)
		go func() { pulled <- n.Pull(testContext(t), node.Snapshotter, refs[i]) }()
		if i%2 == 0 { // else the kill comes while it is pulled, too
			must(t, <-pulled)
			pulled <- nil
		}
		trimmed := make(chan bool)
		go func() {
			defer close(trimmed)
			_, _ = dedupctl(t, n, "trim")
		}()
		time.Sleep(time.Duration(i*15) * time.Millisecond)
		must(t, n.KillDaemon())
		<-trimmed
		must(t, n.StartDaemon(testContext(t)))
		if err := <-pulled; err != nil {
			pull(t, n, node.Snapshotter, refs[i])
		}
		fsck(t, n, 0)
	}
	trim(t, n)
	if left := layerFiles(t, n); left != 0 {
		t.Errorf("%d blobs of layers are left", left)
	}
	for i, ref := range slices.Backward(refs) {
		out, err := n.Run(testContext(t), node.Snapshotter, ref, "/bin/cat", "/own")
		if err != nil || !strings.Contains(out, fmt.Sprint("killed", i)) {
			t.Errorf("%s: %q, %v", ref, out, err)
		}
	}
}
