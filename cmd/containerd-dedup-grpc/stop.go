package main

import (
	"context"
	"errors"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// stopTimeout is how long a stop waits for running calls before it cuts them off.
const stopTimeout = 5 * time.Second

// repeatable are calls that may run for minutes, and that a stop ends at once. What an Apply has stored by then is
// removed, since no tree names it; a check only reads, and each of its repairs is whole by itself. After the stop
// containerd cannot commit what an Apply gave: it finds no daemon, so its pull has to be repeated in any case.
var repeatable = []string{"/containerd.services.diff.v1.Diff/Apply", "/dedup.v1.Control/Check"}

var errStopping = status.Error(codes.Unavailable, "containerd-dedup-grpc is stopping: try again when it is back")

// untilStop ends repeatable calls as soon as stopping is done.
type untilStop struct{ stopping context.Context }

func (u untilStop) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any,
	error) {
	ctx, end := u.bound(ctx, info.FullMethod)
	defer end()
	resp, err := handler(ctx, req)
	return resp, said(ctx, err)
}

func (u untilStop) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo,
	handler grpc.StreamHandler) error {
	ctx, end := u.bound(stream.Context(), info.FullMethod)
	defer end()
	return said(ctx, handler(srv, boundStream{stream, ctx}))
}

func (u untilStop) bound(ctx context.Context, method string) (_ context.Context, end func()) {
	if !slices.Contains(repeatable, method) {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	unbind := context.AfterFunc(u.stopping, func() { cancel(errStopping) })
	return ctx, func() {
		unbind()
		cancel(nil)
	}
}

// said names the stop as the cause of a call's end.
func said(ctx context.Context, err error) error {
	if err == nil || !errors.Is(context.Cause(ctx), errStopping) {
		return err
	}
	return errStopping
}

// boundStream is a stream with another context.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s boundStream) Context() context.Context { return s.ctx }
