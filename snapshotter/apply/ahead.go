package apply

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// containerd downloads an image's layers side by side but applies them one after the other, and
// one gzip stream keeps one core busy. So while a layer is applied, the layers above it
// are ingested ahead as soon as their blobs have arrived: their own Apply then finds
// them known, or joins.
const (
	// aheadIdle ends a run ahead after the last Apply of its image, and frees what nobody asked for.
	aheadIdle = 10 * time.Second
	// aheadPoll is how often the content store is asked for blobs that are still on their way.
	aheadPoll = 15 * time.Millisecond
	// aheadWindow is how many missing blobs one look asks for.
	aheadWindow = 4
)

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
		} else if a.ahead.ctx.Err() == nil {
			at := slices.IndexFunc(img.Layers, func(l ocispec.Descriptor) bool { return l.Digest == blob })
			a.startRun(ctx, key, img.Layers[at+1:])
		}
		a.ahead.mu.Unlock()
	}
}

// startRun is called under ahead.mu.
func (a *Applier) startRun(ctx context.Context, key runKey, layers []ocispec.Descriptor) {
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(a.ahead.ctx, cancel)
	idle := time.AfterFunc(aheadIdle, cancel)
	a.ahead.runs[key] = idle
	a.ahead.wg.Go(func() {
		defer stop()
		a.runAhead(runCtx, layers)
		a.ahead.mu.Lock()
		defer a.ahead.mu.Unlock()
		idle.Stop()
		delete(a.ahead.runs, key)
	})
}

// runAhead ingests layers, in order as they arrive. It keeps each until somebody else takes it
// up, and none longer than ctx.
func (a *Applier) runAhead(ctx context.Context, layers []ocispec.Descriptor) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards held
		held  []content.LayerID
		slots = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))
	)
	defer func() {
		wg.Wait()
		a.handOver(ctx, held)
	}()
	for len(layers) > 0 {
		arrived := -1
		var blob layer.Blob
		for i := range min(aheadWindow, len(layers)) {
			var err error
			if blob, err = a.blobs.Blob(ctx, layers[i]); err == nil {
				arrived = i
				break
			}
		}
		if arrived < 0 {
			select {
			case <-time.After(aheadPoll):
				continue
			case <-ctx.Done():
				return
			}
		}
		desc := layers[arrived]
		layers = slices.Concat(layers[:arrived], layers[arrived+1:])
		if !images.IsLayerType(desc.MediaType) || !archive.KnownMediaType(desc.MediaType) {
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			blob.Ahead = true
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
