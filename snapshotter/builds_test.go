package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// slowMerge holds merges up until it is let go, or they are cancelled.
type slowMerge struct {
	begun, cancelled atomic.Int32
	started          chan struct{} // one for each that has begun
	goOn             chan struct{}
}

func slowDown(s *Snapshotter) *slowMerge {
	g := &slowMerge{started: make(chan struct{}, 100), goOn: make(chan struct{})}
	merge := s.merge
	s.merge = func(ctx context.Context, chain []content.LayerID) (*tree.Node, error) {
		g.begun.Add(1)
		g.started <- struct{}{}
		select {
		case <-g.goOn:
			return merge(ctx, chain)
		case <-ctx.Done():
			g.cancelled.Add(1)
			return nil, context.Cause(ctx)
		}
	}
	s.belowPatience = 20 * time.Millisecond
	return g
}

// unbuilt is a snapshotter with an image whose chain image is not built.
func unbuilt(t *testing.T) (s *Snapshotter, g *slowMerge, name string) {
	t.Helper()
	s = openWith(t, contentStore(t), false)
	g = slowDown(s)
	s.belowPatience = time.Minute
	name, _ = unpack(t, s, "one", "", layerTar(t, map[string]string{"a": payload("a")}), nil)
	s.abandon(name, func(context.Context) {})
	s.belowPatience = 20 * time.Millisecond
	return s, g, name
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still not: %s", what)
}

// Prepare does not wait long for a chain image: it answers what nobody can mount yet, and Mounts waits.
func TestPrepareDoesNotWait(t *testing.T) {
	s, g, name := unbuilt(t)
	ctx := ns(t, "one")
	mounts, err := s.Prepare(ctx, "c", name)
	if err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	if err := mount.All(mounts, target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not built yet mounts: %v", err)
	}
	if u, err := s.Usage(ctx, "c"); err != nil || u.Size != 0 {
		t.Error(u, err)
	}
	if b := s.Builds(); b.Running != 1 || b.Oldest.IsZero() || b.Bytes == 0 {
		t.Errorf("in work: %+v", b)
	}
	ready := make(chan error, 1)
	go func() {
		m, err := s.Mounts(ctx, "c")
		mounts = m
		ready <- err
	}()
	select {
	case err := <-ready:
		t.Fatalf("Mounts does not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(g.goOn)
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		data, err := os.ReadFile(filepath.Join(root, "a"))
		if string(data) != payload("a") {
			t.Errorf("a has %d bytes", len(data))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := g.begun.Load(); n != 1 {
		t.Errorf("%d merges", n)
	}
	if err := s.Remove(ctx, "c"); err != nil {
		t.Error(err)
	}
	if b := s.Builds(); b.Running != 0 {
		t.Errorf("in work: %+v", b)
	}
}

// A view waits: its clients mount what they are told, and do not ask again.
func TestViewWaits(t *testing.T) {
	s, g, name := unbuilt(t)
	time.AfterFunc(100*time.Millisecond, func() { close(g.goOn) })
	if got := files(t, s, ns(t, "one"), name); got["a"] != payload("a") {
		t.Errorf("shows %d files", len(got))
	}
}

// A snapshot that is committed without ever having been mounted shows what its parent shows.
func TestCommitBeforeMounts(t *testing.T) {
	s, g, name := unbuilt(t)
	ctx := ns(t, "one")
	if _, err := s.Prepare(ctx, "c", name); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { close(g.goOn) })
	if err := s.Commit(ctx, "top", "c"); err != nil {
		t.Fatal(err)
	}
	s.belowPatience = belowPatience
	if got := files(t, s, ctx, "top"); got["a"] != payload("a") {
		t.Errorf("shows %d files", len(got))
	}
}

// A build goes on while anybody waits for it, and stops soon after.
func TestBuildStopsWhenNobodyWaits(t *testing.T) {
	s, g, name := unbuilt(t)
	ctx := ns(t, "one")
	chain, err := s.resolve(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	var cancels []context.CancelFunc
	gone := make(chan error, 2)
	for range 2 {
		one, cancel := context.WithCancel(ctx)
		cancels = append(cancels, cancel)
		go func() { gone <- s.chains.Build(one, chain, lower.Plain) }()
	}
	<-g.started
	eventually(t, "both wait", func() bool {
		return s.chains.Work().Waiters == 2
	})
	cancels[0]()
	if err := <-gone; !errors.Is(err, context.Canceled) || g.cancelled.Load() != 0 {
		t.Fatalf("%v; %d builds stopped", err, g.cancelled.Load())
	}
	cancels[1]()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "the build stops", func() bool { return g.cancelled.Load() == 1 })
	close(g.goOn)
	if err := s.chains.Build(ctx, chain, lower.Plain); err != nil || g.begun.Load() != 2 {
		t.Errorf("the next one: %v, after %d merges", err, g.begun.Load())
	}
}

// What Prepare did not wait for stops when its snapshot is removed, and leaves nothing mounted.
func TestBuildStopsWithItsSnapshot(t *testing.T) {
	s, g, name := unbuilt(t)
	ctx := ns(t, "one")
	if _, err := s.Prepare(ctx, "c", name); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the build stops", func() bool { return g.cancelled.Load() == 1 })
	s.wg.Wait()
	chain, err := s.resolve(ctx, name)
	if err != nil || s.chains.Users.IsUsed(s.chains.Name(chain, lower.Plain)) || s.Builds().Running > 0 {
		t.Errorf("still used, or in work: %+v, %v", s.Builds(), err)
	}
}

// Close does not wait for a build, nor for an ingest that somebody still wants.
func TestCloseStopsWork(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run")})
	if err != nil {
		t.Fatal(err)
	}
	g := slowDown(s)
	ctx := ns(t, "one")
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": payload("a")}), nil)
	<-g.started
	waiting := make(chan error, 2)
	go func() {
		_, err := s.Prepare(ctx, "c", name)
		if err == nil {
			_, err = s.Mounts(ctx, "c")
		}
		waiting <- err
	}()
	blocked := &blockedBlob{opened: make(chan struct{})}
	go func() {
		_, err := s.layers.IngestBlob(ctx, layer.Blob{Digest: digest.FromString("blocked"), Open: blocked.open})
		waiting <- err
	}()
	<-blocked.opened
	eventually(t, "the container waits", func() bool { return s.Builds().Running > 0 })
	if running := s.layers.Stats().Running; running.Count != 1 || running.Oldest.IsZero() {
		t.Errorf("in work: %+v", running)
	}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Close waits for work")
	}
	for range 2 {
		if err := <-waiting; err == nil {
			t.Error("work that was cut off ended well")
		}
	}
}

// blockedBlob is one that does not arrive.
type blockedBlob struct{ opened chan struct{} }

func (b *blockedBlob) open(ctx context.Context) (io.ReadCloser, error) {
	close(b.opened)
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })
	return r, nil
}

