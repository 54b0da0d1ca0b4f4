package apply

import (
	"context"
	"encoding/json"
	"runtime"
	"slices"
	"sync"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
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
	manifests, err := a.manifestsOf(ctx, blob)
	if err != nil {
		log.G(ctx).WithError(err).Debug("look for the image of a layer")
		return
	}
	for _, m := range manifests {
		key := runKey{namespace, m}
		a.ahead.mu.Lock()
		if idle := a.ahead.runs[key]; idle != nil {
			idle.Reset(aheadIdle)
		} else if a.ahead.ctx.Err() == nil {
			a.startRun(ctx, key, blob)
		}
		a.ahead.mu.Unlock()
	}
}

// startRun is called under ahead.mu.
func (a *Applier) startRun(ctx context.Context, key runKey, blob digest.Digest) {
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(a.ahead.ctx, cancel)
	idle := time.AfterFunc(aheadIdle, cancel)
	a.ahead.runs[key] = idle
	a.ahead.wg.Go(func() {
		defer stop()
		a.runAhead(runCtx, key.manifest, blob)
		a.ahead.mu.Lock()
		defer a.ahead.mu.Unlock()
		idle.Stop()
		delete(a.ahead.runs, key)
	})
}

// manifestsOf finds the manifests that name a blob, by the labels that keep
// containerd's garbage collector off it.
func (a *Applier) manifestsOf(ctx context.Context, blob digest.Digest) (found []digest.Digest, err error) {
	err = a.blobs.Walk(ctx, func(info ctdcontent.Info) error {
		for _, v := range info.Labels {
			if v == blob.String() {
				found = append(found, info.Digest)
				break
			}
		}
		return nil
	}, `labels."containerd.io/gc.ref.content.config"`)
	return found, err
}

// layersAfter returns the layers of a manifest above the given one.
func (a *Applier) layersAfter(ctx context.Context, manifest, blob digest.Digest) ([]ocispec.Descriptor, error) {
	b, err := ctdcontent.ReadBlob(ctx, a.blobs, ocispec.Descriptor{Digest: manifest})
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	for i, l := range m.Layers {
		if l.Digest == blob {
			return m.Layers[i+1:], nil
		}
	}
	return nil, nil
}

// runAhead ingests the layers above a blob, in order as they arrive. It keeps each until
// somebody else takes it up, and none longer than ctx.
func (a *Applier) runAhead(ctx context.Context, manifest, blob digest.Digest) {
	layers, err := a.layersAfter(ctx, manifest, blob)
	if err != nil {
		log.G(ctx).WithError(err).Debug("read the manifest of a layer")
	}
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
		var info ctdcontent.Info
		for i := range min(aheadWindow, len(layers)) {
			if info, err = a.blobs.Info(ctx, layers[i].Digest); err == nil {
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
		layers = append(layers[:arrived:arrived], layers[arrived+1:]...)
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
			in, err := a.ingest(ctx, desc, info)
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
