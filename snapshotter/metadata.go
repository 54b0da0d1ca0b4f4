package snapshotter

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// metaDB is metadata.db: containerd's storage package, and checksums of what that writes, of which bolt has none. What
// is read wrong there would be paid for with a container's files, since its directory would belong to nobody.
//
//	v1/snapshots/<name>  what storage says of a snapshot; a label of ours seals it
//	v1/parents           storage's links from parents to children
//	dedup                "sum": the exclusive or of all seals, so that no record can vanish, or come back, unseen
type metaDB struct{ ms *storage.MetaStore }

var (
	bucketStorage   = []byte("v1")
	bucketSnapshots = []byte("snapshots")
	bucketParents   = []byte("parents")
	bucketLabels    = []byte("labels")
	keyUpdated      = []byte("updatedat")
	bucketOurs      = []byte("dedup")
	keySum          = []byte("sum")
)

var errRecord = fmt.Errorf("its record in metadata.db is damaged (`dedupctl fsck` names what it harms): %w",
	errdefs.ErrFailedPrecondition)

// openMetadata opens a file whose structure is whole. It has to hold what createMetadata writes.
func openMetadata(ctx context.Context, path string) (*metaDB, error) {
	ms, err := storage.NewMetaStore(path, func(o *bbolt.Options) error {
		// bolt maps the file, and a read error in a mapping ends the process: what is locked is read once, here.
		if o.Mlock = mayLock(); !o.Mlock {
			log.G(ctx).Warn("metadata.db is not locked in memory, and a read error of its disk would end the daemon: raise " +
				"LimitMEMLOCK to infinity, or add CAP_IPC_LOCK")
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	m := &metaDB{ms}
	err = m.view(ctx, func(ctx context.Context) error {
		v1, ours := txOf(ctx).Bucket(bucketStorage), txOf(ctx).Bucket(bucketOurs)
		if v1 == nil || ours == nil || v1.Bucket(bucketSnapshots) == nil || v1.Bucket(bucketParents) == nil ||
			len(ours.Get(keySum)) != 8 {
			return errOthers
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

// mayLock tells whether the process may lock as much memory as it wants. bolt fails to grow where it may not.
func mayLock() bool {
	const unlimited = unix.RLIM_INFINITY
	if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: unlimited, Max: unlimited}) == nil {
		return true
	}
	var caps [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0])
	return err == nil && caps[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}

// errOthers: the file is whole, and none of ours.
var errOthers = errors.New("another program's database")

func (m *metaDB) close() error { return m.ms.Close() }

type txKey struct{}

func txOf(ctx context.Context) *bbolt.Tx { return ctx.Value(txKey{}).(*bbolt.Tx) }

func snapshotsBucket(ctx context.Context) *bbolt.Bucket {
	return txOf(ctx).Bucket(bucketStorage).Bucket(bucketSnapshots)
}

// view reads. What it calls has a transaction in its context.
func (m *metaDB) view(ctx context.Context, fn func(context.Context) error) error {
	return m.transact(ctx, false, fn)
}

// update writes, unless fn returns an error.
func (m *metaDB) update(ctx context.Context, fn func(context.Context) error) error {
	return m.transact(ctx, true, fn)
}

// has tells whether a snapshot is stored, and whole.
func (m *metaDB) has(ctx context.Context, name string) bool {
	return m.view(ctx, func(ctx context.Context) error {
		_, _, _, err := getInfo(ctx, name)
		return err
	}) == nil
}

func (m *metaDB) transact(ctx context.Context, writable bool, fn func(context.Context) error) error {
	ctx, t, err := m.ms.TransactionContext(ctx, writable)
	if err != nil {
		return err
	}
	tx, ok := t.(*bbolt.Tx)
	if !ok {
		return errors.Join(fmt.Errorf("a transaction of metadata.db is a %T", t), t.Rollback())
	}
	if err := fn(context.WithValue(ctx, txKey{}, tx)); err != nil || !writable {
		return errors.Join(err, t.Rollback())
	}
	return t.Commit()
}

// sealOf returns the checksum of a record, and the one that is stored with it. The time of the last write is not in it;
// the one that clients see is a label.
func sealOf(name string, record *bbolt.Bucket) (is, stored string) {
	all := make([]byte, 0, 1<<10)
	add := func(b []byte) { all = append(binary.LittleEndian.AppendUint64(all, uint64(len(b))), b...) }
	add([]byte(name))
	var walk func(b *bbolt.Bucket) error
	walk = func(b *bbolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			if v == nil { // to look for a bucket is a search
				if sub := b.Bucket(k); sub != nil {
					add(k)
					return walk(sub)
				}
			}
			switch {
			case string(k) == labelSeal:
				stored = string(v)
			case !bytes.Equal(k, keyUpdated):
				add(k)
				add(v)
			}
			return nil
		})
	}
	_ = walk(record)
	sum := sha256.Sum256(all)
	return hex.EncodeToString(sum[:8]), stored
}

// toggle adds a seal to the sum of all, or takes it away.
func toggle(ctx context.Context, seal string) error {
	ours := txOf(ctx).Bucket(bucketOurs)
	return ours.Put(keySum, xor(ours.Get(keySum), seal))
}

// xor returns a sum with a seal more, or less. One that is no seal counts for nothing.
func xor(sum []byte, seal string) []byte {
	out := make([]byte, 8)
	copy(out, sum)
	if b, err := hex.DecodeString(seal); err == nil && len(b) == 8 {
		for i := range out {
			out[i] ^= b[i]
		}
	}
	return out
}

// seal stores the checksum of a snapshot that has just been created or changed, when before it had another one, or "".
func seal(ctx context.Context, key, before string) error {
	_, info, _, err := storage.GetInfo(ctx, key)
	if err != nil {
		return err
	}
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	if info.Labels[labelUpdated] == "" {
		info.Labels[labelUpdated] = info.Updated.Format(time.RFC3339Nano)
	}
	if _, err := storage.UpdateInfo(ctx, info, "labels"); err != nil {
		return err
	}
	r := snapshotsBucket(ctx).Bucket([]byte(key))
	now, _ := sealOf(key, r)
	return errors.Join(r.Bucket(bucketLabels).Put([]byte(labelSeal), []byte(now)), toggle(ctx, before), toggle(ctx, now))
}

// sealAll seals a metadata.db that has no seals, or some.
func sealAll(ctx context.Context, path string) error {
	ms, err := storage.NewMetaStore(path)
	if err != nil {
		return err
	}
	m := &metaDB{ms}
	err = m.update(ctx, func(ctx context.Context) error {
		if v1 := txOf(ctx).Bucket(bucketStorage); v1 == nil || v1.Bucket(bucketSnapshots) == nil {
			return nil // openMetadata says what is wrong
		}
		ours, err := txOf(ctx).CreateBucketIfNotExists(bucketOurs)
		if err == nil {
			err = ours.Put(keySum, xor(nil, ""))
		}
		for _, name := range names(ctx) {
			err = errors.Join(err, seal(ctx, name, ""))
		}
		return err
	})
	return errors.Join(err, m.close())
}

// getInfo is storage.GetInfo that refuses a damaged record.
func getInfo(ctx context.Context, key string) (id string, info snapshots.Info, usage snapshots.Usage, err error) {
	all := snapshotsBucket(ctx)
	sound := all.Get([]byte(key)) == nil // a value, where a bucket should be, if anything
	if r := all.Bucket([]byte(key)); r != nil {
		is, stored := sealOf(key, r)
		sound = is == stored
	}
	if !sound {
		return "", info, usage, fmt.Errorf("snapshot %q: %w", key, errRecord)
	}
	return storage.GetInfo(ctx, key)
}

// soundChain refuses a parent that has a damaged record in its chain, which storage would follow.
func soundChain(ctx context.Context, parent string) error {
	if _, _, err := chainOf(ctx, parent); errors.Is(err, errRecord) {
		return err
	}
	return nil // what else may be wrong storage says
}

func createSnapshot(ctx context.Context, kind snapshots.Kind, key, parent string, labels map[string]string) (id string,
	err error) {
	if err := soundChain(ctx, parent); err != nil {
		return "", err
	}
	sn, err := storage.CreateSnapshot(ctx, kind, key, parent, snapshots.WithLabels(labels))
	if err != nil {
		return "", err
	}
	return sn.ID, seal(ctx, key, "")
}

func commitActive(ctx context.Context, key, name, parent string, usage snapshots.Usage,
	labels map[string]string) error {
	_, active, _, err := getInfo(ctx, key)
	if err != nil {
		return err
	}
	if err := soundChain(ctx, parent); err != nil {
		return err
	}
	opts := []snapshots.Opt{snapshots.WithLabels(labels)}
	if parent != "" {
		opts = append(opts, snapshots.WithParent(parent))
	}
	if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
		return err
	}
	return seal(ctx, name, active.Labels[labelSeal])
}

// updateInfo is storage.UpdateInfo; old is what getInfo returned before.
func updateInfo(ctx context.Context, old, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	out, err := storage.UpdateInfo(ctx, info, fieldpaths...)
	if err != nil {
		return out, err
	}
	return out, seal(ctx, info.Name, old.Labels[labelSeal])
}

// removeSnapshot is storage.Remove. A damaged record goes too, and then id is "": what it says belongs to the snapshot
// may be another one's.
func removeSnapshot(ctx context.Context, key string) (id string, info snapshots.Info, err error) {
	id, info, _, err = getInfo(ctx, key)
	switch {
	case errors.Is(err, errRecord):
		return "", snapshots.Info{}, removeDamaged(ctx, key)
	case err != nil:
		return "", info, err
	}
	if _, _, err := storage.Remove(ctx, key); err != nil {
		return "", info, err
	}
	return id, info, toggle(ctx, info.Labels[labelSeal])
}

// removeDamaged removes a damaged record that no other names as its parent. The sum of seals tells that there was more.
func removeDamaged(ctx context.Context, key string) error {
	for _, other := range names(ctx) {
		_, info, _, err := getInfo(ctx, other)
		if err == nil && info.Parent == key {
			return fmt.Errorf("cannot remove snapshot with child: %w", errdefs.ErrFailedPrecondition)
		}
	}
	v1 := txOf(ctx).Bucket(bucketStorage)
	all, links := v1.Bucket(bucketSnapshots), v1.Bucket(bucketParents)
	err := all.DeleteBucket([]byte(key))
	if err != nil { // it is no bucket any more
		err = all.Delete([]byte(key))
	}
	if err != nil {
		return err
	}
	for c, value := range entries(links) {
		if string(value) == key {
			err = errors.Join(err, links.Delete([]byte(c)))
		}
	}
	return err
}

// entries returns a copy of what a bucket holds.
func entries(b *bbolt.Bucket) map[string][]byte {
	all := map[string][]byte{}
	_ = b.ForEach(func(k, v []byte) error {
		all[string(k)] = bytes.Clone(v)
		return nil
	})
	return all
}

// names returns the names of all snapshots, sorted, the damaged ones' too.
func names(ctx context.Context) (all []string) {
	_ = snapshotsBucket(ctx).ForEach(func(k, _ []byte) error {
		all = append(all, string(k))
		return nil
	})
	return all
}

// storedSnapshot is one whose record is whole.
type storedSnapshot struct {
	id string
	snapshots.Info
}

// records are all that metadata.db says while its structure is whole.
type records struct {
	whole   []storedSnapshot
	damaged []string // names of snapshots
	lost    bool     // records have vanished, or removed ones have come back
}

// complete: nothing is damaged. While something is, nothing may be called unused.
func (r records) complete() bool { return len(r.damaged) == 0 && !r.lost }

// records reads all.
func (m *metaDB) records(ctx context.Context) (r records, err error) {
	err = m.view(ctx, func(ctx context.Context) error {
		r = readRecords(ctx)
		return nil
	})
	if err != nil {
		return r, fmt.Errorf("read metadata.db: %w", err)
	}
	return r, nil
}

// readRecords reads all. In a transaction.
func readRecords(ctx context.Context) (r records) {
	sum := xor(nil, "")
	for _, name := range names(ctx) {
		id, info, _, err := getInfo(ctx, name)
		if err != nil {
			r.damaged = append(r.damaged, name)
			continue
		}
		sum = xor(sum, info.Labels[labelSeal])
		r.whole = append(r.whole, storedSnapshot{id, info})
	}
	r.lost = len(r.damaged) == 0 && !bytes.Equal(sum, txOf(ctx).Bucket(bucketOurs).Get(keySum))
	return r
}

// resum takes what there is for all there ever was.
func resum(ctx context.Context) error {
	r := readRecords(ctx)
	sum := xor(nil, "")
	for _, sn := range r.whole {
		sum = xor(sum, sn.Labels[labelSeal])
	}
	return errors.Join(txOf(ctx).Bucket(bucketOurs).Put(keySum, sum), makeLinks(ctx))
}

// links returns what storage's links have to be, and the highest id, when all records are whole.
func (r records) links() (want map[string][]byte, last uint64) {
	ids := map[string]uint64{}
	for _, sn := range r.whole {
		id, _ := strconv.ParseUint(sn.id, 10, 64) // storage has printed it
		ids[sn.Name] = id
		last = max(last, id)
	}
	want = map[string][]byte{}
	for _, sn := range r.whole {
		if sn.Parent != "" {
			key := append(binary.AppendUvarint(nil, ids[sn.Parent]), 0)
			want[string(binary.AppendUvarint(key, ids[sn.Name]))] = []byte(sn.Name)
		}
	}
	return want, last
}

// checkLinks tells what is wrong with what can be made anew from the records, when all of these are whole. In a
// transaction.
func checkLinks(ctx context.Context, r records) (problem string) {
	want, last := r.links()
	v1 := txOf(ctx).Bucket(bucketStorage)
	switch {
	case !maps.EqualFunc(want, entries(v1.Bucket(bucketParents)), bytes.Equal):
		return "its links from parents to children are not what its records say"
	case v1.Bucket(bucketSnapshots).Sequence() < last:
		return "it would give an id for the second time"
	}
	return ""
}

// makeLinks makes anew what checkLinks checks.
func makeLinks(ctx context.Context) (err error) {
	want, last := readRecords(ctx).links()
	v1 := txOf(ctx).Bucket(bucketStorage)
	have := v1.Bucket(bucketParents)
	for k := range entries(have) {
		err = errors.Join(err, have.Delete([]byte(k)))
	}
	for k, v := range want {
		err = errors.Join(err, have.Put([]byte(k), v))
	}
	all := v1.Bucket(bucketSnapshots)
	return errors.Join(err, all.SetSequence(max(last, all.Sequence())))
}
