package powercut

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter"
)

// event is what the workload tells the recorder.
type event struct {
	Kind     string // doing, done, removing, removed, kept, trimmed, failed
	Op       int    // of doing and done
	Snapshot snapshot
	Error    string
}

const workloadEnv = "DEDUP_POWERCUT_WORKLOAD"

// task is what the workload is to do.
type task struct {
	Dir, RunDir string // Dir is on the disk whose power is cut
	Seed        uint64
	// Part of the workload that this process is, from 0. Operations are numbered from First to Ops.
	Part       int
	First, Ops int
	Durability layer.Durability
	// Have is what clients know to be there.
	Have []snapshot
}

// TestWorkload is the process whose disk is recorded.
func TestWorkload(t *testing.T) {
	text := os.Getenv(workloadEnv)
	if text == "" {
		t.Skip("started by TestPowerCut alone")
	}
	var job task
	if err := json.Unmarshal([]byte(text), &job); err != nil {
		t.Fatal(err)
	}
	w := &workload{
		task: job, fidelity: content.Exact,
		events: json.NewEncoder(os.NewFile(3, "events")), answers: json.NewDecoder(os.NewFile(4, "answers")),
	}
	if err := w.run(t.Context()); err != nil {
		t.Error(err)
		if err := w.tell(event{Kind: "failed", Error: err.Error()}); err != nil {
			t.Error(err)
		}
	}
}

type workload struct {
	task
	ops atomic.Int64

	tellMu  sync.Mutex // guards events and answers
	events  *json.Encoder
	answers *json.Decoder

	restart  sync.RWMutex // held for reading by whoever uses what follows
	sn       *snapshotter.Snapshotter
	fidelity content.Fidelity
}

// tell returns when the recorder has noted at which operation of the disk it heard of e.
func (w *workload) tell(e event) error {
	w.tellMu.Lock()
	defer w.tellMu.Unlock()
	if err := w.events.Encode(e); err != nil {
		return err
	}
	var ok bool
	return w.answers.Decode(&ok)
}

func (w *workload) open(ctx context.Context) (err error) {
	w.sn, err = snapshotter.New(ctx, snapshotter.Options{
		Root: filepath.Join(w.Dir, "root"), RunDir: w.RunDir, Fidelity: w.fidelity, Durability: w.Durability,
	})
	return err
}

