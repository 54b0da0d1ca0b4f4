package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// IngestBlob stores a blob as a layer and returns it, held, once all of it is
// durable. The same blob asked for twice at the same time is ingested once; a
// caller whose ctx ends does not harm the others who wait. A blob that the store already
// knows is not opened at all.
func (s *Store) IngestBlob(ctx context.Context, b Blob) (Ingested, error) {
	if b.Late != nil { // nobody else can be waiting for it
		return ingestCounted(ctx, s, b)
	}
	if in, ok := s.LookupBlob(b.Digest); ok {
		return in, nil
	}
	in, err := s.ingestOnce(ctx, b)
	if errors.Is(err, ErrUnverified) && !b.Arriving {
		in, err = s.ingestOnce(ctx, b) // somebody had begun before it was whole
	}
	return in, err
}

func (s *Store) ingestOnce(ctx context.Context, b Blob) (Ingested, error) {
	return s.flights.do(ctx, b.Digest, func(ctx context.Context) (Ingested, error) {
		if in, ok := s.LookupBlob(b.Digest); ok {
			return in, nil
		}
		return ingestCounted(ctx, s, b)
	}, func(in Ingested, callers int) {
		for range callers - 1 {
			s.Hold(in.Layer)
		}
		if callers == 0 {
			s.Release(in.Layer)
		}
	})
}

func ingestCounted(ctx context.Context, s *Store, b Blob) (Ingested, error) {
	in, err := s.ingestBlob(ctx, b, goal{fidelity: s.fidelity})
	if err != nil {
		return Ingested{}, s.counters.failed(fmt.Errorf("ingest blob %s: %w", b.Digest, s.explain(err)))
	}
	return in, nil
}

// goal is what an ingest is to give.
type goal struct {
	fidelity content.Fidelity
	// layer is the only one that will do; zero for any.
	layer content.LayerID
}

// form is what trees are encoded with: one of their own is the same under python and normalized.
func form(f content.Fidelity) content.Fidelity {
	if f == content.Normalized {
		return content.Python
	}
	return f
}

func (s *Store) ingestBlob(ctx context.Context, b Blob, want goal) (Ingested, error) {
	clock, end := s.counters.begin()
	defer end()
	src, err := b.Open(ctx)
	if err != nil {
		return Ingested{}, err
	}
	defer src.Close()
	mem, err := s.budget.share(ctx, b.Arriving)
	if b.Arriving && err != nil {
		err = fmt.Errorf("%w: %w", ErrUnverified, err)
	}
	if err != nil {
		return Ingested{}, err
	}
	defer mem.end()
	plain, err := archive.Decompress(src, mem.keep)
	if err != nil {
		return Ingested{}, err
	}
	defer plain.Close()

	ss, err := s.newSession(ctx, want)
	if err != nil {
		return Ingested{}, err
	}
	ss.ahead, mem.ctx = b.Ahead, ss.ctx
	if b.Arriving {
		ss.bufferMax, ss.arrived = bufferMaxArriving, make([]byte, bufferMaxArriving)
	}
	st := newStream(plain)
	var entries []*content.Entry
	err = safely(func() (err error) {
		entries, err = archive.ReadTar(ss.ctx, st, ss, mem.keep)
		return err
	})
	err = st.finish(err)
	if v, ok := src.(Verifier); ok && err == nil {
		err = v.Verify()
	}
	if b.Arriving && err != nil && !errors.Is(err, ErrUnverified) {
		err = fmt.Errorf("%w: %w", ErrUnverified, err) // whoever has it whole finds out what is wrong
	}
	if werr := ss.wait(); werr != nil {
		err = werr
	}
	if b.Late != nil && err == nil {
		b.Digest, err = b.Late()
	}
	if err != nil {
		return Ingested{}, errors.Join(err, ss.end(nil))
	}
	clock.mark(stageRead)
	t := tree.Tar{DiffID: st.diffID, Fidelity: want.fidelity, Size: st.size}
	if b.Digest != "" {
		t.Blobs = append(t.Blobs, b.Digest)
	}
	in, err := s.finish(ss, entries, &t, clock)
	if err != nil {
		return Ingested{}, err
	}
	s.counters.ingested(ofBlobs, in, st.size, clock)
	log.G(ctx).WithFields(clock.fields()).WithFields(log.Fields{"blob": b.Digest, "bytes": st.size,
		"added": in.Added.Bytes}).Debug("ingested blob")
	return in, nil
}