// A blob at hand that takes longer than Prepare may is a miss; the Apply that follows joins its ingest. Without one
// the ingest stops.
func TestBlobAtHandThatTakesLong(t *testing.T) {
	blob := layerTar(t, map[string]string{"a": payload("a")})
	open := func(s *Snapshotter) (b layer.Blob, goOn chan struct{}, opened, stopped *atomic.Int32) {
		goOn, opened, stopped = make(chan struct{}), new(atomic.Int32), new(atomic.Int32)
		return layer.Blob{Digest: digest.FromBytes(blob), Open: func(ctx context.Context) (io.ReadCloser, error) {
			opened.Add(1)
			select {
			case <-goOn:
				return io.NopCloser(bytes.NewReader(blob)), nil
			case <-ctx.Done():
				stopped.Add(1)
				return nil, context.Cause(ctx)
			}
		}}, goOn, opened, stopped
	}
	t.Run("joined", func(t *testing.T) {
		s, ctx := openWith(t, contentStore(t), false), ns(t, "one")
		s.ingestPatience = 20 * time.Millisecond
		b, goOn, opened, _ := open(s)
		if _, err := s.ingestSoon(ctx, b); !errors.Is(err, errLate) {
			t.Fatal(err)
		}
		time.AfterFunc(20*time.Millisecond, func() { close(goOn) })
		in, err := s.layers.IngestBlob(ctx, b)
		if err != nil || opened.Load() != 1 {
			t.Fatalf("%v; opened %d times", err, opened.Load())
		}
		s.wg.Wait()
		s.layers.Release(in.Layer)
		s.layers.Wait()
		if n := len(s.layers.List()); n != 0 {
			t.Errorf("%d layers stay", n)
		}
	})
	t.Run("the client has gone", func(t *testing.T) {
		s, ctx := openWith(t, contentStore(t), false), ns(t, "one")
		short, cancel := context.WithCancel(ctx)
		b, _, opened, stopped := open(s)
		go func() {
			for opened.Load() == 0 {
				time.Sleep(time.Millisecond)
			}
			cancel()
		}()
		if _, err := s.ingestSoon(short, b); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		eventually(t, "the ingest stops", func() bool { return stopped.Load() == 1 && opened.Load() == 1 })
	})
}

// Close does not wait for a merge of many files, which is really at work.
func TestCloseDuringALargeMerge(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run")})
	if err != nil {
		t.Fatal(err)
	}
	const files = 50_000
	ctx, name := ns(t, "one"), ""
	for i := range 2 {
		many := map[string]string{}
		for k := range files {
			many[fmt.Sprintf("d/%06d", 2*k+i)] = ""
		}
		name, _ = unpack(t, s, "one", name, layerTar(t, many), nil)
		s.abandon(name, func(context.Context) {})
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := s.View(ctx, "v", name)
		waiting <- err
	}()
	eventually(t, "the image is being built", func() bool { return s.Builds().Running > 0 })
	if b := s.Builds().Bytes; b != (2*files+4)*lower.BuildEntryBytes {
		t.Errorf("the build is said to take %d bytes", b)
	}
	start := time.Now()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("Close took %v", took)
	}
	if err := <-waiting; err != nil && !errdefs.IsUnavailable(err) && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := mount.UnmountRecursive(filepath.Join(root, "run"), 0); err != nil {
		t.Error(err)
	}
}

// Who waits for a chain image that somebody else builds can give up.
func TestGivingUpAChainImage(t *testing.T) {
	s, ctx := openWith(t, contentStore(t), false), ns(t, "one")
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": payload("a")}), nil)
	s.cancelBuild(name)
	s.wg.Wait() // what runs in the background looks at Step
	building, goOn := make(chan bool), make(chan bool)
	s.stepAt = func(step string) {
		if step == "chain.staged" {
			close(building)
			<-goOn
		}
	}
	built := make(chan error)
	go func() {
		_, err := s.View(ctx, "one/1/first", name)
		built <- err
	}()
	<-building
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := s.View(short, "one/1/view", name); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(goOn)
	if err := <-built; err != nil {
		t.Fatal(err)
	}
	if got := files(t, s, ctx, name); got["a"] != payload("a") {
		t.Errorf("shows %d files", len(got))
	}
}
