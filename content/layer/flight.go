package layer

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// flights lets callers that want the same blob at the same time share one ingest. The
// ingest runs on its own: it ends early only when every caller has gone.
type flights struct {
	wg content.Tasks

	mu     sync.Mutex // guards byBlob and the flights' waiters
	byBlob map[digest.Digest]*flight
}

type flight struct {
	waiters int
	cancel  context.CancelFunc
	done    chan struct{} // closed when out and err are set
	out     Ingested
	err     error
}

func (f *flights) init() { f.byBlob = map[digest.Digest]*flight{} }

// wait returns when no ingest is running.
func (f *flights) wait() { f.wg.Wait() }

// stop ends all ingests.
func (f *flights) stop() {
	f.mu.Lock()
	for _, fl := range f.byBlob {
		fl.cancel()
	}
	f.mu.Unlock()
	f.wait()
}

func (f *flights) do(ctx context.Context, blob digest.Digest, ingest func(context.Context) (Ingested, error),
	share func(Ingested, int)) (Ingested, error) {
	f.mu.Lock()
	fl := f.byBlob[blob]
	if fl == nil {
		fl = f.start(ctx, blob, ingest, share)
	}
	fl.waiters++
	f.mu.Unlock()

	select {
	case <-fl.done:
		return fl.out, fl.err
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-fl.done: // its hold is already counted for this caller
		return fl.out, fl.err
	default:
	}
	if fl.waiters--; fl.waiters == 0 {
		fl.cancel()
		// Who asks from now on starts anew instead of joining what is being cancelled.
		if f.byBlob[blob] == fl {
			delete(f.byBlob, blob)
		}
	}
	return Ingested{}, context.Cause(ctx)
}

func (f *flights) start(ctx context.Context, blob digest.Digest, ingest func(context.Context) (Ingested, error),
	share func(Ingested, int)) *flight {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	fl := &flight{cancel: cancel, done: make(chan struct{})}
	f.byBlob[blob] = fl
	f.wg.Go(func() {
		defer cancel()
		var out Ingested
		err := safely(func() (err error) {
			out, err = ingest(ctx)
			return err
		})
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.byBlob[blob] == fl {
			delete(f.byBlob, blob)
		}
		fl.out, fl.err = out, err
		if err == nil {
			share(out, fl.waiters)
		}
		close(fl.done)
	})
	return fl
}
