package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// calls counts calls that failed, and how long those took that pulls, starts and builds wait for. No label has a
// value that a client chooses.
type calls struct {
	errors  *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

// timed are the calls of which the time is measured.
var timed = []string{"Prepare", "Mounts", "Commit", "Apply", "Diff"}

// buckets are in seconds. 0.5 s is how long Prepare waits for what lies below a container.
var buckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

func newCalls() calls {
	c := calls{
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dedup_grpc_errors_total",
			Help: "Calls that ended with an error, by method and gRPC code. A known layer in Prepare is none.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "dedup_grpc_seconds",
			Help:    "How long calls took that pulls, container starts and builds wait for, by method.",
			Buckets: buckets,
		}, []string{"method"}),
	}
	for _, method := range timed {
		c.seconds.WithLabelValues(method)
	}
	return c
}

func (c calls) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	began := time.Now()
	resp, err := handler(ctx, req)
	c.count(info.FullMethod, time.Since(began), err)
	return resp, err
}

func (c calls) stream(
	srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) error {
	began := time.Now()
	err := handler(srv, stream)
	c.count(info.FullMethod, time.Since(began), err)
	return err
}

func (c calls) count(method string, took time.Duration, err error) {
	name := method[strings.LastIndexByte(method, '/')+1:]
	if slices.Contains(timed, name) {
		c.seconds.WithLabelValues(name).Observe(took.Seconds())
	}
	// This is how Prepare serves what is known.
	if code := status.Code(err); err != nil && (name != "Prepare" || code != codes.AlreadyExists) {
		c.errors.WithLabelValues(name, code.String()).Inc()
	}
}
