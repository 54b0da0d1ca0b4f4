package integration

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"

	store "github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// The kernel tells once that a write has failed, to whoever syncs first. All the same no layer comes in of which a part
// is not on the disk, and one that relies on what another ingest wrote is out of service until the bytes are there.
func TestFailedWriteOfAnotherIngest(t *testing.T) {
	t.Parallel()
	w := &world{ctx: testContext(t)}
	w.makeDisk(t, 0)
	root := t.TempDir()
	must(t, (&mount.Mount{Type: "ext4", Source: w.path, Options: []string{"loop", "errors=remount-ro"}}).Mount(root))
	t.Cleanup(func() { must(t, mount.UnmountAll(root, 0)) })
	limitRequests(t, root)

	var first atomic.Bool
	reached, goOn := make(chan struct{}), make(chan struct{})
	s, err := store.Open(w.ctx, store.Options{Root: root, Step: func(name string) {
		if name == "ingest.tree" && first.CompareAndSwap(false, true) {
			close(reached)
			<-goOn
		}
	}}, nil)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	ingest := func(l *image.Layer) (store.Ingested, error) {
		return s.IngestBlob(w.ctx, store.Blob{Digest: digest.Digest(l.Hash.String()), Size: l.Length,
			Open: func(context.Context) (io.ReadCloser, error) { return os.Open(l.File) }})
	}
	marked := image.File("marked", strings.Repeat(diskMark, 1000))
	writes, relies := layer(t, marked), layer(t, marked, image.File("more", "more"))

	w.disk.failMarked.Store(true)
	failed := make(chan error)
	go func() {
		_, err := ingest(writes)
		failed <- err
	}()
	<-reached
	// Another one syncs what the first has written. It may fail too, and is done again.
	other := layer(t, payload("sync", "other", 20_000))
	if _, err := ingest(other); err != nil {
		_, err = ingest(other)
		must(t, err)
	}
	in, err := ingest(relies) // its object is there
	must(t, err)
	close(goOn)
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "input/output error (the disk under ") {
		t.Errorf("the ingest whose write failed: %v", err)
	}
	if err := s.InService(in.Layer); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("the layer that relies on the write: %v", err)
	}
	w.disk.heal()
	_, err = ingest(writes)
	must(t, err)
	must(t, s.InService(in.Layer))
	if found, err := s.Check(w.ctx, func(int64, int64) {}); err != nil || len(found) > 0 {
		t.Errorf("%+v, %v", found, err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, "ingest/*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