// run has two clients and a neighbour at work at the same time.
func (w *workload) run(ctx context.Context) error {
	if err := w.open(ctx); err != nil {
		return err
	}
	w.ops.Store(int64(w.First))
	stop, stopNeighbour := context.WithCancel(ctx)
	defer stopNeighbour()
	neighbour := make(chan error, 1)
	go func() { neighbour <- w.neighbour(stop) }()
	var g errgroup.Group
	for i := range 2 {
		c := &client{w: w, ns: fmt.Sprint("client", i), r: rand.New(rand.NewPCG(w.Seed, uint64(10+10*w.Part+i)))}
		for _, s := range w.Have {
			if s.Client == c.ns {
				c.have = append(c.have, s)
			}
		}
		g.Go(func() error {
			for int(w.ops.Load()) < w.Ops {
				if err := c.step(ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	stopNeighbour()
	return errors.Join(err, <-neighbour, w.sn.Close())
}

// neighbour is everyone else on the node: fsync and sync come at any moment, and with them parts of what the store
// is about to write.
func (w *workload) neighbour(ctx context.Context) error {
	f, err := os.Create(filepath.Join(w.Dir, "neighbour"))
	if err != nil {
		return err
	}
	defer f.Close()
	r := rand.New(rand.NewPCG(w.Seed, 9))
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(r.IntN(30)) * time.Millisecond):
		}
		if _, err := f.WriteAt([]byte("x"), r.Int64N(100_000)); err != nil {
			return err
		}
		if r.IntN(3) == 0 {
			err = unix.Syncfs(int(f.Fd()))
		} else {
			err = f.Sync()
		}
		if err != nil {
			return err
		}
	}
}

// client works in a containerd namespace of its own.
type client struct {
	w    *workload
	ns   string
	r    *rand.Rand
	have []snapshot
}

func (c *client) step(ctx context.Context) error {
	n := c.r.IntN(23)
	if n == 0 {
		return c.w.reopen(ctx, c.r)
	}
	c.w.restart.RLock()
	defer c.w.restart.RUnlock()
	ctx = namespaces.WithNamespace(ctx, c.ns)
	switch {
	case len(c.have) > 14 || n < 6:
		return c.remove(ctx)
	case n < 13:
		return c.pull(ctx)
	case n < 16:
		return c.build(ctx)
	case n < 17:
		return c.active(ctx)
	case n < 19:
		return c.view(ctx)
	case n < 20:
		return c.w.sn.Layers().Compact(ctx)
	case n < 22:
		return c.trim(ctx)
	}
	return c.w.sn.Cleanup(ctx)
}

// reopen is a stop of the daemon and a start, often with another setting.
func (w *workload) reopen(ctx context.Context, r *rand.Rand) error {
	w.restart.Lock()
	defer w.restart.Unlock()
	if err := w.sn.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	w.fidelity = []content.Fidelity{content.Exact, content.Python, content.Normalized}[r.IntN(3)]
	return w.open(ctx)
}

// do runs fn between two events. fn returns the name of the snapshot that it made.
func (c *client) do(s snapshot, fn func() (name string, err error)) error {
	op := int(c.w.ops.Add(1))
	s.Client = c.ns
	if err := c.w.tell(event{Kind: "doing", Op: op, Snapshot: s}); err != nil {
		return err
	}
	name, err := fn()
	if err != nil {
		return fmt.Errorf("%+v: %w", s, err)
	}
	s.Name, s.Suffix = name, ""
	if !slices.ContainsFunc(c.have, func(o snapshot) bool { return o.Name == name }) {
		c.have = append(c.have, s)
	}
	return c.w.tell(event{Kind: "done", Op: op, Snapshot: s})
}

// parent is nothing, or a committed snapshot.
func (c *client) parent() string {
	if len(c.have) == 0 || c.r.IntN(3) == 0 {
		return ""
	}
	if s := c.have[c.r.IntN(len(c.have))]; !s.Active {
		return s.Name
	}
	return ""
}

// recipe is new, or one that others use too, or nearly.
func (c *client) recipe() recipe {
	if c.r.IntN(2) == 0 {
		return recipe{Seed: c.r.Uint64()}
	}
	n := c.r.Uint64N(12)
	return recipe{Seed: c.w.Seed + n, Variant: c.r.IntN(3), Big: n == 0}
}

func chainOf(name string) (content.ChainID, bool) {
	last := name[strings.LastIndexByte(name, '/')+1:]
	if !strings.HasPrefix(last, "sha256:") {
		return content.ChainID{}, false
	}
	sum, err := content.ParseSum(last)
	return content.ChainID{Sum: sum}, err == nil
}

// pull is an extraction, in one of the ways in which containerd asks for it. What is known is served at once.
func (c *client) pull(ctx context.Context) error {
	s := snapshot{Parent: c.parent(), Recipe: c.recipe(), Fidelity: c.w.fidelity}
	blob, err := s.Recipe.tar()
	if err != nil {
		return err
	}
	diff := content.DiffID{Sum: content.Sum(digestOf(blob))}
	below, ok := chainOf(s.Parent)
	labels := map[string]string{}
	chain := below.Chain(diff)
	if ok || s.Parent == "" {
		labels["containerd.io/snapshot.ref"] = chain.Digest().String()
		labels["containerd.io/snapshot/diff-id"] = diff.Digest().String()
		s.Suffix = "/" + chain.Digest().String()
	}
	own := fmt.Sprintf("%s/%d/%s", c.ns, c.w.ops.Load(), chain.Digest())
	if !ok && s.Parent != "" { // the parent was built: nobody knows its chainID
		own = fmt.Sprintf("%s/%d/pulled", c.ns, c.w.ops.Load())
	}
	s.Name = own
	prepareOn := s.Parent
	if ok && c.r.IntN(3) == 0 { // containerd 2.4 names the parent at Commit
		labels["containerd.io/snapshot/parent-chain-id"] = below.Digest().String()
		prepareOn = ""
	}
	return c.do(s, func() (string, error) {
		key := fmt.Sprintf("%s/extract-%d-%x", c.ns, c.w.ops.Load(), c.r.Uint64())
		mounts, err := c.w.sn.Prepare(ctx, key, prepareOn, snapshots.WithLabels(labels))
		if errdefs.IsAlreadyExists(err) {
			return c.adopted(ctx, s.Parent, chain)
		}
		if err != nil {
			return "", fmt.Errorf("prepare: %w", err)
		}
		if !slices.Contains(mounts[0].Options, "ro") {
			if err := ingest(ctx, c.w.sn, mounts, blob); err != nil {
				return "", err
			}
		}
		opts := []snapshots.Opt{snapshots.WithLabels(labels)}
		if prepareOn != s.Parent {
			opts = append(opts, snapshots.WithParent(s.Parent))
		}
		return own, c.w.sn.Commit(ctx, own, key, opts...)
	})
}

// adopted finds a hit as containerd does. The same layer may also have come by a pull.
func (c *client) adopted(ctx context.Context, parent string, chain content.ChainID) (name string, err error) {
	filter := fmt.Sprintf(`labels."containerd.io/snapshot.ref"==%s,parent==%q`, chain.Digest(), parent)
	err = c.w.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted && strings.Contains(info.Name, "/known-") {
			name = info.Name
		}
		return nil
	}, filter)
	if err == nil && name == "" {
		err = errors.New("a known layer was promised, and is not there")
	}
	return name, err
}

