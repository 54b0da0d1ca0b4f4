package layer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// ErrDamaged is wrapped where a layer is out of service.
var ErrDamaged = errors.New("layer is damaged")

// Damage is why a layer is out of service.
type Damage struct {
	// Tree tells what is wrong with the tree file; nil when nothing is.
	Tree error
	// Objects are those that the layer names and that are missing or have other bytes.
	Objects []content.ObjectID
}

func (d Damage) Error() string {
	switch n := len(d.Objects); {
	case d.Tree != nil:
		return d.Tree.Error()
	case n == 1:
		return "object " + d.Objects[0].Hex() + " is missing or has other bytes"
	default:
		return fmt.Sprintf("%d objects are missing or have other bytes", n)
	}
}

// health finds what is damaged, takes layers out of service and puts them back.
type health struct {
	*packed
	*catalog

	damagedMu sync.Mutex // serialises writing the list of what is damaged
	// leaked: an object could not be removed. The next Open looks for it, as after an unclean stop.
	leaked atomic.Bool
}

// isDamage tells what is wrong with a file from what is wrong with the machine.
func isDamage(err error) bool {
	return errors.Is(err, tree.ErrDamaged) || errors.Is(err, object.ErrDamaged) ||
		errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EISDIR)
}

// harm takes a layer out of service.
func (h *health) harm(ctx context.Context, id content.LayerID, d Damage) {
	h.mu.Lock()
	changed := h.harmLocked(ctx, id, d)
	h.mu.Unlock()
	if changed {
		h.saveDamaged(ctx)
	}
}

// assess looks at what an earlier run found damaged and at layers that may not be whole, before anything is served.
func (s *Store) assess(ctx context.Context, suspects []content.LayerID) error {
	before, err := s.loadDamaged()
	if err != nil {
		return err
	}
	s.objects.SetBad(before.objects...)
	if err := s.moveOld(ctx); err != nil { // which may have some of them
		return fmt.Errorf("upgrade: %w", err)
	}
	var objects []content.ObjectID
	for _, id := range append(before.trees, suspects...) {
		st := s.layers[id]
		if st == nil || st.damage != nil && st.damage.Tree != nil {
			continue
		}
		named, err := s.verifyTree(id)
		if err != nil {
			s.harmLocked(ctx, id, Damage{Tree: err})
		} else if slices.Contains(suspects, id) {
			objects = append(objects, named...)
		}
	}
	if len(suspects) > 0 {
		log.G(ctx).WithField("layers", len(suspects)).
			Info("the last stop was not clean: verifying the newest layers")
	}
	slices.SortFunc(objects, func(a, b content.ObjectID) int { return bytes.Compare(a.Sum[:], b.Sum[:]) })
	if err = s.verifyObjects(ctx, slices.Compact(objects), func(int64) {}); err != nil {
		return fmt.Errorf("verify what came in last: %w", s.explain(err))
	}
	s.blame(ctx)
	if s.damaged == 0 && len(before.objects)+len(before.trees) == 0 {
		return nil
	}
	s.saveDamaged(ctx)
	return nil
}

// verifyTree compares a tree with its name, and returns the objects that it names.
func (h *health) verifyTree(id content.LayerID) ([]content.ObjectID, error) {
	if _, _, err := tree.Read(h.treePath(id), id); err != nil {
		return nil, err
	}
	_, objects, err := tree.ReadFacts(h.treePath(id), id)
	return objects, err
}

// blame takes every layer out of service that names a bad object.
func (h *health) blame(ctx context.Context) {
	if !h.objects.AnyBad() {
		return
	}
	h.mu.RLock()
	ids := slices.Collect(maps.Keys(h.layers))
	h.mu.RUnlock()
	for _, id := range ids {
		h.blameOne(ctx, id)
	}
}

func (h *health) blameOne(ctx context.Context, id content.LayerID) {
	_, objects, err := tree.ReadFacts(h.treePath(id), id)
	if err != nil {
		return // found by whoever reads the tree
	}
	var d Damage
	for _, o := range objects {
		if h.objects.IsBad(o) {
			d.Objects = append(d.Objects, o)
		}
	}
	if len(d.Objects) > 0 {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.harmLocked(ctx, id, d)
	}
}

