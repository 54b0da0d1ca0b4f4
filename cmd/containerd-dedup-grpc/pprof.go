package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"time"

	"github.com/containerd/log"
)

// checkPprofAddress refuses all but loopback addresses: profiles name what the daemon works on, and taking one costs
// CPU time.
func checkPprofAddress(address string) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().Unmap().IsLoopback() {
		return fmt.Errorf("pprof_address = %q: want a loopback IP address and a port, such as \"127.0.0.1:9742\"", address)
	}
	return nil
}

// servePprof answers with profiles of the daemon until stop.
func servePprof(ctx context.Context, address string) (stop func(), err error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	stop, err = serveHTTP(ctx, address, &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("pprof_address: %w", err)
	}
	log.G(ctx).Infof("profiles at http://%s/debug/pprof/", address)
	return stop, nil
}

// serveHTTP answers on an address until stop.
func serveHTTP(ctx context.Context, address string, server *http.Server) (stop func(), err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Errorf("serve %s", address)
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			log.G(ctx).WithError(err).Warnf("stop serving %s", address)
		}
		<-done
	}, nil
}