// IngestDir stores a directory as a layer and returns it, held, once durable.
func (s *Store) IngestDir(ctx context.Context, d Dir) (Ingested, error) {
	clock, end := s.counters.begin()
	defer end()
	mem, err := s.budget.share(ctx, false)
	if err != nil {
		return Ingested{}, s.counters.failed(fmt.Errorf("ingest directory %s: %w", d.Upper, err))
	}
	defer mem.end()
	ss, err := s.newSession(ctx, goal{fidelity: s.fidelity})
	if err != nil {
		return Ingested{}, s.counters.failed(fmt.Errorf("ingest directory %s: %w", d.Upper, s.explain(err)))
	}
	entries, err := archive.ReadDir(ss.ctx, d.Upper, d.View, ss, mem.keep)
	if werr := ss.wait(); werr != nil {
		err = werr
	}
	if err != nil {
		return Ingested{}, s.counters.failed(fmt.Errorf("ingest directory %s: %w", d.Upper,
			s.explain(errors.Join(err, ss.end(nil)))))
	}
	clock.mark(stageRead)
	in, err := s.finish(ss, entries, nil, clock)
	if err != nil {
		return Ingested{}, s.counters.failed(fmt.Errorf("ingest directory %s: %w", d.Upper, s.explain(err)))
	}
	s.counters.ingested(ofDirs, in, sizes(entries), clock)
	return in, nil
}

// sizes adds up the sizes of regular files.
func sizes(entries []*content.Entry) (sum int64) {
	for _, e := range entries {
		sum += e.Size
	}
	return sum
}

// finish turns a session's entries into a durable, visible layer with one hold. It ends
// the session. t is nil for a directory.
func (s *Store) finish(ss *session, entries []*content.Entry, t *tree.Tar, clock *stages) (Ingested, error) {
	canonical, err := settlePython(ss.want.fidelity, entries, ss.bytecode.found, ss.restamp)
	if err != nil {
		return Ingested{}, errors.Join(err, ss.end(nil))
	}
	enc := tree.Encode(form(ss.want.fidelity), entries)
	if want := ss.want.layer; !want.IsZero() && enc.ID != want {
		return Ingested{}, errors.Join(fmt.Errorf("%w %s", errOtherLayer, enc.ID), ss.end(nil))
	}
	facts := tree.Facts{
		Layer:    enc.ID,
		Fidelity: form(ss.want.fidelity),
		Payload:  tree.PayloadDigest(entries, canonical),
		Entries:  int64(len(entries)),
		Bytes:    sizes(entries),
	}
	below := tree.BelowOf(entries)
	facts.Below = &below
	in := Ingested{Outcome: Same}
	if t != nil {
		facts.Tars, in.DiffID, in.TarSize = []tree.Tar{*t}, t.DiffID, t.Size
	}
	clock.mark(stageEncode)
	if ss.objects.Heals() {
		if _, err := ss.objects.Seal(); err != nil {
			return Ingested{}, errors.Join(err, ss.end(nil))
		}
		if err := s.heal(ss.ctx, ss.sync); err != nil {
			return Ingested{}, errors.Join(err, ss.end(nil))
		}
	}
	var ok bool
	if in.Layer, ok, err = s.reuse(enc.ID, facts); ok || err != nil {
		return in, errors.Join(err, ss.end(nil))
	}
	var counted bool
	in.Added, counted, err = s.publish(ss, enc, facts, clock)
	if errors.Is(err, errRaced) {
		in.Layer, _, err = s.reuse(enc.ID, facts)
		return in, errors.Join(err, ss.end(nil))
	}
	if err != nil {
		return Ingested{}, errors.Join(err, ss.end(nil))
	}
	in.Layer, in.Outcome = enc.ID, New
	keep := enc.Objects()
	if counted {
		keep = nil
	}
	if err := s.noteLeak(ss.end(keep)); err != nil {
		log.G(ss.ctx).WithError(err).Warn("objects that nothing names stay until the next start")
	}
	s.step("ingest.done")
	s.recheck(ss.ctx, enc.ID)
	return in, nil
}

