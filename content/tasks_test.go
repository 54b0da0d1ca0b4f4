package content

import (
	"sync/atomic"
	"testing"
)

// Who waits while others begin sees what had begun before at its end.
func TestTasks(t *testing.T) {
	var tasks Tasks
	tasks.Wait()
	var ended atomic.Int64
	for i := range 1000 {
		more := make(chan struct{})
		go func() {
			tasks.Go(func() { ended.Add(1) })
			close(more)
		}()
		tasks.Go(func() { ended.Add(1) })
		tasks.Wait()
		if n := ended.Load(); n < int64(i)+1 {
			t.Fatalf("%d of %d have ended", n, i+1)
		}
		<-more
	}
	tasks.Wait()
	if n := ended.Load(); n != 2000 {
		t.Errorf("%d of 2000 have ended", n)
	}
}
