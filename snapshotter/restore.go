package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/blobs"
)

// lost are committed snapshots that containerd has on record and the store does not, since its root was lost or
// replaced. containerd refuses to unpack what it has on record, so such an image could be neither pulled nor run.
// Each is restored when a client first asks for it, with all below it, from the image and the blobs in the content
// store.
type lost struct {
	s *Snapshotter

	mu sync.Mutex // guards hopeless
	// hopeless are those that could not be restored, and when they were last tried.
	hopeless map[string]time.Time
}

// hopelessFor is for how long a snapshot is not tried again that no image has: clients list snapshots every few
// seconds, and looking for an image reads all of them.
const hopelessFor = 5 * time.Second

var errNoImage = errors.New("no image in containerd's content store has it")

// waits tells whether a snapshot was found to be hopeless a moment ago.
func (l *lost) waits(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.DeleteFunc(l.hopeless, func(_ string, t time.Time) bool { return time.Since(t) > hopelessFor })
	_, ok := l.hopeless[name]
	return ok
}

func (l *lost) giveUp(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hopeless == nil {
		l.hopeless = map[string]time.Time{}
	}
	l.hopeless[name] = time.Now()
}

// retry calls do again where it did not find parent, and that could be restored.
func (l *lost) retry(ctx context.Context, parent string, do func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	mounts, err := do()
	if errdefs.IsNotFound(err) && l.restore(ctx, parent) {
		mounts, err = do()
	}
	return mounts, err
}

// restore brings a snapshot back. false: it is there, or is no layer's, or cannot be restored from what is at hand.
func (l *lost) restore(ctx context.Context, name string) bool {
	chain, ok := chainOfName(name)
	namespace, _, _ := strings.Cut(name, "/")
	caller, _ := namespaces.Namespace(ctx)
	if !ok || namespace != caller || l.s.opts.Blobs == nil || l.s.db.has(ctx, name) || l.waits(name) {
		return false
	}
	part, ok, err := l.s.opts.Blobs.Below(ctx, chain)
	if err == nil && ok {
		err = l.restoreFrom(ctx, name, part)
	} else if err == nil {
		err = errNoImage
	}
	if errdefs.IsAlreadyExists(err) {
		return l.s.db.has(ctx, name) // somebody else was faster
	}
	if err != nil {
		if ctx.Err() == nil {
			if errors.Is(err, errNoImage) {
				l.giveUp(name)
			}
			log.G(ctx).WithError(err).Warnf("containerd has a record of snapshot %s, which is not here and cannot be restored",
				name)
		}
		return false
	}
	log.G(ctx).Infof("restored snapshot %s, of which containerd has a record", name)
	l.s.scheduleBuild(ctx, name)
	return true
}

// restoreFrom gets the layers that are missing, and records snapshots for all of them at once: containerd's garbage
// collection would remove one that nothing stands on yet.
func (l *lost) restoreFrom(ctx context.Context, name string, part blobs.Part) (err error) {
	namespace, _, _ := strings.Cut(name, "/")
	if part.At > 0 && l.s.opts.Remind != nil && l.committedAs(ctx, namespace, part.Chains[part.At-1]) == "" {
		// containerd knows the names of those below, and asks for them by these.
		if err := l.s.opts.Remind(ctx, part.Chains[part.At-1]); err != nil {
			log.G(ctx).WithError(err).Debugf("ask containerd for its record of %s", part.Chains[part.At-1].Digest())
		}
	}
	first, parent := 0, ""
	for i := part.At - 1; i >= 0 && parent == ""; i-- {
		if parent = l.committedAs(ctx, namespace, part.Chains[i]); parent != "" {
			first = i + 1
		}
	}
	var stored []map[string]string // labels of the snapshots to come, each of which holds its layer
	defer func() {
		for _, labels := range stored {
			l.s.release(labels)
		}
	}()
	for i := first; i <= part.At; i++ {
		w := wanted{target: part.Chains[i], diffID: part.DiffIDs[i]}
		if i > 0 {
			w.parent = part.Chains[i-1]
		}
		in, _, ok := l.s.findLayer(ctx, w)
		if !ok {
			return fmt.Errorf("layer %s is not known, and its blob %s is not in containerd's content store: %w",
				w.diffID.Digest(), part.Layers[i].Digest, errdefs.ErrNotFound)
		}
		labels := l.s.claim(in.Layer)
		labels[labelRef], labels[labelNamespace] = w.target.Digest().String(), namespace
		stored = append(stored, labels)
	}
	var recorded int
	err = l.s.db.update(ctx, func(ctx context.Context) error {
		for recorded = range stored {
			own := name
			if first+recorded < part.At {
				own = hitName(namespace, parent, part.Chains[first+recorded].Digest().String())
			}
			err := l.record(ctx, own, parent, stored[recorded])
			if err != nil {
				return err
			}
			parent = own
		}
		return nil
	})
	if err == nil {
		stored = nil // the snapshots hold them
	}
	return err
}

// record stores a committed snapshot. In a transaction.
func (l *lost) record(ctx context.Context, name, parent string, labels map[string]string) error {
	key := "restore-" + name
	if _, err := createSnapshot(ctx, snapshots.KindActive, key, parent, nil); err != nil {
		return err
	}
	l.s.refs.add(labels[labelRef], name)
	return commitActive(ctx, key, name, "", snapshots.Usage{}, labels)
}

// committedAs finds a committed snapshot of a chain in a namespace.
func (l *lost) committedAs(ctx context.Context, namespace string, chain content.ChainID) (name string) {
	names := l.s.refs.get(chain.Digest().String())
	slices.Sort(names)
	_ = l.s.db.view(ctx, func(ctx context.Context) error {
		for _, n := range names {
			_, info, _, err := getInfo(ctx, n)
			if err == nil && info.Kind == snapshots.KindCommitted && info.Labels[labelNamespace] == namespace {
				name = n
			}
		}
		return nil
	})
	return name
}
