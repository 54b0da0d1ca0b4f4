package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

// damagedStore is a store whose metadata.db is about to be damaged.
type damagedStore struct {
	root    string
	images  [2][]string // three snapshots each, and a container on the last, which has written
	blobs   [][]byte    // of the first image
	written string      // by container-0, below root
	before  []string    // what the store holds
}

func twoImages(t *testing.T) damagedStore {
	t.Helper()
	root := t.TempDir()
	s := open(t, root)
	var d damagedStore
	for i := range d.images {
		parent := ""
		for l := range 3 {
			blob := layerTar(t, map[string]string{fmt.Sprint("f", i, l): strings.Repeat(fmt.Sprint(i, l), 3000)})
			parent, _ = unpack(t, s, "one", parent, blob, nil)
			if i == 0 {
				d.blobs = append(d.blobs, blob)
			}
			d.images[i] = append(d.images[i], parent)
		}
		name := fmt.Sprint("container-", i)
		if _, err := s.Prepare(t.Context(), name, parent); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.upper(s.ids.idOf(t, name)), "written"), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d.written = strings.TrimPrefix(filepath.Join(s.upper(s.ids.idOf(t, "container-0")), "written"), root)
	if err := stop(s); err != nil {
		t.Fatal(err)
	}
	d.root, d.before = root, stored(t, root)
	return d
}

// recordDamage is one thing that happens to metadata.db.
type recordDamage struct {
	damage func(all, links *bbolt.Bucket) error
	harmed []string // by name; nil when all can be made anew
	lost   bool
}

// recordDamages returns what TestDamagedRecords tries, by name. middle and last are snapshots of container-0's image,
// and other one of another image.
func recordDamages(middle, last, other string) map[string]recordDamage {
	below := func(name string, keys ...string) func(*bbolt.Bucket) *bbolt.Bucket {
		return func(all *bbolt.Bucket) *bbolt.Bucket {
			b := all.Bucket([]byte(name))
			for _, k := range keys {
				b = b.Bucket([]byte(k))
			}
			return b
		}
	}
	put := func(in func(*bbolt.Bucket) *bbolt.Bucket, key, value string) func(all, links *bbolt.Bucket) error {
		return func(all, _ *bbolt.Bucket) error { return in(all).Put([]byte(key), []byte(value)) }
	}
	return map[string]recordDamage{
		"a container's id":     {damage: put(below("container-0"), "id", "\x63"), harmed: []string{"container-0"}},
		"a container's parent": {damage: put(below("container-0"), "parent", other), harmed: []string{"container-0"}},
		"a parent that is not": {damage: put(below("container-0"), "parent", "nobody"), harmed: []string{"container-0"}},
		"itself as a parent":   {damage: put(below(middle), "parent", middle), harmed: []string{middle, last, "container-0"}},
		"a container's kind":   {damage: put(below("container-0"), "kind", "\x03"), harmed: []string{"container-0"}},
		"an unknown kind":      {damage: put(below("container-0"), "kind", "\x63"), harmed: []string{"container-0"}},
		"a time":               {damage: put(below("container-0"), "createdat", "\x09"), harmed: []string{"container-0"}},
		"a layer": {damage: put(below(middle, "labels"), labelLayer, strings.Repeat("ab", 32)),
			harmed: []string{middle, last, "container-0"}},
		"a layer that is none": {damage: put(below(last, "labels"), labelLayer, "none"), harmed: []string{last,
			"container-0"}},
		"a seal": {damage: put(below(last, "labels"), labelSeal, "00"), harmed: []string{last, "container-0"}},
		"the labels": {damage: func(all,
			_ *bbolt.Bucket) error {
			return below(last)(all).DeleteBucket([]byte("labels"))
		}, harmed: []string{last, "container-0"}},
		"a record without all": {damage: func(all,
			_ *bbolt.Bucket) error {
			return below("container-0")(all).Delete([]byte("id"))
		}, harmed: []string{"container-0"}},
		"a record that is a value": {damage: func(all, _ *bbolt.Bucket) error {
			return errors.Join(all.DeleteBucket([]byte("container-0")), all.Put([]byte("container-0"), []byte("value")))
		}, harmed: []string{"container-0"}},
		"a record of nothing": {damage: recreate("container-0", false), harmed: []string{"container-0"}},
		"no record":           {damage: recreate("container-0", true), harmed: []string{"container-0"}, lost: true},
		"no links":            {damage: func(_, links *bbolt.Bucket) error { return clearBucket(links) }},
		"a link to nobody": {damage: func(_, links *bbolt.Bucket) error {
			return links.Put([]byte("\x01\x00\x70"),
				[]byte("nobody"))
		}},
		"the next id": {damage: func(all, _ *bbolt.Bucket) error { return all.SetSequence(1) }},
	}
}

// What is damaged in metadata.db harms what it speaks of and nothing else; nothing is removed for being unused until
// somebody has repaired it.
func TestDamagedRecords(t *testing.T) {
	needRoot(t)
	d := twoImages(t)
	for name, row := range recordDamages(d.images[0][1], d.images[0][2], d.images[1][0]) {
		t.Run(name, func(t *testing.T) {
			d := d
			whole := d.root
			d.root = filepath.Join(t.TempDir(), "root")
			if out, err := exec.CommandContext(t.Context(), "cp", "-a", whole, d.root).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			damageRecords(t, filepath.Join(d.root, "metadata.db"), row.damage)
			s := open(t, d.root)
			if row.harmed == nil {
				d.madeAnew(t, s)
				return
			}
			d.othersGoOn(t, s, row)
			d.nothingGoes(t, s, row)
			d.repairs(t, s, row)
		})
	}
}

