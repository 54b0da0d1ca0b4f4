package snapshotter

import (
	"context"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
)

// index finds names by a key without reading all of metadata.db. Names are added before or in the transaction
// that stores a snapshot, and taken away in the one that removes it: bolt has one writer at a time, so the
// two cannot overtake each other. Readers look every name up again, so that one too many does no harm.
type index struct {
	mu    sync.RWMutex // guards names
	names map[string]map[string]struct{}
}

func newIndex() *index { return &index{names: map[string]map[string]struct{}{}} }

func (x *index) add(key, name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.names[key] == nil {
		x.names[key] = map[string]struct{}{}
	}
	x.names[key][name] = struct{}{}
}

func (x *index) remove(key, name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.names[key], name)
	if len(x.names[key]) == 0 {
		delete(x.names, key)
	}
}

func (x *index) get(key string) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	names := make([]string, 0, len(x.names[key]))
	for name := range x.names[key] {
		names = append(names, name)
	}
	return names
}

// refFilter is how the filters begin by which containerd looks for the snapshot that answers a hit.
var refFilter = regexp.MustCompile(`^labels\."containerd\.io/snapshot\.ref"=="?(sha256:[0-9a-f]{64})"?(?:,|$)`)

// walk is walkAll that reads only what can match, where all filters name a target. In a transaction.
func (s *Snapshotter) walk(ctx context.Context, fn func(snapshots.Info) error, fs ...string) error {
	var names []string
	for _, f := range fs {
		m := refFilter.FindStringSubmatch(f)
		if m == nil {
			return walkAll(ctx, fn, fs...)
		}
		names = append(names, s.refs.get(m[1])...)
	}
	if len(fs) == 0 {
		return walkAll(ctx, fn)
	}
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, name := range names {
		if seen[name] {
			continue
		}
		seen[name] = true
		_, info, _, err := storage.GetInfo(ctx, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err == nil && filter.Match(adapt(info)) {
			err = fn(info)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// adapt gives a filter the fields that containerd's own snapshotters have.
func adapt(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			v, ok := info.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}
