package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Stores of layouts 1 to 3 have a file for each payload:
//
//	objects/<2 hex>/<62 hex>   named by the sha256 of its bytes
//	objects/boot               the boot in which moving them began
//
// Open moves them into packs: a batch at a time is copied, sealed and synced, and only then removed. So each payload is
// in one place or in two at any moment, and a store that was killed meanwhile goes on where it stopped. Overlays that
// were mounted before look payloads up in objects/ for as long as they last. What they may need stays there as well,
// until they are gone.
const (
	dirObjects = "objects"
	fileBoot   = "boot"
	// moveBatch bounds the space that a move needs.
	moveBatch = 512 << 20
	// moveLeast is the smallest batch that is worth a pack, where what is copied stays behind as well.
	moveLeast = 1 << 20
	// moveWorkers read at a time: what lies in many small files waits for the disk.
	moveWorkers = 8
	// moveSay is how often the log tells how far it is.
	moveSay = 10 * time.Second
	// moveInMemory is the largest payload that is read whole.
	moveInMemory = 1 << 20
)

// oldLayout moves what an older layout has left, and keeps what running containers need of it.
type oldLayout struct {
	*packed
	*catalog
	old oldObjects
	// former is what running containers need from before an upgrade. The catalog's mu guards it.
	former keptFormer
}

// oldObjects is what objects/ still holds.
type oldObjects struct {
	mu            sync.Mutex // held by who moves
	bytes, inodes atomic.Int64
	// lost are those of which the log has told that they are damaged. Under mu.
	lost map[content.ObjectID]bool
}

func (o *oldObjects) usage() Usage { return Usage{Bytes: o.bytes.Load(), Inodes: o.inodes.Load()} }

// oldLeft reports whether the layout before packs has left something.
func (l *oldLayout) oldLeft() bool { return l.old.inodes.Load() > 0 }

// mover is one round of moving.
type mover struct {
	l     *oldLayout
	files map[content.ObjectID]struct{} // what is in objects/
	// needed reports whether an overlay of the old kind may look an object up.
	needed func(content.ObjectID) bool
	// unsure: not all that layers name is known, so nothing is removed for want of a name.
	unsure bool
	batch  int64 // the largest

	mu     sync.Mutex // guards what follows
	copied []content.ObjectID
	later  []content.ObjectID // did not fit into this batch
	lost   int
}

// moveOld moves what is in objects/ into packs, as far as there is room, and removes what nobody needs there. Others
// may use the store meanwhile. What could not be moved stays bad.
func (l *oldLayout) moveOld(ctx context.Context) (err error) {
	l.old.mu.Lock()
	defer l.old.mu.Unlock()
	if l.old.lost == nil {
		l.old.lost = map[content.ObjectID]bool{}
	}
	m := &mover{l: l, files: map[content.ObjectID]struct{}{}, unsure: l.uncounted(), batch: moveBatch}
	if l.opts.moveBatch > 0 {
		m.batch = l.opts.moveBatch
	}
	if found, err := m.list(); err != nil || !found {
		return err
	}
	defer func() { err = errors.Join(err, m.finish(ctx)) }()
	if m.needed, err = l.neededByOldMounts(ctx); err != nil {
		return err
	}
	if err := m.clear(ctx); err != nil {
		return err
	}
	return m.move(ctx)
}

// list looks at what is there. found is false when there is no such directory.
func (m *mover) list() (found bool, err error) {
	dir := m.l.path(dirObjects)
	shards, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list objects of the old layout: %w", err)
	}
	for _, shard := range shards {
		if shard.Name() == fileBoot {
			continue
		}
		names, err := readNames(filepath.Join(dir, shard.Name()))
		if errors.Is(err, unix.ENOTDIR) && !m.unsure {
			err = os.Remove(filepath.Join(dir, shard.Name()))
		}
		if err != nil {
			return false, fmt.Errorf("list objects of the old layout: %w", err)
		}
		for _, name := range names {
			if sum, err := content.ParseSum(shard.Name() + name); err == nil {
				m.files[content.ObjectID{Sum: sum}] = struct{}{}
			} else if err := os.RemoveAll(filepath.Join(dir, shard.Name(), name)); err != nil {
				return false, fmt.Errorf("remove what a crash left: %w", err)
			}
		}
	}
	return true, nil
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// clear removes what needs no moving: nothing names it, or a pack has it. It makes room for the rest.
func (m *mover) clear(ctx context.Context) error {
	var moved []content.ObjectID
	for id := range m.files {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case m.needed(id):
		case m.l.stored(id):
			moved = append(moved, id)
		case !m.l.objects.Has(id) && !m.unsure:
			if err := m.unlink(id); err != nil {
				return err
			}
		}
	}
	if len(moved) == 0 {
		return nil
	}
	// The process that copied them may not have come to the sync, and the machine may have gone since.
	if err := m.l.Sync(); err != nil {
		return err
	}
	if err := m.l.verifyObjects(ctx, moved, func(int64) {}); err != nil {
		return fmt.Errorf("verify what was moved before: %w", m.l.explain(err))
	}
	for _, id := range moved {
		if !m.l.stored(id) {
			continue
		}
		if err := m.unlink(id); err != nil {
			return err
		}
	}
	return nil
}

