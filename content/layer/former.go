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
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Taking over a store whose trees have format 2, in which all pairs of Python's files had one timestamp: each tree is
// written anew with the timestamps of today, as an ingest of the layer's blob would write it, and so under another id.
// What is new of it is on the disk before the caller notes the new id, and what is old goes after that. So a process
// may end at any point, and the next one goes on; beyond what the store occupies it needs the compiled files of one
// layer at a time.
//
// Containers that run over an old chain image look objects up in objects/ (upgrade.go), by the names of then. These
// stay there until the last of the snapshots that there were is removed, or the machine starts again: the file "former"
// has a line for each of them.
//
//	boot <boot id>
//	user <id of a snapshot>
//	object <hex>

const fileFormer = "former"

// FormerStore says what refers to the layers of a store.
type FormerStore struct {
	// Live names every layer that a snapshot refers to.
	Live []content.LayerID
	// Users are the chains that containers may have mounted, by the snapshot's id.
	Users map[string][]content.LayerID
	// Renamed notes, durably, that a layer has another id from now on.
	Renamed func(ctx context.Context, from, to content.LayerID) error
}

// Upgrade takes over a store of format 2 that nobody has open. A layer that cannot be read is left as it is, and out of
// service.
func Upgrade(ctx context.Context, opts Options, former FormerStore) (err error) {
	opts.Durability, opts.Reserve, opts.Pressure = Strict, Reserve{}, nil
	s, err := newStore(opts)
	if err != nil {
		return err
	}
	defer s.closeFiles()
	if err := s.openDirs(); err != nil {
		return err
	}
	if err := s.openPacks(time.Time{}); err != nil {
		return err
	}
	// The figure in it does not hold any more. The next Open looks for what a killed upgrade has left.
	if err := os.Remove(s.path(fileClean)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mark store as being upgraded: %w", err)
	}
	holds := map[content.LayerID]int{}
	for _, id := range former.Live {
		holds[id] = 1
	}
	if _, err := s.load(ctx, holds, time.Time{}); err != nil {
		return err
	}
	if err := s.keepFormer(former.Users); err != nil {
		return fmt.Errorf("note what running containers need: %w", err)
	}
	s.step("former.noted")
	s.opts.Mounted = func(context.Context) (layers []content.LayerID, ok bool, err error) {
		for _, chain := range former.Users {
			layers = append(layers, chain...)
		}
		return layers, !opts.KeepUnnamed, nil
	}
	if err := s.sweep(ctx); err != nil {
		return err
	}
	damaged, err := s.loadDamaged()
	if err != nil {
		return err
	}
	if err := s.moveOld(ctx); err != nil {
		return fmt.Errorf("move payloads into packs: %w", err)
	}
	s.objects.SetBad(damaged.objects...)
	all := slices.Collect(maps.Keys(s.layers))
	log.G(ctx).WithField("layers", len(all)).Info("upgrading the store: Python's sources get timestamps of their own")
	for _, id := range all {
		err := s.takeOver(ctx, id, former.Renamed)
		switch {
		case err != nil && isDamage(err):
			s.harm(ctx, id, Damage{Tree: err})
		case err != nil:
			return fmt.Errorf("upgrade layer %s: %w", id, s.explain(err))
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if err := s.Sync(); err != nil {
		return err
	}
	s.touch(time.Now()) // else all layers would look as if they had come in right before a power cut
	return nil
}

func (s *Store) takeOver(ctx context.Context, id content.LayerID,
	renamed func(context.Context, content.LayerID, content.LayerID) error) error {
	f, ok, err := tree.ReadFormer(s.treePath(id), id)
	if err != nil || !ok {
		return err
	}
	ss, err := s.newSession(ctx, goal{fidelity: f.Fidelity})
	if err != nil {
		return err
	}
	if err := ss.wait(); err != nil {
		return errors.Join(err, ss.end(nil))
	}
	now, err := s.rewrite(ss, id, f)
	if err != nil {
		return errors.Join(err, ss.end(nil))
	}
	if err := renamed(ctx, id, now); err != nil {
		return errors.Join(err, ss.end(nil))
	}
	s.step("former.renamed")
	if err := ss.end(nil); err != nil {
		return err
	}
	s.mu.Lock()
	s.layers[id].holds = 0
	s.mu.Unlock()
	return s.remove(id)
}

// rewrite stores the tree as it is written today, durably, and returns its id.
func (s *Store) rewrite(ss *session, id content.LayerID, f tree.Former) (now content.LayerID, err error) {
	found, err := s.formerBytecode(f)
	if err != nil {
		return now, err
	}
	canonical, err := settlePython(f.Fidelity, f.Entries, found, ss.restamp)
	if err != nil {
		return now, err
	}
	enc := tree.Encode(f.Fidelity, f.Entries)
	facts := s.layers[id].facts
	facts.Layer, facts.Payload = enc.ID, tree.PayloadDigest(f.Entries, canonical)
	file, err := enc.Marshal(facts)
	if err != nil {
		return now, err
	}
	tmp, err := s.writeStaged("tree-", file, true)
	if err != nil {
		return now, err
	}
	s.step("former.tree")
	sealed, err := ss.objects.Seal()
	if err == nil && sealed.Files > 0 {
		err = ss.sync()
	}
	if err != nil {
		return now, errors.Join(err, os.Remove(tmp))
	}
	_, err = s.commit(enc.ID, tmp, facts, int64(len(file)), false)
	if errors.Is(err, errRaced) { // two layers that differed in what is not kept any more
		for _, t := range facts.Tars {
			if err := s.addTar(enc.ID, t); err != nil {
				return now, err
			}
		}
		return enc.ID, nil
	}
	if err == nil {
		s.objects.Load(enc.Objects())
	}
	return enc.ID, err
}

// formerBytecode finds the timestamp .pyc of a tree, as a session does while the payloads come by, and takes their
// flags away.
func (s *Store) formerBytecode(f tree.Former) (map[*content.Entry]pyc, error) {
	found := map[*content.Entry]pyc{}
	for _, e := range f.Entries {
		if e.Kind != content.Regular || !strings.HasSuffix(e.Path, ".pyc") || e.Size < content.PycHeaderLen ||
			e.Size > bufferMax {
			continue
		}
		head := e.Data
		if head == nil {
			var err error
			if head, err = s.objects.Head(e.Object, content.PycHeaderLen); err != nil {
				return nil, err
			}
		}
		h, ok := content.ParsePyc(head)
		if !ok {
			continue
		}
		p := pyc{header: h, stamp: h.Mtime, canonical: e.Object}
		if e.Flags&content.PycPaired != 0 {
			p.header.Mtime = e.PycTime
		}
		e.Flags &^= content.PycPaired
		e.PycTime = 0
		found[e] = p
	}
	return found, nil
}

// keepFormer notes the objects that old chain images refer to and new trees may not, for as long as containers have
// them mounted.
func (l *oldLayout) keepFormer(users map[string][]content.LayerID) error {
	boot := bootID()
	if last, err := os.ReadFile(l.path(fileRunning)); err == nil && string(last) != boot && boot != unknownBoot {
		return nil // no container runs that did then
	}
	k := l.loadFormer() // a killed upgrade may have taken over some of the layers
	bytecode := map[content.LayerID][]content.ObjectID{}
	for user, chain := range users {
		for _, id := range chain {
			if _, ok := bytecode[id]; !ok {
				f, _, err := tree.ReadFormer(l.treePath(id), id)
				if err != nil && !isDamage(err) {
					return err
				}
				bytecode[id] = f.Bytecode
			}
			for _, o := range bytecode[id] {
				k.objects[o] = true
			}
			if len(bytecode[id]) > 0 {
				k.users[user] = true
			}
		}
	}
	if len(k.objects) == 0 {
		return nil
	}
	tmp, err := l.writeStaged("former-", k.text(boot), true)
	if err == nil {
		err = os.Rename(tmp, l.path(fileFormer))
	}
	l.former = k
	return errors.Join(err, syncDir(l.root))
}

// keptFormer is what the file holds.
type keptFormer struct {
	users   map[string]bool
	objects map[content.ObjectID]bool
}

func (k keptFormer) text(boot string) []byte {
	lines := []string{"boot " + strings.TrimSpace(boot)}
	for _, u := range slices.Sorted(maps.Keys(k.users)) {
		lines = append(lines, "user "+u)
	}
	for o := range k.objects {
		lines = append(lines, "object "+o.Hex())
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}

// loadFormer reads the file; of another boot it holds nothing.
func (l *oldLayout) loadFormer() keptFormer {
	k := keptFormer{users: map[string]bool{}, objects: map[content.ObjectID]bool{}}
	data, err := os.ReadFile(l.path(fileFormer))
	if err != nil {
		return k
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		kind, value, _ := strings.Cut(lines.Text(), " ")
		sum, err := content.ParseSum(value)
		switch {
		case kind == "boot" && value != strings.TrimSpace(bootID()):
			return k
		case kind == "user":
			k.users[value] = true
		case kind == "object" && err == nil:
			k.objects[content.ObjectID{Sum: sum}] = true
		}
	}
	return k
}

// openFormer keeps the objects of old chain images while one of the snapshots is there that may have them mounted.
func (l *oldLayout) openFormer() error {
	if _, err := os.Stat(l.path(fileFormer)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	k := l.loadFormer()
	for user := range k.users {
		if l.opts.User == nil || !l.opts.User(user) {
			delete(k.users, user)
		}
	}
	if len(k.users) == 0 {
		return os.Remove(l.path(fileFormer))
	}
	l.former = k
	return nil
}

// isFormer reports whether an old chain image that may be mounted refers to an object.
func (l *oldLayout) isFormer(id content.ObjectID) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.former.objects[id]
}

// Unused notes that a snapshot has been removed: after the last one of those from before an upgrade, what only they
// needed goes with the next round of moving.
func (l *oldLayout) Unused(user string) error {
	l.mu.Lock()
	k := l.former
	was := k.users[user]
	delete(k.users, user)
	if !was || len(k.users) > 0 {
		l.mu.Unlock()
		return nil
	}
	l.former = keptFormer{}
	l.mu.Unlock()
	l.wakeKeeper()
	if err := os.Remove(l.path(fileFormer)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
