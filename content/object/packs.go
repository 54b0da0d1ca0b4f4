package object

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Packs are the files that hold objects: what keeps each of them, and what they occupy. Safe for concurrent use.
type Packs struct {
	dir, staging string
	opts         Options

	mu  sync.Mutex // guards what follows, and what changes in each pack
	all map[content.PackID]*pack
	// sealing packs have their names already, but are not among all yet.
	sealing map[content.PackID]struct{}
	last    content.PackID // the newest that was given out
	// keepDead: it is not known what is named, so nothing is removed.
	keepDead bool
	used     Counts
	freed    Counts
	merged   int64
	dirBytes int64

	freeing content.Tasks
	turn    chan struct{} // is held by who frees one
}

// Dir returns the directory of the packs.
func (ps *Packs) Dir() string { return ps.dir }

// Stats counts.
func (ps *Packs) Stats() (st Stats) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	st.Packs, st.Merged = len(ps.all), ps.merged
	for _, p := range ps.all {
		st.Live += p.live
		st.Dead += p.dead()
		if p.plain {
			st.Plain++
		}
		if ps.tooDense(p) {
			st.TooDense++
		}
	}
	return st
}

// Used returns what the packs occupy.
func (ps *Packs) Used() (bytes, files int64) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.used.Bytes, ps.used.Files
}

// Freed returns what has been removed since Open: bytes and packs.
func (ps *Packs) Freed() (bytes, files int64) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.freed.Bytes, ps.freed.Files
}

// Directories returns what the directory of the packs occupies, as of the last MeasureDirectories.
func (ps *Packs) Directories() (bytes, inodes int64) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.dirBytes, 1
}

// MeasureDirectories looks at the directory.
func (ps *Packs) MeasureDirectories() {
	var st unix.Stat_t
	if unix.Stat(ps.dir, &st) == nil {
		ps.mu.Lock()
		ps.dirBytes = st.Blocks * 512
		ps.mu.Unlock()
	}
}

// close closes the files; they stay as they are.
func (ps *Packs) close() error {
	ps.Wait()
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var errs []error
	for _, p := range ps.all {
		errs = append(errs, p.file.Close())
	}
	return errors.Join(errs...)
}

func (ps *Packs) step(name string) {
	if ps.opts.Step != nil {
		ps.opts.Step(name)
	}
}

// Path returns the file of a pack.
func (ps *Packs) Path(id content.PackID) string { return filepath.Join(ps.dir, id.String()+suffix) }

const suffix = ".erofs"

// newID returns the id of a new pack. Under mu.
func (ps *Packs) newID(now int64) content.PackID {
	ps.last = max(ps.last+1, content.PackID(now))
	return ps.last
}

// stage creates the file of a new pack.
func (ps *Packs) stage(id content.PackID) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(ps.staging, "pack-"+id.String()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, fmt.Errorf("begin pack: %w", err)
	}
	return f, nil
}

// begin starts a pack.
func (ps *Packs) begin() (*filling, error) {
	ps.mu.Lock()
	id := ps.newID(time.Now().UnixMicro())
	ps.mu.Unlock()
	f, err := ps.stage(id)
	if err != nil {
		return nil, err
	}
	return &filling{erofs.NewPackWriter(f, id, ps.opts.Dense), f}, nil
}

// seal ends a pack's file and puts it among the others, where it is safe until add or remove. The file is closed, or,
// without an error, becomes the pack's.
func (ps *Packs) seal(f *filling) (_ *pack, err error) {
	sealed, err := f.PackWriter.Seal()
	if err != nil {
		return nil, err
	}
	ps.mu.Lock()
	ps.sealing[sealed.ID] = struct{}{}
	ps.mu.Unlock()
	defer func() {
		if err != nil {
			ps.mu.Lock()
			delete(ps.sealing, sealed.ID)
			ps.mu.Unlock()
		}
	}()
	ps.step("pack.sealed")
	staged := f.file.Name()
	if ps.opts.Verity { // it is for files that nobody writes to
		if err := f.file.Close(); err != nil {
			return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
		}
		if err := verity.EnablePath(staged); err != nil {
			return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
		}
		ps.step("pack.verity")
	}
	if err := os.Rename(staged, ps.Path(sealed.ID)); err != nil {
		return nil, fmt.Errorf("seal pack %s: %w", sealed.ID, err)
	}
	ps.step("pack.renamed")
	r, err := os.Open(ps.Path(sealed.ID))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("seal pack %s: %w", sealed.ID, err), os.Remove(ps.Path(sealed.ID)))
	}
	if !ps.opts.Verity {
		_ = f.file.Close() // what it could tell of the disk, the sync tells
	}
	p := newPack(r, sealed)
	p.sealed = time.Now()
	if err := p.measure(); err != nil {
		return nil, errors.Join(fmt.Errorf("seal pack %s: %w", sealed.ID, err), r.Close(), os.Remove(ps.Path(sealed.ID)))
	}
	return p, nil
}

// add makes a sealed pack one of the store's. Under mu, or before the store is shared.
func (ps *Packs) add(p *pack) {
	delete(ps.sealing, p.id)
	ps.all[p.id] = p
	ps.used.Bytes += p.occupies()
	ps.used.Files++
}