// madeAnew expects that the open has made good what was damaged.
func (d damagedStore) madeAnew(t *testing.T, s *Snapshotter) {
	t.Helper()
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) > 0 {
		t.Errorf("found %+v", found)
	}
	if err := s.Remove(t.Context(), d.images[0][2]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed the parent of a container: %v", err)
	}
}

// othersGoOn expects that the damage is found, that what it harms is out of service, and nothing else.
func (d damagedStore) othersGoOn(t *testing.T, s *Snapshotter, row recordDamage) {
	t.Helper()
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || found[0].Kind != DamagedMetadata || !row.lost && !sameStrings(found[0].Snapshots, row.harmed) {
		t.Errorf("found %+v, want one that harms %v", found, row.harmed)
	}
	if _, err := s.Mounts(t.Context(), "container-1"); err != nil {
		t.Error(err)
	}
	if _, err := s.Prepare(t.Context(), "another", d.images[1][2]); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "another"); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(t.Context(), row.harmed[0]); !row.lost && !errors.Is(err, errRecord) {
		t.Error(err)
	}
	for _, name := range row.harmed {
		if _, err := s.View(t.Context(), "view", name); err == nil {
			t.Errorf("a view of %s", name)
		}
	}
	if _, err := s.Mounts(t.Context(), "container-0"); err == nil {
		t.Error("the container starts")
	}
}

// nothingGoes expects that nothing is removed, whoever cleans up.
func (d damagedStore) nothingGoes(t *testing.T, s *Snapshotter, row recordDamage) {
	t.Helper()
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := s.GC(t.Context(), GCOptions{}); err != nil {
		t.Error(err)
	}
	removeHarmed(t, s)
	if err := s.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	s.layers.Wait()
	if row.harmed[0] == "container-0" {
		if diff := cmp.Diff(d.before, stored(t, d.root)); diff != "" {
			t.Errorf("the store has changed (-before +after):\n%s", diff)
		}
	}
}

// repairs expects that after a repair all is as if the harmed had never been, and can be had again. What the container
// wrote is put aside.
func (d damagedStore) repairs(t *testing.T, s *Snapshotter, row recordDamage) {
	t.Helper()
	if _, err := s.Check(t.Context(), CheckOptions{Repair: true}); err != nil {
		t.Error(err)
	}
	if found, err := s.Check(t.Context(), CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("after repair: %+v, %v", found, err)
	}
	if _, err := os.Stat(filepath.Join(d.root, d.written)); err == nil {
		t.Error("the container's directory is still there")
	}
	if row.harmed[0] == "container-0" {
		b, err := os.ReadFile(filepath.Join(d.root, strings.Replace(d.written, "snapshots", "lost+found", 1)))
		if err != nil || string(b) != "container-0" {
			t.Errorf("what the container wrote: %q, %v", b, err)
		}
	}
	parent := ""
	for _, blob := range d.blobs {
		parent, _ = unpack(t, s, "one", parent, blob, nil)
	}
	if _, err := s.Prepare(t.Context(), "again", parent); err != nil {
		t.Error(err)
	}
}

// idOf returns the id of an active snapshot.
func (x *index) idOf(t *testing.T, key string) string {
	t.Helper()
	for id, keys := range x.names {
		if _, ok := keys[key]; ok {
			return id
		}
	}
	t.Fatalf("no snapshot %q", key)
	return ""
}

func sameStrings(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// removeHarmed removes, as containerd's garbage collector would, what cannot be used: children first.
func removeHarmed(t *testing.T, s *Snapshotter) {
	t.Helper()
	for range 4 {
		var all []string
		err := s.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
			all = append(all, info.Name)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range all {
			var chain error
			err := s.db.view(t.Context(), func(ctx context.Context) error {
				_, info, _, err := getInfo(ctx, name)
				if _, _, chain = chainOf(ctx, info.Parent); err != nil {
					chain = err
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if chain != nil {
				_ = s.Remove(t.Context(), name) // one with children goes in the next round
			}
		}
	}
}

// damageRecords changes what a metadata.db says.
func damageRecords(t *testing.T, path string, fn func(all, links *bbolt.Bucket) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		v1 := tx.Bucket(bucketStorage)
		return fn(v1.Bucket(bucketSnapshots), v1.Bucket(bucketParents))
	})
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// recreate takes a record away, or all that it says.
func recreate(name string, gone bool) func(all, links *bbolt.Bucket) error {
	return func(all, links *bbolt.Bucket) error {
		if err := all.DeleteBucket([]byte(name)); err != nil || gone {
			return err
		}
		_, err := all.CreateBucket([]byte(name))
		return err
	}
}

func clearBucket(b *bbolt.Bucket) (err error) {
	for k := range entries(b) {
		err = errors.Join(err, b.Delete([]byte(k)))
	}
	return err
}
