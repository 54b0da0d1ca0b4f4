package integration

import (
	"crypto/sha256"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// stored is a payload in a pack of a node's store.
type stored struct {
	id   content.ObjectID
	path string // of the pack
	at   int64  // first byte there
	size int64
}

// payloads lists what the packs of a node hold, those of newer packs first.
func payloads(t *testing.T, n *node.Node) (all []stored) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.DedupRoot(), "packs/*.erofs"))
	must(t, err)
	slices.Reverse(paths)
	for _, path := range paths {
		f, err := os.Open(path)
		if os.IsNotExist(err) {
			continue // merged meanwhile
		}
		must(t, err)
		fi, err := f.Stat()
		must(t, err)
		p, err := erofs.OpenPack(f, fi.Size())
		must(t, err)
		must(t, f.Close())
		for _, s := range p.Slots {
			if s.Size > 0 {
				all = append(all, stored{s.ID, path, s.Offset, s.Size})
			}
		}
	}
	return all
}

// packed tells how many bytes lie in packs, finished or not.
func packed(n *node.Node) (sum int64) {
	for _, pattern := range []string{"packs/*", "ingest/pack-*"} {
		paths, _ := filepath.Glob(filepath.Join(n.DedupRoot(), pattern))
		for _, path := range paths {
			if fi, err := os.Stat(path); err == nil {
				sum += fi.Size()
			}
		}
	}
	return sum
}

// dropCache takes all payloads out of the page cache, as far as nobody maps them: the packs, and what is mounted of
// them.
func dropCache(t *testing.T, n *node.Node) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.DedupRoot(), "packs/*.erofs"))
	must(t, err)
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if f[2] != "erofs" || !strings.HasPrefix(f[0], n.DedupRoot()+"/") { // a test may have moved the run directory
			continue
		}
		err := filepath.WalkDir(f[1], func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				paths = append(paths, path)
			}
			return nil // an image that is not needed any more is unmounted meanwhile
		})
		must(t, err)
	}
	for _, path := range paths {
		dropFile(t, path)
	}
}

// payloadOf finds the payload with these bytes.
func payloadOf(t *testing.T, n *node.Node, data string) stored {
	t.Helper()
	id := content.ObjectID{Sum: sha256.Sum256([]byte(data))}
	all := payloads(t, n)
	i := slices.IndexFunc(all, func(s stored) bool { return s.id == id })
	if i < 0 {
		t.Fatalf("no pack has the payload %s", id)
	}
	return all[i]
}

// read returns the payload's bytes as they are.
func (s stored) read(t *testing.T) []byte {
	t.Helper()
	f, err := os.Open(s.path)
	must(t, err)
	defer f.Close()
	b := make([]byte, s.size)
	_, err = f.ReadAt(b, s.at)
	must(t, err)
	return b
}

// write changes the payload in place, from its beginning. A container may have the pack mounted.
func (s stored) write(t *testing.T, b []byte) {
	t.Helper()
	f, err := os.OpenFile(s.path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(b[:min(int64(len(b)), s.size)], s.at)
	must(t, err)
	must(t, f.Close())
}

// flip changes one byte in the middle of the payload.
func (s stored) flip(t *testing.T) {
	t.Helper()
	b := s.read(t)
	b[len(b)/2] ^= 0x40
	s.write(t, b)
}
