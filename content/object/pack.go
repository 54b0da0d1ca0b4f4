package object

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// pack is a sealed pack. The mu of Packs guards what changes.
type pack struct {
	id   content.PackID
	file *os.File // open for reading until it is removed
	tag  string   // what proves the file: see erofs.Device
	// slots are where payloads lie; one of size 0 holds none.
	slots []extent
	dense bool   // see erofs.Pack
	meta  uint32 // blocks of 4 KiB before the metadata
	// payloads is how many bytes those in slots, and those that were given up, take in whole blocks.
	payloads int64
	blocks   uint32    // of the whole file
	plain    bool      // without fs-verity
	sealed   time.Time // zero: before Open
	read     time.Time // when it was first about to be read, zero for never since Open. Under mu of Packs
	// live is how many bytes objects take, in whole blocks, objects how many there are, holders how many chain images
	// name the pack.
	live    int64
	objects int
	holders int
	// damaged: not all that its trailer vouches for is what it was. Its payloads may be whole.
	damaged error
	// torn: it came to the disk in parts. Slots that hold something else do not count, but would at the next Open.
	torn bool
}

// extent is bytes of a pack's file.
type extent struct{ offset, size int64 }

// aligned is the whole blocks of 4 KiB that an extent lies in.
func (x extent) aligned() extent {
	at := x.offset &^ (content.BlockSize - 1)
	return extent{at, content.Blocks(x.offset + x.size - at)}
}

// space is what a payload takes.
func (p *pack) space(n uint32) int64 { return erofs.Space(p.slots[n].size, p.dense) }

func (p *pack) place(n uint32) content.Place {
	x := p.slots[n]
	return content.Place{Pack: p.id, N: n, Offset: x.offset, Size: x.size}
}

func (p *pack) revive(n uint32) {
	p.objects++
	p.live += p.space(n)
}

func (p *pack) die(n uint32) {
	p.objects--
	p.live -= p.space(n)
}

// dead is how many bytes hold payloads that nothing names.
func (p *pack) dead() int64 { return p.payloads - p.live }

func (p *pack) device() erofs.Device {
	return erofs.Device{Pack: p.id, Tag: p.tag, Blocks: p.blocks}
}

// Open opens or creates the directory of packs. staging, on the same file system, takes those that are being written.
// Load, then Settle have to follow before anything else. A pack that is damaged does not keep others from being served.
func Open(dir, staging string, opts Options) (*Store, error) {
	if !opts.ReadOnly {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("create packs directory: %w", err)
		}
	}
	ps := &Packs{
		dir: dir, staging: staging, opts: opts, all: map[content.PackID]*pack{}, sealing: map[content.PackID]struct{}{},
		turn: make(chan struct{}, freers),
	}
	s := &Store{index: newIndex(), packs: ps, packMax: packMax}
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list packs: %w", err)
	}
	for _, name := range names { // oldest first: the newest place of a payload counts
		id, ok := parseName(name.Name())
		if !ok {
			continue // Settle looks at it
		}
		ps.last = max(ps.last, id)
		p, read, err := openPack(ps.Path(id), id)
		if err != nil {
			if !errors.Is(err, erofs.ErrDamaged) && !errors.Is(err, unix.EIO) {
				return nil, errors.Join(fmt.Errorf("open pack %s: %w", ps.Path(id), err), s.Close())
			}
			log.L.WithError(err).Errorf("pack %s is damaged: "+
				"layers with payloads that only it has are out of service", ps.Path(id))
			continue
		}
		whole, err := p.wholeSlots(read, opts.Since)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open pack %s: %w", ps.Path(id), err), p.file.Close(), s.Close())
		}
		ps.add(p)
		for n, slot := range read.Slots {
			if slot.Size > 0 && whole(n) {
				s.refs[slot.ID] = ref{n: uint32(n), pack: p}
			}
		}
	}
	for _, id := range opts.Held {
		if p := ps.all[id]; p != nil {
			p.holders++
		}
	}
	ps.MeasureDirectories()
	return s, nil
}