// ingest is what the diff service does.
func ingest(ctx context.Context, sn *snapshotter.Snapshotter, mounts []mount.Mount, blob []byte) error {
	upper, ok, err := sn.Extraction(ctx, mounts)
	if err != nil || !ok {
		return fmt.Errorf("is no extraction (%v): %w", ok, err)
	}
	in, err := sn.Layers().IngestBlob(ctx,
		layer.Blob{Digest: digest.FromBytes(blob), Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(blob)), nil
		}})
	if err != nil {
		return err
	}
	return sn.Applied(ctx, upper, in)
}

func digestOf(b []byte) content.Sum {
	sum, err := content.ParseSum(digest.FromBytes(b).String())
	if err != nil {
		panic(err) // it is a digest
	}
	return sum
}

// build is a directory that somebody else filled, and that is ingested after its commit.
func (c *client) build(ctx context.Context) error {
	// a restart may change it before the ingest
	s := snapshot{Parent: c.parent(), Recipe: c.recipe(), Fidelity: content.Normalized}
	s.Recipe.Plain = true
	s.Name = fmt.Sprintf("%s/%d-%x/built", c.ns, c.w.ops.Load(), c.r.Uint64())
	return c.do(s, func() (string, error) {
		key := s.Name + "-active"
		mounts, err := c.w.sn.Prepare(ctx, key, s.Parent)
		if err != nil {
			return "", fmt.Errorf("prepare: %w", err)
		}
		upper := ""
		for _, o := range mounts[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = dir
			}
		}
		if err := s.Recipe.fill(upper); err != nil {
			return "", err
		}
		return s.Name, c.w.sn.Commit(ctx, s.Name, key)
	})
}

// active is a container that was created.
func (c *client) active(ctx context.Context) error {
	s := snapshot{Parent: c.parent(), Active: true}
	s.Name = fmt.Sprintf("%s/%d-%x/container", c.ns, c.w.ops.Load(), c.r.Uint64())
	return c.do(s, func() (string, error) {
		_, err := c.w.sn.Prepare(ctx, s.Name, s.Parent)
		return s.Name, err
	})
}

func (c *client) view(ctx context.Context) error {
	parent := c.parent()
	if parent == "" {
		return nil
	}
	key := fmt.Sprintf("%s/view-%x", c.ns, c.r.Uint64())
	if _, err := c.w.sn.View(ctx, key, parent); err != nil {
		return fmt.Errorf("view: %w", err)
	}
	return c.w.sn.Remove(ctx, key)
}

// trim asks which layers need no blob any more. From then on nobody may have the blobs: no cut may harm these layers.
func (c *client) trim(ctx context.Context) error {
	stored, err := snapshotter.StoredLayers(ctx, c.w.sn)
	if err != nil {
		return err
	}
	for _, s := range c.have {
		chain, ok := chainOf(s.Name)
		if !ok || s.Active || s.Recipe.Plain {
			continue
		}
		blob, err := s.Recipe.tar()
		if err != nil {
			return err
		}
		if _, err := stored(c.ns, chain, content.DiffID{Sum: content.Sum(digestOf(blob))}); err != nil {
			continue
		}
		if err := c.w.tell(event{Kind: "trimmed", Snapshot: s}); err != nil {
			return err
		}
	}
	return nil
}

// remove takes a snapshot without children away.
func (c *client) remove(ctx context.Context) error {
	if len(c.have) < 4 {
		return nil
	}
	i := c.r.IntN(len(c.have))
	s := c.have[i]
	if slices.ContainsFunc(c.have, func(o snapshot) bool { return o.Parent == s.Name }) {
		return nil
	}
	c.w.ops.Add(1)
	if err := c.w.tell(event{Kind: "removing", Snapshot: s}); err != nil {
		return err
	}
	err := c.w.sn.Remove(ctx, s.Name)
	if errdefs.IsFailedPrecondition(err) { // it has a child, of which a process that was killed told nobody
		return c.w.tell(event{Kind: "kept", Snapshot: s})
	}
	if err != nil {
		return err
	}
	c.have = slices.Delete(c.have, i, i+1)
	return c.w.tell(event{Kind: "removed", Snapshot: s})
}
