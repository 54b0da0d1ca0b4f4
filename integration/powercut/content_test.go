package powercut

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// recipe is what a layer's files follow from. Variants have the same payload, and other times and owners.
type recipe struct {
	Seed    uint64
	Variant int
	// Plain: no bytecode. Big: one file is larger than what is buffered in memory.
	Plain, Big bool
}

// entries are the layer's. Many layers share some of their files.
func (c recipe) entries() []image.Entry {
	r := rand.New(rand.NewPCG(c.Seed, 1))
	add := []image.Entry{image.Dir("dir"), image.Dir("pkg"), image.Dir("pkg/__pycache__")}
	for range 1 + r.IntN(8) {
		which := r.IntN(40)
		add = append(add, image.File(fmt.Sprintf("shared-%d", which), payload(uint64(which), 40_000)))
	}
	for range r.IntN(4) {
		add = append(add, image.File(fmt.Sprintf("dir/own-%x", r.Uint64()), payload(r.Uint64(), 80_000)))
	}
	if c.Big {
		text := payload(100, 9000)
		add = append(add, image.File("big", strings.Repeat(text, 1+17<<20/len(text))))
	}
	add = append(add, image.Symlink("link", fmt.Sprintf("dir/target-%x", c.Seed)))
	for i := range r.IntN(3) {
		if c.Plain {
			break
		}
		add = append(add, python(fmt.Sprintf("m%x_%d", c.Seed, i), payload(r.Uint64(), 3000), c.time())...)
	}
	seen := map[string]bool{}
	var all []image.Entry
	for _, e := range add {
		if seen[e.Name] {
			continue
		}
		seen[e.Name] = true
		e.UID, e.GID, e.Time = 10*c.Variant, 20*c.Variant, c.time()
		all = append(all, e)
	}
	if hidden := fmt.Sprintf("shared-%d", r.IntN(40)); !seen[hidden] {
		all = append(all, image.File(".wh."+hidden, ""))
	}
	return all
}

func (c recipe) time() time.Time { return time.Unix(1_700_000_000+1000*int64(c.Variant), 0) }

// payload is noise of a length that follows from the seed as well.
func payload(seed uint64, most int) string {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	r := rand.NewChaCha8(key)
	b := make([]byte, 1+r.Uint64()%uint64(most))
	_, _ = r.Read(b) // it never fails
	return string(b)
}

// python is a source with bytecode that was compiled from it.
func python(name, source string, t time.Time) []image.Entry {
	code := binary.LittleEndian.AppendUint16(nil, 3495) // CPython 3.11
	code = append(code, '\r', '\n', 0, 0, 0, 0)
	code = binary.LittleEndian.AppendUint32(code, uint32(t.Unix()))
	code = binary.LittleEndian.AppendUint32(code, uint32(len(source)))
	return []image.Entry{
		image.File("pkg/"+name+".py", source),
		image.File("pkg/__pycache__/"+name+".cpython-311.pyc", string(code)+source+source),
	}
}

// tar is the layer as a registry serves it.
func (c recipe) tar() ([]byte, error) {
	var b bytes.Buffer
	err := image.WriteEntries(&b, c.entries())
	return b.Bytes(), err
}

// fill writes the layer into the upper directory of an overlay.
func (c recipe) fill(upper string) error {
	for _, e := range c.entries() {
		at := filepath.Join(upper, e.Name)
		var err error
		switch {
		case e.Type == tar.TypeDir:
			err = os.Mkdir(at, 0o755)
		case e.Type == tar.TypeSymlink:
			err = os.Symlink(e.Link, at)
		case strings.HasPrefix(path.Base(e.Name), ".wh."):
			at = filepath.Join(filepath.Dir(at), strings.TrimPrefix(filepath.Base(at), ".wh."))
			if err := unix.Mknod(at, unix.S_IFCHR, 0); err != nil {
				return err
			}
			continue
		default:
			err = os.WriteFile(at, []byte(e.Content), 0o644)
		}
		if err == nil {
			err = os.Lchown(at, e.UID, e.GID)
		}
		if err == nil {
			ts := unix.NsecToTimespec(e.Time.UnixNano())
			err = unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// snapshot is what a client asked for.
type snapshot struct {
	// Name, or "" with Suffix where the store chooses the name.
	Name, Suffix string
	Client       string // containerd namespace
	Parent       string
	Recipe       recipe
	Fidelity     content.Fidelity
	// Active: there is no layer, only a directory on the parent.
	Active bool
}

// references are what layers show, made once. Safe for concurrent use.
type references struct {
	mu   sync.Mutex // guards made
	made map[reference]rootfs.Tree
}

type reference struct {
	recipe   recipe
	fidelity content.Fidelity
}

// of returns the entries of a layer; whiteouts have no type.
func (r *references) of(s snapshot) rootfs.Tree {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := reference{s.Recipe, s.Fidelity}
	if t, ok := r.made[key]; ok {
		return t
	}
	t := rootfs.Tree{}
	for _, e := range s.Recipe.entries() {
		name := strings.TrimSuffix(e.Name, "/")
		if hidden, ok := strings.CutPrefix(path.Base(name), ".wh."); ok {
			t[path.Join(path.Dir(name), hidden)] = rootfs.Entry{}
			continue
		}
		t[name] = shown(e, s.Fidelity)
	}
	r.made[key] = t
	return t
}

// expected is what a mount of chain, base first, shows, and what is not to be compared.
func (r *references) expected(chain []snapshot) (rootfs.Tree, rootfs.DiffOptions) {
	tree, opts := rootfs.Tree{}, rootfs.DiffOptions{Paths: []string{"."}}
	loose := map[string]bool{} // normalized takes times and owners of another
	for _, s := range chain {
		if s.Active {
			continue
		}
		for name, e := range r.of(s) {
			if e.Type == "" {
				delete(tree, name)
				continue
			}
			tree[name] = e
			loose[name] = s.Fidelity == content.Normalized
		}
	}
	for name := range loose {
		if loose[name] {
			opts.Times, opts.Owners = append(opts.Times, name), append(opts.Owners, name)
		}
	}
	return tree, opts
}

func shown(e image.Entry, f content.Fidelity) rootfs.Entry {
	h := e.Header()
	out := rootfs.Entry{Mode: uint32(h.Mode), UID: uint32(e.UID), GID: uint32(e.GID), MTime: e.Time.UTC(), Nlink: 1}
	switch e.Type {
	case tar.TypeDir:
		out.Type, out.Nlink = "dir", 0
		return out
	case tar.TypeSymlink:
		out.Type, out.Target, out.Size = "symlink", e.Link, int64(len(e.Link))
		return out
	}
	data := []byte(e.Content)
	if f != content.Exact {
		if _, ok := content.ParsePyc(data); ok { // its code is its source, twice
			code := data[content.PycHeaderLen:]
			content.SetPycTime(data, content.SourceTime(sha256.Sum256(code[:len(code)/2])))
		}
		if strings.HasSuffix(e.Name, ".py") {
			out.MTime = time.Unix(int64(content.SourceTime(sha256.Sum256(data))), 0).UTC()
		}
	}
	sum := sha256.Sum256(data)
	out.Type, out.Size, out.SHA256 = "file", int64(len(data)), hex.EncodeToString(sum[:])
	return out
}