// wholeSlots tells which slots of a pack hold what the table says. It reads those of packs that may not be on the
// disk as a whole: those written after since, if it is not zero.
func (p *pack) wholeSlots(read *erofs.Pack, since time.Time) (func(n int) bool, error) {
	fi, err := p.file.Stat()
	if err != nil {
		return nil, err
	}
	if since.IsZero() || !fi.ModTime().After(since) {
		return func(int) bool { return true }, nil
	}
	buf, torn := NewVerifyBuffer(), map[int]bool{}
	for n, slot := range read.Slots {
		if slot.Size == 0 {
			continue
		}
		_, err := p.verify(context.Background(), slot.ID, p.slots[n], buf)
		if err != nil && !errors.Is(err, ErrDamaged) {
			return nil, err
		}
		if err != nil {
			log.L.WithError(err).Warnf("pack %s is only partly on the disk", p.file.Name())
			p.torn, torn[n] = true, true
		}
	}
	return func(n int) bool { return !torn[n] }, nil
}

// find looks in the packs' tables for objects without a place. Under both locks.
func (s *Store) find(ids []content.ObjectID) {
	want := map[content.ObjectID]bool{}
	for _, id := range ids {
		want[id] = s.refs[id].pack == nil
	}
	packs := slices.SortedFunc(maps.Values(s.packs.all), func(a, b *pack) int { return cmp.Compare(b.id, a.id) })
	for _, p := range packs { // newest first
		read, err := erofs.OpenPack(p.file, int64(p.blocks)*content.BlockSize)
		if err != nil {
			continue // whoever checks it finds out why
		}
		for n, slot := range read.Slots {
			if slot.Size == 0 || !want[slot.ID] {
				continue
			}
			want[slot.ID] = false
			s.refs[slot.ID] = ref{count: s.refs[slot.ID].count, n: uint32(n), pack: p}
			delete(s.bad, slot.ID)
			p.revive(uint32(n))
		}
	}
}

func parseName(name string) (content.PackID, bool) {
	text, ok := strings.CutSuffix(name, suffix)
	if !ok {
		return 0, false
	}
	return content.ParsePackID(text)
}

// openPack opens a sealed pack, and checks that it is what it says.
func openPack(path string, id content.PackID) (_ *pack, _ *erofs.Pack, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil, nil, fmt.Errorf("%w: it is no regular file", erofs.ErrDamaged)
	}
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%w: it is no regular file", erofs.ErrDamaged)
	}
	read, err := erofs.OpenPack(f, fi.Size())
	if err != nil {
		return nil, nil, err
	}
	if read.ID != id {
		return nil, nil, fmt.Errorf("%w: it says it is pack %s", erofs.ErrDamaged, read.ID)
	}
	p := newPack(f, read)
	return p, read, p.measure()
}

// measure asks for fs-verity's digest, which proves more than the trailer's sum.
func (p *pack) measure() error {
	c, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var d verity.Digest
	if cerr := c.Control(func(fd uintptr) { d, err = verity.Measure(int(fd)) }); cerr != nil {
		return cerr
	}
	switch {
	case err == nil:
		p.tag, p.plain = d.Hex(), false
	case errors.Is(err, verity.ErrNone), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP):
	default:
		return fmt.Errorf("%w: %w", erofs.ErrDamaged, err)
	}
	return nil
}

// occupies is what the pack takes of the disk, in bytes. ext4 and f2fs keep fs-verity's hashes in the file.
func (p *pack) occupies() int64 {
	size := int64(p.blocks) * content.BlockSize
	if !p.plain {
		size += verity.Space(size)
	}
	return size
}

func newPack(f *os.File, read *erofs.Pack) *pack {
	p := &pack{
		id: read.ID, file: f, tag: read.Sum.Hex(), dense: read.Dense, meta: read.Meta, blocks: read.Blocks, plain: true,
	}
	p.slots = make([]extent, len(read.Slots))
	for i, slot := range read.Slots {
		p.slots[i] = extent{slot.Offset, slot.Size}
		p.payloads = max(p.payloads, slot.Offset+p.space(uint32(i))-content.BlockSize)
	}
	return p
}

// Settle ends the loading: payloads that nothing has named are dead, and objects that no pack has are bad. With
// keepDead nothing is removed: it is not known what is named. It returns how many files it removed.
func (s *Store) Settle(keepDead bool) (removed int, err error) {
	s.lock()
	s.packs.keepDead, s.settled = keepDead, true
	for id, r := range s.refs {
		if r.count == 0 {
			delete(s.refs, id)
		}
	}
	s.unlock()
	if keepDead {
		return 0, nil
	}
	found, err := s.Orphans(context.Background(), true)
	return len(found), err
}

