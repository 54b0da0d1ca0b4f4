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

// isDamage tells what is wrong with a file from what is wrong with the machine.
func isDamage(err error) bool {
	return errors.Is(err, tree.ErrDamaged) || errors.Is(err, object.ErrDamaged) ||
		errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EISDIR)
}

// harm takes a layer out of service.
func (s *Store) harm(ctx context.Context, id content.LayerID, d Damage) {
	s.mu.Lock()
	changed := s.harmLocked(ctx, id, d)
	s.mu.Unlock()
	if changed {
		s.saveDamaged(ctx)
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
			Info("the last stop was not clean: verifying the layers that came in right before it")
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
func (s *Store) verifyTree(id content.LayerID) ([]content.ObjectID, error) {
	if _, _, err := tree.Read(s.treePath(id), id); err != nil {
		return nil, err
	}
	_, objects, err := tree.ReadFacts(s.treePath(id), id)
	return objects, err
}

// blame takes every layer out of service that names a bad object.
func (s *Store) blame(ctx context.Context) {
	if !s.objects.AnyBad() {
		return
	}
	s.mu.RLock()
	ids := slices.Collect(maps.Keys(s.layers))
	s.mu.RUnlock()
	for _, id := range ids {
		s.blameOne(ctx, id)
	}
}

func (s *Store) blameOne(ctx context.Context, id content.LayerID) {
	_, objects, err := tree.ReadFacts(s.treePath(id), id)
	if err != nil {
		return // found by whoever reads the tree
	}
	var d Damage
	for _, o := range objects {
		if s.objects.IsBad(o) {
			d.Objects = append(d.Objects, o)
		}
	}
	if len(d.Objects) > 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.harmLocked(ctx, id, d)
	}
}

// recheck looks at a layer that came in while objects were found to be bad.
func (s *Store) recheck(ctx context.Context, id content.LayerID) {
	if s.objects.AnyBad() {
		s.blameOne(ctx, id)
		s.saveDamaged(ctx)
	}
}

// distrust looks at what a session wrote that could not sync: others may rely on it.
func (s *Store) distrust(ctx context.Context, wrote []content.ObjectID) {
	wrote = slices.DeleteFunc(wrote, func(id content.ObjectID) bool { return !s.objects.Has(id) })
	if err := s.verifyObjects(ctx, wrote, func(int64) {}); err != nil {
		log.G(ctx).WithError(err).Warn("a sync failed, and what it was for could not be verified: run `dedupctl fsck`")
	}
	s.blame(ctx)
	if s.objects.AnyBad() {
		s.saveDamaged(ctx)
	}
}

// DistrustPack looks at a pack that cannot be mounted. What is whole in it is copied to another one; what is not takes
// its layers out of service.
func (s *Store) DistrustPack(ctx context.Context, id content.PackID, why error) error {
	log.G(ctx).WithError(why).Errorf("pack %s is damaged: verifying each payload in it", s.objects.Packs().Path(id))
	err := s.verifyObjects(ctx, s.objects.Distrust(id, why), func(int64) {})
	s.blame(ctx)
	s.saveDamaged(ctx)
	if err != nil {
		return fmt.Errorf("verify pack %s: %w", id, s.explain(err))
	}
	return s.Compact(ctx)
}

// heal puts layers back into service that have nothing damaged any more, after sync.
func (s *Store) heal(ctx context.Context, sync func() error) error {
	s.mu.RLock()
	damaged := s.damaged
	s.mu.RUnlock()
	if damaged == 0 {
		return nil
	}
	// What was put anew is durable before the list of what is damaged forgets it.
	if err := sync(); err != nil {
		return err
	}
	s.mu.Lock()
	changed := false
	for id, st := range s.layers {
		if st.damage == nil {
			continue
		}
		d := Damage{Tree: st.damage.Tree, Objects: slices.DeleteFunc(slices.Clone(st.damage.Objects),
			func(o content.ObjectID) bool {
				return !s.objects.IsBad(o)
			})}
		changed = changed || len(d.Objects) != len(st.damage.Objects)
		if st.damage = &d; d.Tree == nil && len(d.Objects) == 0 {
			st.damage = nil
			s.damaged--
			s.show(id, st)
			changed = true
			log.G(ctx).Infof("layer %s is whole again", id)
		}
	}
	s.mu.Unlock()
	if changed {
		s.saveDamaged(ctx)
	}
	return nil
}

// damagedList is the file that carries what is known to be damaged over a restart: a line for each,
// "object <hex>" or "tree <hex>".
type damagedList struct {
	objects []content.ObjectID
	trees   []content.LayerID
}

func (s *Store) loadDamaged() (l damagedList, err error) {
	data, err := os.ReadFile(s.path(fileDamaged))
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

func (s *Store) saveDamaged(ctx context.Context) {
	if s.opts.readOnly {
		return
	}
	s.damagedMu.Lock()
	defer s.damagedMu.Unlock()
	var lines []string
	for _, o := range s.objects.Bad() {
		lines = append(lines, "object "+o.Hex()+"\n")
	}
	for id, d := range s.Damaged() {
		if d.Tree != nil {
			lines = append(lines, "tree "+id.Hex()+"\n")
		}
	}
	slices.Sort(lines)
	path := s.path(fileDamaged)
	var err error
	if len(lines) == 0 {
		if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	} else {
		var tmp string
		if tmp, err = s.writeStaged("damaged-", []byte(strings.Join(lines, "")), true); err == nil {
			err = os.Rename(tmp, path)
		}
	}
	s.step("damaged.noted")
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("the list of damaged layers is not written: " +
			"after a restart they serve until the damage is found again")
	}
}
