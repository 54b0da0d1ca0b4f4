package apply

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// containerd downloads an image's layers side by side, but applies them one after the other, each when its blob is
// whole; and one gzip stream keeps one core busy. So from the first Prepare of an image on, its layers are ingested
// ahead, while they are still on their way: their own Apply then finds them known, or joins.
const (
	// aheadIdle ends a run ahead after the last Apply of its image, and frees what nobody asked for.
	aheadIdle = 10 * time.Second
	// aheadPoll is how often the content store is asked for blobs that are still on their way.
	aheadPoll = 15 * time.Millisecond
	// aheadWindow is how many missing blobs one look asks for.
	aheadWindow = 4
	// arrivalWait is how long after a Prepare its blob may take to be on its way.
	arrivalWait = 5 * time.Second
	// arrivalPatience is how long a blob has to be on its way before it is read while it arrives. That costs a hash of it,
	// and its bytes come through the daemon: one that is there in a moment is better read as a file.
	arrivalPatience = 250 * time.Millisecond
)

// arrivals are blobs that are on their way, and since when that is known.
type arrivals map[digest.Digest]time.Time

// slow reports whether a blob that is on its way has been for long enough.
func (a arrivals) slow(d digest.Digest) bool {
	if a[d].IsZero() {
		a[d] = time.Now()
	}
	return time.Since(a[d]) > arrivalPatience
}

// ahead holds the runs, one for each manifest.
type ahead struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu   sync.Mutex             // guards runs
	runs map[runKey]*time.Timer // each cancels its run when it fires
}

type runKey struct {
	namespace string
	manifest  digest.Digest
}

func newAhead() *ahead {
	a := &ahead{runs: map[runKey]*time.Timer{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	return a
}

// close ends all runs.
func (a *ahead) close() {
	a.cancel()
	a.wg.Wait()
}

// missed starts the run for an image that is being pulled: one of whose layers is on its way right now.
func (a *Applier) missed(ctx context.Context, namespace string, chain content.ChainID) {
	images := a.blobs.Above(namespace, chain) // Prepare has just asked containerd for them
	if len(images) == 0 {
		return
	}
	ctx = namespaces.WithNamespace(a.ahead.ctx, namespace)
	a.ahead.wg.Go(func() {
		seen := arrivals{}
		for until := time.Now().Add(arrivalWait); time.Now().Before(until); {
			for _, img := range images {
				key := runKey{namespace, img.Manifest}
				if a.ahead.running(key) {
					return
				}
				first := img.Layers[img.At]
				if _, ok := a.blobs.Arriving(ctx, first, func() {}); ok && seen.slow(first.Digest) {
					a.ahead.mu.Lock()
					defer a.ahead.mu.Unlock()
					a.startRun(ctx, key, img.Layers[img.At:])
					return
				}
			}
			select {
			case <-time.After(aheadPoll):
			case <-ctx.Done():
				return
			}
		}
	})
}

func (a *ahead) running(key runKey) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.runs[key] != nil
}

// lookAhead starts or keeps alive the runs for the images that a blob belongs to.
func (a *Applier) lookAhead(ctx context.Context, namespace string, blob digest.Digest) {
	images, err := a.blobs.With(ctx, blob)
	if err != nil {
		log.G(ctx).WithError(err).Debug("look for the image of a layer")
		return
	}
	for _, img := range images {
		key := runKey{namespace, img.Manifest}
		a.ahead.mu.Lock()
		if idle := a.ahead.runs[key]; idle != nil {
			idle.Reset(aheadIdle)
		} else {
			at := slices.IndexFunc(img.Layers, func(l ocispec.Descriptor) bool { return l.Digest == blob })
			a.startRun(ctx, key, img.Layers[at+1:])
		}
		a.ahead.mu.Unlock()
	}
}

// startRun is called under ahead.mu.
func (a *Applier) startRun(ctx context.Context, key runKey, layers []ocispec.Descriptor) {
	if a.ahead.ctx.Err() != nil || a.ahead.runs[key] != nil {
		return
	}
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(a.ahead.ctx, cancel)
	idle := time.AfterFunc(aheadIdle, cancel)
	a.ahead.runs[key] = idle
	a.ahead.wg.Go(func() {
		defer stop()
		a.runAhead(runCtx, layers, func() { idle.Reset(aheadIdle) })
		a.ahead.mu.Lock()
		defer a.ahead.mu.Unlock()
		idle.Stop()
		delete(a.ahead.runs, key)
	})
}

func (a *Applier) next(ctx context.Context, layers []ocispec.Descriptor, seen arrivals, progress func()) (layer.Blob,
	int) {
	for i := range min(aheadWindow, len(layers)) {
		if blob, err := a.blobs.Blob(ctx, layers[i]); err == nil {
			blob.Ahead = true
			return blob, i
		}
		if blob, ok := a.blobs.Arriving(ctx, layers[i], progress); ok && seen.slow(layers[i].Digest) {
			return blob, i
		}
	}
	return layer.Blob{}, -1
}

// runAhead ingests layers, in order as they arrive. It keeps each until somebody else takes it
// up, and none longer than ctx, which progress keeps alive.
func (a *Applier) runAhead(ctx context.Context, layers []ocispec.Descriptor, progress func()) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards held
		held  []content.LayerID
		seen  = arrivals{}
		slots = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))
	)
	defer func() {
		wg.Wait()
		a.handOver(ctx, held)
	}()
	for len(layers) > 0 {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		var blob layer.Blob
		at := -1
		for at < 0 {
			if blob, at = a.next(ctx, layers, seen, progress); at >= 0 {
				break
			}
			select {
			case <-time.After(aheadPoll):
			case <-ctx.Done():
				return
			}
		}
		desc := layers[at]
		layers = slices.Concat(layers[:at], layers[at+1:])
		if !images.IsLayerType(desc.MediaType) || !archive.KnownMediaType(desc.MediaType) {
			<-slots
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			in, err := a.snapshots.Layers().IngestBlob(ctx, blob)
			if err != nil {
				log.G(ctx).WithError(err).Debug("ingest a layer ahead; its Apply will say what is wrong")
				return
			}
			mu.Lock()
			defer mu.Unlock()
			held = append(held, in.Layer)
		})
	}
}

// handOver gives layers back as soon as somebody else has taken them up, by Prepare or by Apply: removing
// an image right after its pull shall free its space.
func (a *Applier) handOver(ctx context.Context, held []content.LayerID) {
	for len(held) > 0 {
		held = slices.DeleteFunc(held, func(id content.LayerID) bool {
			if ctx.Err() == nil && a.snapshots.Layers().Taken(id) < 2 {
				return false
			}
			a.snapshots.Layers().Release(id)
			return true
		})
		select {
		case <-time.After(aheadPoll):
		case <-ctx.Done():
		}
	}
	<-ctx.Done()
}
