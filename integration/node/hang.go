package node

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hung is the error of a process that did not end when it was told to.
type hung struct {
	name       string
	sig        unix.Signal
	grace      time.Duration
	log, stack string // the log's end, and what all goroutines did
}

func (e *hung) Error() string {
	return fmt.Sprintf("%s did not end within %s of %s and was killed\n%s\n--- its goroutines ---\n%s",
		e.name, e.grace, e.sig, e.log, e.stack)
}

// stackAndKill ends a process and returns what its goroutines did. SIGQUIT makes the Go runtime print them, whatever
// the program waits for. containerd's own dump, on SIGUSR1, is no help: its signals wait while it stops its plugins.
func (p *process) stackAndKill() string {
	var before int64
	if fi, err := os.Stat(p.log); err == nil {
		before = fi.Size()
	}
	_ = p.cmd.Process.Signal(unix.SIGQUIT)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	data, err := os.ReadFile(p.log)
	if err != nil || int64(len(data)) < before {
		return ""
	}
	return string(data[before:])
}

// isContainerdsDeadlock tells whether containerd hangs in a deadlock of its own, which it has since 2.3 with every
// snapshotter. It ends the mount manager before the metadata's database, while the first garbage collection may run:
//
//  1. The collection's mountManager.StartCollection finds mounts.db closed, and returns with its rwlock held.
//  2. The collection fails with "context canceled", and gcScheduler.run may try at once again.
//  3. StartCollection waits for that rwlock for ever. GarbageCollect holds the metadata's wlock.
//  4. Server.Stop waits for wlock in DB.Close.
func isContainerdsDeadlock(stack string) bool {
	var collects, stops bool
	for goroutine := range strings.SplitSeq(stack, "\n\n") {
		if !strings.Contains(goroutine, "sync.(*RWMutex).Lock") {
			continue
		}
		collects = collects || inOrder(goroutine, "manager.(*mountManager).StartCollection(",
			"metadata.(*DB).GarbageCollect(", "gc.(*gcScheduler).run(")
		stops = stops || inOrder(goroutine, "metadata.(*DB).Close(", "server.(*Server).Stop(")
	}
	return collects && stops
}

// inOrder tells whether text has all of parts, one after the other.
func inOrder(text string, parts ...string) bool {
	for _, part := range parts {
		_, rest, ok := strings.Cut(text, part)
		if !ok {
			return false
		}
		text = rest
	}
	return true
}