// droppable takes a pack out of the store that nobody needs, and returns it. Under mu.
func (ps *Packs) droppable(p *pack) *pack {
	if p == nil || p.objects > 0 || p.holders > 0 || ps.keepDead || ps.all[p.id] != p {
		return nil
	}
	delete(ps.all, p.id)
	ps.used.Bytes -= p.occupies()
	ps.used.Files--
	ps.freed.Bytes += p.occupies()
	ps.freed.Files++
	return p
}

// emptied looks at packs that have lost objects: those that chain images still name, and those that go. Under mu.
func (ps *Packs) emptied(packs map[*pack]bool) (held []content.PackID, drops []*pack) {
	for p := range packs {
		if d := ps.droppable(p); d != nil {
			drops = append(drops, d)
		} else if p.holders > 0 {
			held = append(held, p.id)
		}
	}
	return held, drops
}

// remove unlinks a pack that is not the store's any more, and has the file system free it in the background, see Wait.
// Who has it mounted keeps its bytes.
func (ps *Packs) remove(p *pack) error {
	if p == nil {
		return nil
	}
	err := os.Remove(ps.Path(p.id))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	ps.mu.Lock()
	delete(ps.sealing, p.id)
	ps.mu.Unlock()
	ps.step("pack.removed")
	ps.free(func() { _ = p.file.Close() }) // it was only read
	return err
}

// free runs in the background what has the kernel free a pack, or its pages in memory: of a large one that takes tens
// of milliseconds.
func (ps *Packs) free(fn func()) {
	ps.freeing.Go(func() {
		ps.turn <- struct{}{}
		defer func() { <-ps.turn }()
		fn()
	})
}

// Wait waits until the file system has freed the packs that were removed by now, but for those that are mounted.
func (ps *Packs) Wait() { ps.freeing.Wait() }

// freers is how many packs are freed at a time.
const freers = 2

func (ps *Packs) tellMoved(packs []content.PackID, damaged bool) {
	if len(packs) > 0 && ps.opts.Moved != nil {
		ps.opts.Moved(packs, damaged)
	}
}

// Hold notes that a chain image names packs, until Release. A pack that is not there is an error, and none is held
// then.
func (ps *Packs) Hold(ids []content.PackID) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, id := range ids {
		if ps.all[id] == nil {
			return fmt.Errorf("pack %s: %w", id, fs.ErrNotExist)
		}
	}
	for _, id := range ids {
		ps.all[id].holders++
	}
	return nil
}

// Release is the reverse of Hold.
func (ps *Packs) Release(ids []content.PackID) error {
	var errs []error
	for _, id := range ids {
		ps.mu.Lock()
		p := ps.all[id]
		if p != nil && p.holders > 0 {
			p.holders--
		}
		drop := ps.droppable(p)
		ps.mu.Unlock()
		errs = append(errs, ps.remove(drop))
	}
	return errors.Join(errs...)
}

// Device returns what a chain image says of a pack, and whether the pack is there.
func (ps *Packs) Device(id content.PackID) (erofs.Device, bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[id]
	if p == nil {
		return erofs.Device{}, false
	}
	return p.device(), true
}

// tooDense tells a pack that no chain image can be made over here.
func (ps *Packs) tooDense(p *pack) bool { return p.dense && !ps.opts.Dense }

// growth is how many bytes more, at most, what lives in a pack takes where it is copied to.
func (ps *Packs) growth(p *pack) int64 {
	if !ps.tooDense(p) {
		return 0
	}
	return int64(p.objects) * (content.BlockSize - erofs.DenseBlock)
}

// Superseded reports whether a pack has no object any more: only chain images keep it.
func (ps *Packs) Superseded(id content.PackID) bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[id]
	return p == nil || p.objects == 0
}

// NoteReads notes that somebody is about to read packs through the file systems in them.
func (ps *Packs) NoteReads(ids []content.PackID) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, id := range ids {
		if p := ps.all[id]; p != nil && p.read.IsZero() {
			p.read = time.Now()
		}
	}
}

// DropCache has the kernel forget its pages of the payloads in packs' files. A mounted pack's payloads are cached once
// more, by the file system in it; its metadata are not. It leaves alone the packs that were sealed since Open and have
// not been read before a time, nor were sealed before another one.
func (ps *Packs) DropCache(read, sealed time.Time) {
	ps.mu.Lock()
	packs := make([]*pack, 0, len(ps.all))
	for _, p := range ps.all {
		if p.sealed.Before(sealed) || !p.read.IsZero() && p.read.Before(read) {
			packs = append(packs, p)
		}
	}
	ps.mu.Unlock()
	for _, p := range packs {
		dropCache(p.file, int64(p.meta)*content.BlockSize)
	}
}

// Check reads again what each pack says of itself, and returns those that are damaged. Their objects may be whole.
func (ps *Packs) Check(ctx context.Context) (found []DamagedPack, err error) {
	ps.mu.Lock()
	packs := make([]*pack, 0, len(ps.all))
	for _, p := range ps.all {
		packs = append(packs, p)
	}
	ps.mu.Unlock()
	for _, p := range packs {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		damage := p.check()
		if damage != nil && !isDamage(damage) && !errors.Is(damage, erofs.ErrDamaged) {
			return found, fmt.Errorf("pack %s: %w", ps.Path(p.id), damage)
		}
		ps.mu.Lock()
		if ps.all[p.id] != p {
			damage = nil // removed meanwhile
		}
		p.damaged = damage
		ps.mu.Unlock()
		if damage != nil {
			found = append(found, DamagedPack{ps.Path(p.id), damage})
		}
	}
	return found, nil
}
