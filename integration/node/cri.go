package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRINamespace is the containerd namespace that CRI works in.
const CRINamespace = "k8s.io"

// CRI is the kubelet's side of containerd's socket.
type CRI struct {
	cri.ImageServiceClient
	cri.RuntimeServiceClient
	conn *grpc.ClientConn
}

// CRI connects to a node that was started with Options.CRI. The caller closes it.
func (n *Node) CRI(ctx context.Context) (*CRI, error) { return DialCRI(ctx, n.Address()) }

// DialCRI is CRI for any containerd's socket.
func DialCRI(ctx context.Context, socket string) (*CRI, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to CRI: %w", err)
	}
	c := &CRI{cri.NewImageServiceClient(conn), cri.NewRuntimeServiceClient(conn), conn}
	for {
		_, err := c.Status(ctx, &cri.StatusRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return c, nil
		}
		// The plugin comes up a little after the socket.
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return nil, errors.Join(fmt.Errorf("ask CRI for its status: %w", err), conn.Close())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Close ends the connection.
func (c *CRI) Close() error { return c.conn.Close() }

// Pull pulls an image as the kubelet does.
func (c *CRI) Pull(ctx context.Context, ref string) error {
	_, err := c.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return fmt.Errorf("CRI pull %s: %w", ref, err)
	}
	return nil
}
