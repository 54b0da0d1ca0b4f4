package node

import (
	"bytes"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process that does not end is killed, and the error says where it hung.
func TestHung(t *testing.T) {
	if os.Getenv("DEDUP_TEST_HANGS") != "" {
		hangHere()
	}
	log := filepath.Join(t.TempDir(), "log")
	p, err := startProcess("hanging", log, append(os.Environ(), "DEDUP_TEST_HANGS=1"), os.Args[0], "-test.run=^TestHung$")
	if err != nil {
		t.Fatal(err)
	}
	for {
		if data, err := os.ReadFile(log); err == nil && bytes.Contains(data, []byte("hanging now")) {
			break
		}
		if !p.running() {
			t.Fatal("it ended: " + p.logTail(40))
		}
		time.Sleep(time.Millisecond)
	}
	err = p.stop(unix.SIGTERM, time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "hanging did not end within 1ms of terminated") ||
		!strings.Contains(err.Error(), "node.hangHere(") {
		t.Errorf("the error is %v", err)
	}
	if p.running() {
		t.Error("it runs on")
	}
}

func hangHere() {
	signal.Ignore(unix.SIGTERM)
	var m sync.Mutex
	m.Lock()
	go func() { time.Sleep(time.Hour) }() // else the runtime sees that nothing can go on
	fmt.Println("hanging now")
	m.Lock()
}

// Only the deadlock that is containerd's own is taken for it.
func TestIsContainerdsDeadlock(t *testing.T) {
	const (
		lock     = "sync.(*RWMutex).Lock(0x0)\n\tsync/rwmutex.go:150 +0x32\n"
		v2       = "github.com/containerd/containerd/v2/"
		closes   = v2 + "core/metadata.(*DB).Close(0xc000)\n"
		stops    = v2 + "cmd/containerd/server.(*Server).Stop(0xc000)\n"
		starts   = v2 + "core/mount/manager.(*mountManager).StartCollection(0xc000, {0xc000, 0xc000})\n"
		collects = v2 + "core/metadata.(*DB).GarbageCollect(0xc000, {0xc000, 0xc000})\n"
		runs     = v2 + "plugins/gc.(*gcScheduler).run(0xc000, {0xc000, 0xc000})\n"
		removes  = v2 + "core/snapshots/proxy.(*proxySnapshotter).Remove(0xc000)\n"
	)
	g := func(frames ...string) string {
		return "goroutine 1 gp=0xc000 m=nil [sync.Mutex.Lock]:\n" + strings.Join(frames, "")
	}
	for _, row := range []struct {
		name  string
		stack []string
		want  bool
	}{
		{"both wait", []string{g(lock, starts, collects, runs), g(lock, closes, stops)}, true},
		{"the other way round", []string{g(lock, closes, stops), g(), g(lock, starts, collects, runs)}, true},
		{"no collection", []string{g(lock, closes, stops)}, false},
		{"the stop does not wait for it", []string{g(lock, starts, collects, runs), g(lock, stops)}, false},
		{"the collection goes on", []string{g(starts, collects, runs), g(lock, closes, stops)}, false},
		{"the collection waits for a snapshotter", []string{g(removes, collects, runs), g(lock, closes, stops)}, false},
		{"nothing", nil, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := isContainerdsDeadlock(strings.Join(row.stack, "\n\n")); got != row.want {
				t.Errorf("%v, want %v", got, row.want)
			}
		})
	}
}
