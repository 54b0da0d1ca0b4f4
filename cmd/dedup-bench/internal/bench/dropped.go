package bench

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// recordNode keeps what images take of a node's disk: store, content store and databases. With blobs = "drop" that is
// c, without what goes when the blobs of these images are dropped. A subject that cannot drop blobs keeps them.
func (t *Trial) recordNode(ctx context.Context, scenario string, c cost, list []Image) error {
	if !t.wants(scenario) {
		return nil
	}
	t.record(scenario, "node's disk, blobs kept", "bytes", float64(c.disk.Bytes))
	freed, err := t.dropBlobs(ctx, list)
	if err != nil {
		return err
	}
	t.record(scenario, "node's disk, blobs dropped", "bytes", float64(c.disk.Bytes-freed))
	return nil
}

// dropBlobs has dedup drop the blobs of images, and returns what the file system has got back.
func (t *Trial) dropBlobs(ctx context.Context, list []Image) (freed int64, err error) {
	if t.Subject.Snapshotter != node.Snapshotter || t.Subject.Socket != "" {
		return 0, nil
	}
	conn, err := grpc.NewClient("unix://"+t.DedupAddress(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	before, err := t.settledDisk()
	if err != nil {
		return 0, err
	}
	req := &dedupv1.TrimRequest{Namespace: node.Namespace, WaitSeconds: 60}
	for _, img := range list {
		req.Images = append(req.Images, img.Ref)
	}
	if _, err := dedupv1.NewControlClient(conn).Trim(ctx, req); err != nil {
		return 0, fmt.Errorf("drop blobs: %w", err)
	}
	after, err := t.settledDisk()
	return before.Bytes - after.Bytes, err
}

func (t *Trial) settledDisk() (rootfs.Used, error) {
	if err := syncfs(t.disk); err != nil {
		return rootfs.Used{}, err
	}
	return diskUsed(t.disk)
}

// fetchBlobs brings back what dropBlobs dropped, for what is measured next.
func (t *Trial) fetchBlobs(ctx context.Context, list []Image) error {
	for _, img := range list {
		if _, err := t.Ctr(ctx, "content", "fetch", "--plain-http", img.Ref); err != nil {
			return err
		}
	}
	return syncfs(t.disk)
}
