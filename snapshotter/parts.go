package snapshotter

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// The parts of a Snapshotter, lowest first. Each embeds the parts that it needs, and no others.

// store is what is kept: the snapshots' records, their layers and chain images.
type store struct {
	root
	opts     Options
	db       *metaDB
	layers   *layer.Store
	chains   *lower.Chains
	kernel   lower.Kernel
	refs     *index // snapshot.ref -> names of committed snapshots
	ids      *index // id -> key of an active snapshot
	counters *counters
	limits   *limits
}

// reports tell what the store holds, and how it is mounted.
type reports struct{ *store }

// tasks are the work in the background.
type tasks struct {
	*store
	ctx    context.Context // of background work
	cancel context.CancelFunc
	wg     content.Tasks
	going  sync.Map // names below snapshots/ that are being removed, or are about to

	mu sync.Mutex // guards what follows, and the ingester's ingests
	// closed is set before the background work is waited for: none is started after.
	closed bool
	// jobs are what is about to be done, or being done, in the background for a snapshot, by its name: the building
	// of its chain image.
	jobs map[string]*buildJob
}

// ingester turns the directories of pending snapshots into layers. Who needs the layers of a snapshot waits for it.
type ingester struct {
	*tasks
	// ingests are the running ingests of pending snapshots, by id. Under mu.
	ingests map[string]*ingestJob
	// waiting are the names of steps that are not yet ingested, by id. Under mu.
	waiting  map[string]string
	steps    *steps
	stepIdle time.Duration
}

// known looks for the layers that need not be fetched, and sees which differ unpacks the others.
type known struct {
	*tasks
	ingestPatience time.Duration

	seen sync.Mutex // guards what follows
	// applied is set once our diff service has been used: extraction mounts then need no parent.
	applied bool
	onMiss  func(ctx context.Context, namespace string, chain content.ChainID)
	// advised is set once the log has told how to configure the diff service.
	advised bool
}

// health finds what is damaged or of no use, repairs and removes it.
type health struct {
	*ingester
	repairing sync.Mutex // held by who repairs layers
}

// mounter makes what lies below a snapshot, and the directories above that.
type mounter struct {
	*health
	known         *known
	belowPatience time.Duration
	mapped        atomic.Bool // see use
	restoring     sync.Mutex  // held by who makes an active snapshot's directories, or mounts a view over steps
}

// assemble puts the parts together. Nothing is opened yet.
func assemble(opts Options) *Snapshotter {
	st := &store{
		root: root{dir: opts.Root, runDir: opts.RunDir, stepAt: opts.Step}, opts: opts,
		refs: newIndex(), ids: newIndex(), counters: newCounters(),
	}
	st.limits = &limits{root: &st.root}
	work := &tasks{store: st, jobs: map[string]*buildJob{}}
	in := &ingester{
		tasks: work, ingests: map[string]*ingestJob{}, waiting: map[string]string{}, steps: newSteps(), stepIdle: stepIdle,
	}
	found := &known{tasks: work, ingestPatience: ingestPatience}
	checks := &health{ingester: in}
	s := &Snapshotter{
		store: st, tasks: work, ingester: in, known: found, health: checks, reports: &reports{st},
		mounter: &mounter{health: checks, known: found, belowPatience: belowPatience},
		opened:  make(chan struct{}),
	}
	s.lost.s = s
	return s
}

// background runs fn, and reports so, unless the Snapshotter is being closed.
func (t *tasks) background(fn func(context.Context)) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.wg.Go(func() { fn(t.ctx) })
	}
	return !t.closed
}

// stop ends the work in the background, and waits for it.
func (t *tasks) stop() {
	t.mu.Lock()
	t.closed = true
	for _, j := range t.jobs {
		j.stop()
	}
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
}
