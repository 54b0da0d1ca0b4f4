package main

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
)

// maxSocketPath is sockaddr_un's, without the byte that ends it.
const maxSocketPath = 107

// maxAnswer bounds one answer; 100,000 layers are about 50 MB.
const maxAnswer = 64 << 20

// ask calls the daemon's control API.
func ask[T any](c *cli.Context, call func(context.Context, dedupv1.ControlClient) (T, error)) (out T, err error) {
	socket := address(c)
	conn, err := dial(c.Context, socket)
	if err != nil {
		return out, explainDial(socket, "containerd-dedup-grpc", "--address", err)
	}
	defer conn.Close()
	out, err = call(c.Context, dedupv1.NewControlClient(conn))
	if err != nil {
		return out, explainCall(socket, err)
	}
	return out, nil
}

// dial connects to a unix socket. It tries the socket first, since gRPC does not say why one
// could not be reached.
func dial(ctx context.Context, socket string) (*grpc.ClientConn, error) {
	if len(socket) > maxSocketPath {
		return nil, fmt.Errorf("its path has %d bytes, and that of a unix socket at most %d: "+
			"name it by a shorter one, such as a link",
			len(socket), maxSocketPath)
	}
	probe, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	probe.Close()
	return grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", addr)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
}

// explainDial says what to do about a socket that cannot be reached. unit serves it, flag names it.
func explainDial(socket, unit, flag string, err error) error {
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("permission denied on %s: it is root's alone; run as root (sudo dedupctl ...)", socket)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s does not run: no socket %s\n"+
			"  start it:  systemctl start %s  (its log: journalctl -u %s)\n"+
			"  or name the socket that its config sets:  %s", unit, socket, unit, unit, flag)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%s does not run: nobody listens on %s\n"+
			"  see why:   systemctl status %s; journalctl -u %s\n"+
			"  start it:  systemctl start %s", unit, socket, unit, unit, unit)
	}
	return fmt.Errorf("connect to %s at %s: %w", unit, socket, err)
}

func explainCall(socket string, err error) error {
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unimplemented:
		return fmt.Errorf("what listens on %s does not know this request: it is another service (check --address), "+
			"or an older daemon than this dedupctl %s (systemctl restart containerd-dedup-grpc)", socket, version)
	case codes.Unavailable:
		return fmt.Errorf("containerd-dedup-grpc went away while it was asked: systemctl status containerd-dedup-grpc")
	}
	return fmt.Errorf("containerd-dedup-grpc: %s", s.Message())
}
