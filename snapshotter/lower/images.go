package lower

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/object"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Images are the files of chain images, and the packs that these hold. Safe for concurrent use.
type Images struct {
	dir   string
	packs *object.Packs
	// verity: each has fs-verity.
	verity bool

	mu sync.Mutex // guards what follows
	// images are those on the disk.
	images map[Name]*image
	used   layer.Usage // their sum
	// watches are told what moves while images are being built.
	watches map[*watch]bool
}

// image is what is known of a chain image's file.
type image struct {
	bytes int64 // of the disk
	// whole: the file says of itself what follows, and holds these packs.
	whole   bool
	devices []erofs.Device
	shared  bool
	dense   bool // it has small blocks: see erofs.Options
	// moved: payloads of its packs have moved to others. It is right, but keeps them. damaged: they were damaged.
	moved, damaged bool
}

func (im *image) ids() (ids []content.PackID) {
	if im.whole {
		for _, d := range im.devices {
			ids = append(ids, d.Pack)
		}
	}
	return ids
}

// ImageSuffix ends the names of chain images.
const ImageSuffix = ".erofs"

// Path is the file of a chain's image.
func (s *Images) Path(n Name) string { return filepath.Join(s.dir, n.Hex()+ImageSuffix) }

// read looks at the file of an image.
func (s *Images) read(n Name) (*image, error) {
	f, err := os.Open(s.Path(n))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("measure chain image: %w", err)
	}
	chain, err := erofs.ReadChain(f, st.Size)
	return &image{
		bytes: st.Blocks * 512, whole: true, devices: chain.Packs, shared: chain.Redirect, dense: chain.Dense,
	}, err
}

// set notes what the image of a chain is now; nil for none.
func (s *Images) set(n Name, im *image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.images[n]; old != nil {
		s.used.Bytes -= old.bytes
		s.used.Inodes--
		delete(s.images, n)
	}
	if im != nil {
		s.images[n] = im
		s.used.Bytes += im.bytes
		s.used.Inodes++
	}
}

// known returns what is known of a chain's image, nil when there is none.
func (s *Images) known(n Name) *image {
	s.mu.Lock()
	defer s.mu.Unlock()
	if im := s.images[n]; im != nil {
		copied := *im
		return &copied
	}
	return nil
}

// Size returns what a chain's image occupies; false when there is none.
func (s *Images) Size(n Name) (bytes int64, ok bool) {
	im := s.known(n)
	if im == nil {
		return 0, false
	}
	return im.bytes, true
}

// Has reports whether a chain has an image.
func (s *Images) Has(n Name) bool {
	_, err := os.Stat(s.Path(n))
	return err == nil
}

// Usage is what all images occupy.
func (s *Images) Usage() layer.Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

// remove removes the image's file, which gives its packs up.
func (s *Images) remove(n Name) error {
	im := s.known(n)
	if err := os.RemoveAll(s.Path(n)); err != nil {
		return fmt.Errorf("remove chain image: %w", err)
	}
	if im == nil {
		return nil
	}
	s.set(n, nil)
	return s.packs.Release(im.ids())
}

// isCurrent reports whether an image can be mounted as it is.
func (s *Images) isCurrent(n Name) bool {
	im := s.known(n)
	if im == nil || !im.whole || im.moved || im.damaged || !s.Has(n) || !s.isHashed(n) {
		return false
	}
	for _, d := range im.devices { // a pack may have got fs-verity since
		if now, ok := s.packs.Device(d.Pack); !ok || now != d {
			return false
		}
	}
	return true
}

// isHashed reports whether an image has fs-verity, where it should. One that has not was copied here with the whole
// store, as backups are. Built again, it has it.
func (s *Images) isHashed(n Name) bool {
	if !s.verity {
		return true
	}
	f, err := os.Open(s.Path(n))
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = verity.Measure(int(f.Fd()))
	return err == nil
}

// isStale reports whether an image keeps packs that nothing else needs.
func (s *Images) isStale(n Name) bool {
	im := s.known(n)
	return im != nil && (im.moved || im.damaged || slices.ContainsFunc(im.ids(), s.packs.Superseded))
}

// watch is told which packs lose payloads while an image is being built over them.
type watch struct {
	moved, damaged map[content.PackID]bool
}

func (s *Images) watch() (w *watch, end func()) {
	w = &watch{map[content.PackID]bool{}, map[content.PackID]bool{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watches[w] = true
	return w, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watches, w)
	}
}

// settle notes what has moved while an image was being built.
func (s *Images) settle(n Name, w *watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.images[n].devices {
		s.images[n].moved = s.images[n].moved || w.moved[d.Pack]
		s.images[n].damaged = s.images[n].damaged || w.damaged[d.Pack]
	}
}

// Moved notes that packs have lost payloads to others, because they were damaged or merged, and returns the chains
// whose images name them. Those go when they are not mounted any more (DropStale, Release); of damaged ones the next
// container gets a new one.
func (s *Images) Moved(packs []content.PackID, damaged bool) (stale []Name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		for _, id := range packs {
			w.moved[id], w.damaged[id] = true, w.damaged[id] || damaged
		}
	}
	for n, im := range s.images {
		if slices.ContainsFunc(im.devices, func(d erofs.Device) bool { return slices.Contains(packs, d.Pack) }) {
			im.moved, im.damaged = true, im.damaged || damaged
			stale = append(stale, n)
		}
	}
	return stale
}
