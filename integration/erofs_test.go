package integration

import (
	"testing"

	"github.com/containerd/containerd/v2/core/leases"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// The harness mounts snapshots of containerd's erofs while containerd collects garbage: a collection may take down a
// mount that is just being deactivated.
func TestErofsBesideCollection(t *testing.T) {
	t.Parallel()
	n := startNode(t, node.Options{})
	if !n.HasErofs() {
		t.Skip("needs mkfs.erofs 1.7 or newer")
	}
	ctx := testContext(t)
	ref := push(t, startRegistry(t), "app:1", busybox(t), layer(t, payload("erofs", "data", 100_000)))
	pull(t, n, "erofs", ref)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		m := n.Client().LeasesService()
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			l, err := m.Create(ctx, leases.WithRandomID())
			if err == nil {
				err = m.Delete(ctx, l, leases.SynchronousDelete)
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	for range 60 {
		must(t, n.Active(ctx, "erofs", ref, func(string) error { return nil }))
	}
	close(stop)
	must(t, <-done)
}
