package content

import "sync"

// Tasks is background work. Unlike a sync.WaitGroup it may be waited for while more begins. The zero value has none.
type Tasks struct {
	mu      sync.Mutex
	running int
	idle    chan struct{} // closed when running gets to 0; nil while it is
}

// Go runs fn in a goroutine of its own.
func (t *Tasks) Go(fn func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running++; t.running == 1 {
		t.idle = make(chan struct{})
	}
	go func() {
		defer t.done()
		fn()
	}()
}

func (t *Tasks) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running--; t.running == 0 {
		close(t.idle)
		t.idle = nil
	}
}

// Wait returns once nothing runs.
func (t *Tasks) Wait() {
	t.mu.Lock()
	idle := t.idle
	t.mu.Unlock()
	if idle != nil {
		<-idle
	}
}