// errOtherLayer means that a blob is not, or no longer, what a layer was made from.
var errOtherLayer = errors.New("the blob gives another layer,")

// reuse finds a layer that serves for the new one: the same tree, or under
// normalized the same payload. It holds it and notes the new tar.
func (s *Store) reuse(id content.LayerID, facts tree.Facts) (content.LayerID, bool, error) {
	s.mu.Lock()
	st := s.layers[id]
	if st != nil && st.damage != nil {
		st = nil
	} else if st == nil && s.fidelity == content.Normalized {
		for _, same := range s.payloads[facts.Payload] {
			if s.layers[same].facts.Fidelity == facts.Fidelity {
				id, st = same, s.layers[same]
				break
			}
		}
	}
	if st == nil {
		s.mu.Unlock()
		return content.LayerID{}, false, nil
	}
	st.hold()
	s.mu.Unlock()
	for _, t := range facts.Tars {
		if err := s.addTar(id, t); err != nil {
			s.Release(id)
			return content.LayerID{}, false, err
		}
	}
	return id, true, nil
}

// addTar notes another tar, or another blob of a known tar, in a held layer.
func (s *Store) addTar(id content.LayerID, t tree.Tar) error {
	s.factsMu.Lock()
	defer s.factsMu.Unlock()
	s.mu.RLock()
	facts := s.layers[id].facts
	s.mu.RUnlock()

	facts.Tars = slices.Clone(facts.Tars)
	i := slices.IndexFunc(facts.Tars, func(o tree.Tar) bool { return o.DiffID == t.DiffID && o.Fidelity == t.Fidelity })
	switch {
	case i < 0:
		facts.Tars = append(facts.Tars, t)
	case len(t.Blobs) == 0 || slices.Contains(facts.Tars[i].Blobs, t.Blobs[0]):
		return nil
	default:
		facts.Tars[i].Blobs = append(slices.Clone(facts.Tars[i].Blobs), t.Blobs...)
		t = facts.Tars[i]
	}
	old, err := os.ReadFile(s.treePath(id))
	if err != nil {
		return fmt.Errorf("note tar of layer: %w", err)
	}
	file, err := tree.WithFacts(old, facts)
	if err != nil {
		s.harm(context.Background(), id, Damage{Tree: err})
		return fmt.Errorf("note tar of layer %s: %w", id, err)
	}
	tmp, err := s.writeStaged("facts-", file, true)
	if err != nil {
		return err
	}
	s.step("facts.staged")
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := os.Rename(tmp, s.treePath(id)); err != nil {
		return fmt.Errorf("note tar of layer: %w", err)
	}
	s.step("facts.renamed")
	st := s.layers[id]
	st.facts = facts
	s.setFile(st, int64(len(file)))
	if st.damage == nil {
		s.insertTar(id, t)
	}
	return nil
}

