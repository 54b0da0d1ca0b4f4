package layer

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// lowPriority is the nice value of what nobody waits for.
const lowPriority = 15

// atLowPriority calls fn on a thread of its own, behind whatever else wants a processor. The thread ends with it, since
// a lower nice value cannot be had back.
func atLowPriority(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// On Linux this is of one thread. Where it is refused, fn is only less polite.
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), lowPriority)
		done <- fn()
	}()
	return <-done
}