// recheck looks at a layer that came in while objects were found to be bad.
func (h *health) recheck(ctx context.Context, id content.LayerID) {
	if h.objects.AnyBad() {
		h.blameOne(ctx, id)
		h.saveDamaged(ctx)
	}
}

// distrust looks at what a session wrote that could not sync: others may rely on it.
func (h *health) distrust(ctx context.Context, wrote []content.ObjectID) {
	wrote = slices.DeleteFunc(wrote, func(id content.ObjectID) bool { return !h.objects.Has(id) })
	if err := h.verifyObjects(ctx, wrote, func(int64) {}); err != nil {
		log.G(ctx).WithError(err).Warn("a sync failed, and what it was for could not be verified: run `dedupctl fsck`")
	}
	h.blame(ctx)
	if h.objects.AnyBad() {
		h.saveDamaged(ctx)
	}
}

// DistrustPack looks at a pack that cannot be mounted. What is whole in it is copied to another one; what is not takes
// its layers out of service.
func (h *health) DistrustPack(ctx context.Context, id content.PackID, why error) error {
	log.G(ctx).WithError(why).Errorf("pack %s is damaged: verifying each payload in it", h.objects.Packs().Path(id))
	err := h.verifyObjects(ctx, h.objects.Distrust(id, why), func(int64) {})
	h.blame(ctx)
	h.saveDamaged(ctx)
	if err != nil {
		return fmt.Errorf("verify pack %s: %w", id, h.explain(err))
	}
	return h.Compact(ctx)
}

// heal puts layers back into service that have nothing damaged any more, after sync.
func (h *health) heal(ctx context.Context, sync func() error) error {
	h.mu.RLock()
	damaged := h.damaged
	h.mu.RUnlock()
	if damaged == 0 {
		return nil
	}
	// What was put anew is durable before the list of what is damaged forgets it.
	if err := sync(); err != nil {
		return err
	}
	h.mu.Lock()
	changed := false
	for id, st := range h.layers {
		if st.damage == nil {
			continue
		}
		d := Damage{Tree: st.damage.Tree, Objects: slices.DeleteFunc(slices.Clone(st.damage.Objects),
			func(o content.ObjectID) bool {
				return !h.objects.IsBad(o)
			})}
		changed = changed || len(d.Objects) != len(st.damage.Objects)
		if st.damage = &d; d.Tree == nil && len(d.Objects) == 0 {
			st.damage = nil
			h.damaged--
			h.show(id, st)
			changed = true
			log.G(ctx).Infof("layer %s is whole again", id)
		}
	}
	h.mu.Unlock()
	if changed {
		h.saveDamaged(ctx)
	}
	return nil
}

// damagedList is the file that carries what is known to be damaged over a restart: a line for each,
// "object <hex>" or "tree <hex>".
type damagedList struct {
	objects []content.ObjectID
	trees   []content.LayerID
}

func (h *health) loadDamaged() (l damagedList, err error) {
	data, err := os.ReadFile(h.path(fileDamaged))
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return l, fmt.Errorf("read what is damaged: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		kind, hex, _ := strings.Cut(lines.Text(), " ")
		sum, err := content.ParseSum(hex)
		switch {
		case err != nil:
		case kind == "object":
			l.objects = append(l.objects, content.ObjectID{Sum: sum})
		case kind == "tree":
			l.trees = append(l.trees, content.LayerID{Sum: sum})
		}
	}
	return l, nil
}

func (h *health) saveDamaged(ctx context.Context) {
	if h.opts.readOnly {
		return
	}
	h.damagedMu.Lock()
	defer h.damagedMu.Unlock()
	var lines []string
	for _, o := range h.objects.Bad() {
		lines = append(lines, "object "+o.Hex()+"\n")
	}
	for id, d := range h.Damaged() {
		if d.Tree != nil {
			lines = append(lines, "tree "+id.Hex()+"\n")
		}
	}
	slices.Sort(lines)
	path := h.path(fileDamaged)
	var err error
	if len(lines) == 0 {
		if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	} else {
		var tmp string
		if tmp, err = h.writeStaged("damaged-", []byte(strings.Join(lines, "")), true); err == nil {
			err = os.Rename(tmp, path)
		}
	}
	h.step("damaged.noted")
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("the list of damaged layers cannot be written: " +
			"after a restart they are served until the damage is found again")
	}
}