// stored reports whether a pack has an object, as far as is known.
func (l *oldLayout) stored(id content.ObjectID) bool {
	_, ok := l.objects.Place(id)
	return ok && !l.objects.IsBad(id)
}

// move copies what layers name into packs: first what goes from objects/ then, which needs no room in the end.
func (m *mover) move(ctx context.Context) error {
	gone, stay, err := m.order(ctx)
	if err != nil || len(gone)+len(stay) == 0 {
		return err
	}
	left := len(gone) + len(stay)
	log.G(ctx).WithFields(log.Fields{"payloads": left, "kept": len(stay)}).
		Info("upgrade: moving payloads from objects/ into packs; running containers go on")
	said := time.Now()
	for i, ids := range [][]content.ObjectID{gone, stay} {
		for len(ids) > 0 && err == nil {
			before := len(ids)
			ids, err = m.next(ctx, ids, i == 1)
			if left -= before - len(ids); time.Since(said) > moveSay {
				log.G(ctx).WithField("left", left).Info("upgrade: moving payloads into packs")
				said = time.Now()
			}
		}
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			log.G(ctx).WithError(err).Errorf("upgrade: no room to move %d payloads: layers that name them are out of service "+
				"(remove images, or stop containers that were started before the upgrade)", left)
			return nil
		}
		if err != nil {
			return err
		}
	}
	if m.lost > 0 {
		log.G(ctx).Errorf("upgrade: %d payloads in objects/ are damaged: see `dedupctl fsck`", m.lost)
	}
	return nil
}

// order lists what is to be moved: layer by layer as they came in, each in the order of its tree, since files of one
// directory are read together. gone are those that leave objects/, stay the others.
func (m *mover) order(ctx context.Context) (gone, stay []content.ObjectID, err error) {
	todo := map[content.ObjectID]struct{}{}
	for id := range m.files {
		if m.l.objects.Has(id) && !m.l.stored(id) {
			todo[id] = struct{}{}
		}
	}
	add := func(id content.ObjectID) {
		if _, ok := todo[id]; !ok {
			return
		}
		delete(todo, id)
		if m.needed(id) {
			stay = append(stay, id)
		} else {
			gone = append(gone, id)
		}
	}
	layers := m.l.List()
	when := map[content.LayerID]int64{}
	for _, l := range layers {
		if fi, err := os.Stat(m.l.treePath(l.ID)); err == nil {
			when[l.ID] = fi.ModTime().UnixNano()
		}
	}
	slices.SortStableFunc(layers, func(a, b Listed) int { return int(when[a.ID] - when[b.ID]) })
	for _, l := range layers {
		if len(todo) == 0 || ctx.Err() != nil {
			break
		}
		err := tree.Files(m.l.treePath(l.ID), l.ID, func(f *tree.File) error {
			add(f.Object)
			return nil
		})
		if err != nil && !isDamage(err) {
			return nil, nil, fmt.Errorf("read layer %s: %w", l.ID, m.l.explain(err))
		}
	}
	for id := range todo { // trees whose header alone can be read
		add(id)
	}
	return gone, stay, context.Cause(ctx)
}

// next moves one batch, and returns what is left. It keeps the reserve where what is copied stays in objects/ too.
func (m *mover) next(ctx context.Context, ids []content.ObjectID, stay bool) ([]content.ObjectID, error) {
	limit := min(m.batch, m.l.free()/2)
	for stay {
		err := m.l.hasRoom(limit)
		if err == nil {
			break
		}
		if limit /= 4; limit < moveLeast {
			return ids, err
		}
	}
	left, err := m.copyBatch(ctx, ids, limit)
	if errors.Is(err, unix.ENOSPC) && !stay {
		left, err = m.copyBatch(ctx, ids, 0) // one at a time
	}
	return left, err
}

