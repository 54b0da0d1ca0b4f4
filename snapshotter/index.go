package snapshotter

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
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

// walk walks the snapshots that match any of the filters. It reads only what can match, where all of them name a
// target. Of a damaged one only the name counts, so that containerd's garbage collector finds it. In a transaction.
func (s *store) walk(ctx context.Context, fn func(snapshots.Info) error, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	some, ok := s.candidates(fs)
	if !ok {
		some = names(ctx)
	}
	for _, name := range some {
		_, info, _, err := getInfo(ctx, name)
		switch {
		case errors.Is(err, errRecord):
			info = snapshots.Info{Name: name}
		case errdefs.IsNotFound(err):
			continue
		case err != nil:
			return err
		}
		if !filter.Match(adapt(info)) {
			continue
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// candidates returns the names that filters can match, when all of these name a target.
func (s *store) candidates(fs []string) (some []string, ok bool) {
	for _, f := range fs {
		m := refFilter.FindStringSubmatch(f)
		if m == nil {
			return nil, false
		}
		some = append(some, s.refs.get(m[1])...)
	}
	slices.Sort(some)
	return slices.Compact(some), len(fs) > 0
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
