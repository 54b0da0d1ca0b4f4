package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func testConfig(t *testing.T) Config {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: the daemon mounts EROFS and overlayfs")
	}
	dir := t.TempDir()
	c := defaultConfig()
	c.Root = filepath.Join(dir, "root")
	c.Address = filepath.Join(dir, "run", "s.sock")
	c.RunDir = filepath.Join(dir, "run")
	c.ContainerdAddress = filepath.Join(dir, "no-containerd.sock")
	return c
}

// start runs the daemon until the test or the returned stop ends it.
func start(t *testing.T, c Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c) }()
	t.Cleanup(cancel)
	for range 6000 {
		if conn, err := net.Dial("unix", c.Address); err == nil {
			conn.Close()
			return func() error { cancel(); return <-done }
		}
		select {
		case err := <-done:
			t.Fatal(err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatal("the daemon does not come up")
	return nil
}

// The daemon starts without containerd, tells systemd when it serves and when it stops, and
// its socket is root's alone.
func TestServe(t *testing.T) {
	c := testConfig(t)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"),
		Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", notify.LocalAddr().String())
	stop := start(t, c)
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		if err := notify.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := notify.Read(buf)
		if err != nil || !strings.Contains(string(buf[:n]), want) {
			t.Errorf("systemd is told %q, %v, want %s", buf[:n], err, want)
		}
	}
	expect("READY=1")
	for path, mode := range map[string]os.FileMode{c.Address: 0o600 | os.ModeSocket,
		filepath.Dir(c.Address): 0o700 | os.ModeDir, c.Root: 0o700 | os.ModeDir} {
		if fi, err := os.Stat(path); err != nil || fi.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode(), mode)
		}
	}
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := snapshotsapi.NewSnapshotsClient(conn).Prepare(t.Context(),
		&snapshotsapi.PrepareSnapshotRequest{Key: "k"}); err != nil {
		t.Error(err)
	}
	second := c
	second.Root = filepath.Join(t.TempDir(), "other")
	if err := serve(t.Context(), second); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("second daemon on one address: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	expect("STOPPING=1")
	// A killed daemon leaves its socket behind.
	if l, err := net.Listen("unix", c.Address); err == nil {
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
	}
	if err := start(t, c)(); err != nil {
		t.Error(err)
	}
}

// Nothing but a stale socket is removed to make room for ours.
func TestAddressIsAFile(t *testing.T) {
	c := testConfig(t)
	if err := os.MkdirAll(filepath.Dir(c.Address), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.Address, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := serve(t.Context(), c); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Error(err)
	}
	if b, err := os.ReadFile(c.Address); err != nil || string(b) != "precious" {
		t.Error(string(b), err)
	}
}