// writeStaged writes a file into ingest/ and returns its path.
func (d *directory) writeStaged(prefix string, data []byte, sync bool) (string, error) {
	return d.stageFile(prefix, sync, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// stageFile has write make a file in ingest/ and returns its path.
func (d *directory) stageFile(prefix string, sync bool, write func(*os.File) error) (string, error) {
	f, err := os.CreateTemp(d.path(dirIngest), prefix)
	if err != nil {
		return "", fmt.Errorf("stage file: %w", err)
	}
	err = write(f)
	if err == nil && sync {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("stage file: %w", err), os.Remove(f.Name()))
	}
	return f.Name(), nil
}

func (s *Store) publish(ss *session, enc tree.Encoded, facts tree.Facts, clock *stages) (used Usage, counted bool,
	err error) {
	sealed, err := ss.objects.Seal()
	if err != nil {
		return Usage{}, false, err
	}
	var size int64
	tmp, err := s.stageFile("tree-", false, func(f *os.File) (err error) {
		size, err = enc.Write(f, func(length int64) tree.Facts {
			used = Usage{Bytes: sealed.Bytes + content.Blocks(length), Inodes: sealed.Files + 1}
			facts.UsedBytes, facts.UsedInodes = used.Bytes, used.Inodes
			return facts
		})
		return err
	})
	if err != nil {
		return Usage{}, false, err
	}
	s.step("ingest.tree")
	clock.mark(stageTree)
	// One sync covers the objects that this session wrote, those of others that it
	// relies on, and the tree.
	if err := ss.makeDurable(); err != nil {
		return Usage{}, false, errors.Join(err, os.Remove(tmp))
	}
	s.step("ingest.synced")
	clock.mark(stageSync)
	s.objects.Packs().MeasureDirectories()
	if counted, err = s.commit(enc.ID, tmp, facts, size, ss.ahead); err != nil {
		return Usage{}, false, err
	}
	s.step("ingest.committed")
	s.wakeKeeper()
	s.noteWritten()
	return used, counted, nil
}

func (s *Store) commit(id content.LayerID, tmp string, facts tree.Facts, size int64, ahead bool) (counted bool,
	err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.layers[id]
	if old != nil && old.damage == nil {
		return false, errors.Join(errRaced, os.Remove(tmp))
	}
	if old != nil && old.damage.Tree != nil {
		_ = os.RemoveAll(s.treePath(id)) // it may not even be a file
	}
	if err := os.Rename(tmp, s.treePath(id)); err != nil {
		return false, errors.Join(fmt.Errorf("commit layer %s: %w", id, err), os.Remove(tmp))
	}
	s.step("ingest.renamed")
	if s.opts.Durability == Strict {
		if err := syncDir(s.path(dirLayers)); err != nil {
			if old == nil {
				err = errors.Join(err, os.Remove(s.treePath(id))) // what it names goes too
			}
			return false, fmt.Errorf("commit layer %s: %w", id, err)
		}
	}
	st := &state{facts: facts, holds: 1, taken: 1, counted: true, ahead: ahead, fresh: old == nil}
	if old != nil {
		counted = old.counted
		st.holds, st.taken, st.claimed = old.holds+1, old.taken+1, old.claimed
		s.forget(id, old)
	}
	s.insert(id, st, size)
	return counted, nil
}

// errRaced means that another ingest committed the same tree a moment earlier.
var errRaced = errors.New("the same layer was committed by another ingest")

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// The parts of an ingest, as the log and Stats name them; docs/performance.md says what each is.
const (
	stageRead   = "read"
	stageEncode = "encode"
	stageTree   = "tree"
	stageSync   = "sync"
)

// stages are the times that the parts of an ingest took.
type stages struct {
	last  time.Time
	names []string
	took  []time.Duration
}

// mark ends a stage.
func (s *stages) mark(name string) {
	now := time.Now()
	s.names, s.took = append(s.names, name), append(s.took, now.Sub(s.last))
	s.last = now
}

func (s *stages) fields() log.Fields {
	f := log.Fields{}
	for i, name := range s.names {
		f[name] = s.took[i].Round(time.Microsecond)
	}
	return f
}

// safely turns a panic of fn into an error: a blob that finds a bug in a parser must not end the
// daemon for all others.
func safely(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}