// Placed are the places of the objects of one chain image. It holds the packs until Release.
type Placed struct {
	of     *Packs
	places map[content.ObjectID]content.Place
	packs  []erofs.Device
	dense  bool
}

// Dense reports whether a chain image over these places needs small blocks: see erofs.Options.
func (p *Placed) Dense() bool { return p.dense }

// Place tells where an object lies.
func (p *Placed) Place(id content.ObjectID) (content.Place, bool) {
	place, ok := p.places[id]
	return place, ok
}

// Packs returns the packs, those with most objects first.
func (p *Placed) Packs() []erofs.Device { return p.packs }

// IDs returns the ids of the packs.
func (p *Placed) IDs() []content.PackID { return packIDs(p.packs) }

func packIDs(devices []erofs.Device) (ids []content.PackID) {
	for _, d := range devices {
		ids = append(ids, d.Pack)
	}
	return ids
}

// Release gives the packs up.
func (p *Placed) Release() error { return p.of.Release(p.IDs()) }

// Places finds the places of objects that the caller has references to, all at one moment. An object without one is
// bad, and the error wraps ErrDamaged. Where some lie in packs that are too dense it wraps ErrTooDense: Coarsen helps.
func (s *Store) Places(ids []content.ObjectID) (*Placed, error) {
	placed := &Placed{of: s.packs, places: make(map[content.ObjectID]content.Place, len(ids))}
	counts := map[*pack]int{}
	s.lock()
	defer s.unlock()
	for _, id := range ids {
		place, ok := s.place(id)
		if !ok {
			if s.refs[id].count > 0 {
				s.bad[id] = struct{}{}
			}
			return nil, fmt.Errorf("object %s is %w: no pack has it", id, ErrDamaged)
		}
		if p := s.refs[id].pack; s.packs.tooDense(p) {
			if _, bad := s.bad[id]; bad {
				return nil, fmt.Errorf("object %s is %w, and not copied to another pack", id, ErrDamaged)
			}
			return nil, fmt.Errorf("pack %s: %w", s.packs.Path(p.id), ErrTooDense)
		}
		placed.places[id] = place
		counts[s.refs[id].pack]++
	}
	order := make([]*pack, 0, len(counts))
	for p := range counts {
		order = append(order, p)
		p.holders++
	}
	slices.SortFunc(order, func(a, b *pack) int {
		if counts[a] != counts[b] {
			return counts[b] - counts[a]
		}
		return int(int64(a.id) - int64(b.id))
	})
	for _, p := range order {
		placed.packs = append(placed.packs, p.device())
		placed.dense = placed.dense || p.dense
	}
	return placed, nil
}

// dropCache has the kernel forget its pages of a file's first bytes, 0 for all.
func dropCache(f *os.File, length int64) {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.Fadvise(int(fd), 0, length, unix.FADV_DONTNEED) })
	}
}

// OrphanFile is a file that nothing names, and what it occupies.
type OrphanFile struct {
	Path  string
	Bytes int64
}

// Orphans looks for files in the directory of packs that hold no object and that no chain image names, and removes them
// if asked to. Others may use the store meanwhile.
func (s *Store) Orphans(ctx context.Context, remove bool) (found []OrphanFile, err error) {
	names, err := os.ReadDir(s.packs.dir)
	if err != nil {
		return nil, fmt.Errorf("look for orphans: %w", err)
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return found, context.Cause(ctx)
		}
		path := filepath.Join(s.packs.dir, name.Name())
		id, isPack := parseName(name.Name())
		s.lock()
		p := s.packs.all[id]
		_, sealing := s.packs.sealing[id]
		needed := isPack && (sealing || p != nil && (p.objects > 0 || p.holders > 0))
		// What a pack that cannot be read holds is known once nothing is missing.
		needed = needed || isPack && p == nil && len(s.bad) > 0
		var drop *pack
		if !needed && remove && isPack {
			drop = s.packs.droppable(p)
		}
		s.unlock()
		if needed {
			continue
		}
		fi, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && remove {
			if drop != nil {
				err = s.packs.remove(drop)
			} else {
				err = os.RemoveAll(path)
			}
		}
		if err != nil {
			return found, fmt.Errorf("remove orphan %s: %w", path, err)
		}
		found = append(found, OrphanFile{path, content.Blocks(fi.Size())})
	}
	return found, nil
}