// copyBatch copies the first of ids into a pack, up to limit bytes but at least one, and removes them from objects/
// when they are on the disk. It returns the others.
func (m *mover) copyBatch(ctx context.Context, ids []content.ObjectID, limit int64) (_ []content.ObjectID, err error) {
	m.copied, m.later = nil, nil
	sync, stop, err := m.l.watch()
	if err != nil {
		return ids, err
	}
	defer stop()
	w := m.l.objects.Begin()
	defer func() { err = errors.Join(err, w.End(nil)) }()
	var bytes atomic.Int64
	var full atomic.Bool
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(moveWorkers)
	n := 0
	for ; n < len(ids) && !full.Load() && gctx.Err() == nil; n++ {
		id := ids[n]
		g.Go(func() error {
			return m.copyOne(gctx, w, id, func(size int64) bool {
				sum := bytes.Add(size)
				if sum <= limit || sum == size {
					return true
				}
				full.Store(true)
				bytes.Add(-size)
				return false
			})
		})
	}
	if err := g.Wait(); err != nil {
		return ids, err
	}
	if _, err := w.Seal(); err != nil {
		return ids, err
	}
	if err := sync(); err != nil {
		return ids, err
	}
	m.l.step("upgrade.synced")
	for _, id := range m.copied {
		if m.needed(id) {
			continue
		}
		if err := m.unlink(id); err != nil {
			return ids, err
		}
		m.l.step("upgrade.unlinked")
	}
	return append(m.later, ids[n:]...), nil
}

// copyOne copies a payload, if fits says that this batch still has room. One that is damaged is left alone.
func (m *mover) copyOne(ctx context.Context, w *object.Writer, id content.ObjectID, fits func(int64) bool) error {
	err := m.put(ctx, w, id, fits)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil:
		m.copied = append(m.copied, id)
	case errors.Is(err, errFull):
		m.later = append(m.later, id)
	case ctx.Err() == nil && isDamage(err):
		m.lost++
		if !m.l.old.lost[id] {
			log.G(ctx).WithError(err).Errorf("upgrade: object %s cannot be moved", id)
			m.l.old.lost[id] = true
		}
	default:
		return fmt.Errorf("move object %s into a pack: %w", id, m.l.explain(err))
	}
	return nil
}

// errFull means that a batch has no room for one more.
var errFull = errors.New("the batch is full")

func (m *mover) put(ctx context.Context, w *object.Writer, id content.ObjectID, fits func(int64) bool) error {
	fd, err := unix.Open(m.path(id), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("it is no regular file: %w", object.ErrDamaged)
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), m.path(id))
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() == 0 {
		return fmt.Errorf("it is no regular file, or empty: %w", object.ErrDamaged)
	}
	if !fits(fi.Size()) {
		return errFull
	}
	src := &hashed{r: ctxReader{ctx, f}, h: sha256.New(), left: fi.Size(), want: id}
	if fi.Size() <= moveInMemory {
		buf, err := m.l.buffers.get(ctx, int(fi.Size()))
		if err != nil {
			return err
		}
		defer buf.release()
		if _, err := io.ReadFull(src, buf.data); err != nil {
			return cut(err)
		}
		_, err = w.Put(id, buf.data)
		return err
	}
	_, _, err = w.PutStream(src, fi.Size(), func() content.ObjectID { return id })
	return cut(err)
}

// cut tells a file that became shorter from other errors.
func cut(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", object.ErrDamaged, err)
	}
	return err
}

// hashed gives an error with the last of its bytes when they have not the sha256 that they should have.
type hashed struct {
	r    io.Reader
	h    hash.Hash
	left int64
	want content.ObjectID
}

func (r *hashed) Read(p []byte) (int, error) {
	n, err := r.r.Read(p[:min(int64(len(p)), r.left)])
	r.h.Write(p[:n])
	if r.left -= int64(n); r.left > 0 || err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	if sum := content.Sum(r.h.Sum(nil)); sum != r.want.Sum {
		return 0, fmt.Errorf("its bytes have sha256 %s: %w", sum, object.ErrDamaged)
	}
	return n, nil
}

func (m *mover) path(id content.ObjectID) string { return m.l.path(dirObjects, id.Path()) }

func (m *mover) unlink(id content.ObjectID) error {
	if err := os.RemoveAll(m.path(id)); err != nil {
		return fmt.Errorf("remove object of the old layout: %w", err)
	}
	return nil
}

// finish removes directories that have become empty, and notes what is left.
func (m *mover) finish(ctx context.Context) error {
	dir := m.l.path(dirObjects)
	shards, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list objects of the old layout: %w", err)
	}
	left := 0
	for _, shard := range shards {
		if shard.Name() != fileBoot && os.Remove(filepath.Join(dir, shard.Name())) != nil {
			left++
		}
	}
	if left == 0 {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove objects of the old layout: %w", err)
		}
		m.l.step("upgrade.done")
	}
	u, err := Usage{}, error(nil)
	if left > 0 {
		u, err = DiskUsage(context.WithoutCancel(ctx), dir)
	}
	m.l.old.bytes.Store(u.Bytes)
	m.l.old.inodes.Store(u.Inodes)
	return err
}

// free is how many bytes the file system has for us.
func (d *directory) free() int64 {
	var st unix.Statfs_t
	if unix.Fstatfs(d.rootFd, &st) != nil {
		return 0
	}
	return int64(st.Bavail) * st.Bsize
}
