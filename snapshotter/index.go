package snapshotter

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// index finds snapshots without walking metadata.db. It is rebuilt from there at start,
// and changed under writeMu after each transaction. An entry may be stale for a
// moment: what it leads to is looked up in the database.
type index struct {
	mu   sync.RWMutex // guards the maps
	keys map[string]string
	refs map[ref]string
}

// ref is how containerd asks for the snapshot of a hit. Every containerd namespace
// gets a snapshot of its own: it removes what it has adopted, whoever else did too.
type ref struct{ namespace, target, parent string }

func newIndex() *index { return &index{keys: map[string]string{}, refs: map[ref]string{}} }

func refOf(info snapshots.Info) (ref, bool) {
	r := ref{info.Labels[labelNamespace], info.Labels[snapshots.LabelSnapshotRef], info.Parent}
	return r, info.Kind == snapshots.KindCommitted && r.target != ""
}

func (x *index) put(id string, info snapshots.Info) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.keys[id] = info.Name
	if r, ok := refOf(info); ok {
		x.refs[r] = info.Name
	}
}

func (x *index) drop(id string, info snapshots.Info) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.keys[id] == info.Name {
		delete(x.keys, id)
	}
	if r, ok := refOf(info); ok && x.refs[r] == info.Name {
		delete(x.refs, r)
	}
}

// key returns the key or name of a snapshot by its number.
func (x *index) key(id string) (string, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	k, ok := x.keys[id]
	return k, ok
}

// ref returns the name of a committed snapshot.
func (x *index) ref(r ref) (string, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	k, ok := x.refs[r]
	return k, ok
}

// parseRefFilter recognises the one filter with which containerd looks for the
// snapshot of a hit (createSnapshot in its core/metadata/snapshot.go).
func parseRefFilter(filters []string) (target, parent string, ok bool) {
	if len(filters) != 1 {
		return "", "", false
	}
	rest, ok := strings.CutPrefix(filters[0], fmt.Sprintf("labels.%q==", snapshots.LabelSnapshotRef))
	if !ok {
		return "", "", false
	}
	target, quoted, ok := strings.Cut(rest, ",parent==")
	if !ok || strings.ContainsAny(target, `"|,`) {
		return "", "", false
	}
	parent, err := strconv.Unquote(quoted)
	return target, parent, err == nil
}

// asksForRef reports whether a filter looks at the target label at all.
func asksForRef(filters []string) bool {
	for _, f := range filters {
		if strings.Contains(f, snapshots.LabelSnapshotRef) {
			return true
		}
	}
	return false
}
