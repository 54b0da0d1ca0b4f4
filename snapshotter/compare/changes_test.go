package compare

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// listTar describes each member of a tar.
func listTar(r io.Reader) (all []string, err error) {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		all = append(all, fmt.Sprintf("%q type %c mode %o owner %d:%d size %d link %q device %d:%d time %s pax %q sum %x",
			h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.Linkname, h.Devmajor, h.Devminor, h.ModTime, h.PAXRecords,
			sha256.Sum256(data)))
	}
}

func check(errs ...error) {
	if err := errors.Join(errs...); err != nil {
		panic(err)
	}
}

func write(path, data string) {
	check(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644))
}

// plant makes files to change.
func plant(root string) {
	at := func(path string) string { return filepath.Join(root, path) }
	for _, dir := range []string{
		"etc", "usr/lib", "home/a", "home/b", "opt/deep", "opt/deep/er", "opt/deep/er/est", "gone/with/all", "opaque/inner",
		"z",
	} {
		check(os.MkdirAll(at(dir), 0o755))
		for _, name := range []string{"one", "two", "three", "a.b", "a-b", "a"} {
			write(at(dir+"/"+name), dir+name+strings.Repeat("x", len(name)*300))
		}
	}
	write(at("usr/lib/mod.py"), "print('module')\n")
	check(os.Link(at("etc/one"), at("etc/hard-1")), os.Link(at("etc/one"), at("home/a/hard-2")))
	check(os.Symlink("one", at("etc/link")), os.Symlink("/home", at("dirlink")), os.Symlink("same", at("etc/same-link")))
	check(unix.Mkfifo(at("etc/fifo"), 0o600), unix.Mknod(at("etc/device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	check(unix.Setxattr(at("etc/two"), "security.capability", capNetRaw, 0), os.Chmod(at("etc/three"), 0o4755))
	for _, path := range []string{"home/b/one", "home/b/two"} { // as from a tar: whole seconds
		check(os.Chtimes(at(path), moment, moment))
	}
	check(unix.Lutimes(at("etc/same-link"), []unix.Timeval{{Sec: 1e9}, {Sec: 1e9}}))
}

var capNetRaw = []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")

// torture makes each kind of change.
func torture(root string) {
	at := func(path string) string { return filepath.Join(root, path) }
	check(os.Rename(at("home/a/one"), at("home/a/renamed")))
	check(os.Link(at("home/a/two"), at("home/linked-two"))) // the lower file itself does not change
	check(os.Remove(at("etc/hard-1")), os.Chmod(at("home/a/hard-2"), 0o600))
	check(unix.Setxattr(at("usr/lib/one"), "user.note", []byte("1"), 0))
	check(unix.Setxattr(at("usr/lib/two"), "security.capability", capNetRaw, 0))
	check(unix.Removexattr(at("etc/two"), "security.capability"))
	check(os.RemoveAll(at("gone")))
	check(os.RemoveAll(at("opaque")), os.MkdirAll(at("opaque/inner/new"), 0o750))
	write(at("opaque/inner/two"), "new in an opaque directory")
	write(at("opaque/other"), "o")
	check(os.Chmod(at("opt/deep/one"), 0o4711), os.Lchown(at("opt/deep/er/one"), 7, 8))
	check(os.Chmod(at("opt/deep/er"), 0o2770), unix.Mkfifo(at("opt/fifo"), 0o644))
	check(unix.Mknod(at("opt/block"), unix.S_IFBLK|0o640, int(unix.Mkdev(7, 200))))
	check(os.Remove(at("etc/link")), os.Symlink("two", at("etc/link")), os.Symlink("/nowhere/at/all", at("opt/link")))
	sparse, err := os.Create(at("opt/sparse"))
	check(err, sparse.Truncate(3<<20))
	_, err = sparse.WriteAt([]byte("end"), 3<<20-3)
	check(err, sparse.Close())
	check(os.RemoveAll(at("opt/deep/er/est")))
	write(at("opt/deep/er/est"), "a directory was here")
	check(os.Remove(at("etc/three")), os.Mkdir(at("etc/three"), 0o700))
	write(at("etc/three/inside"), "a file was here")
	check(os.Remove(at("home/b/three")))
	write(at("home/b/three"), "created again")
	check(os.Chtimes(at("usr/lib/three"), time.Now(), time.Unix(1e9, 5)))
	check(os.Chtimes(at("home/b"), moment, moment))
	// Written again with the same size and time: only the bytes tell.
	write(at("home/b/one"), strings.Repeat("y", len("home/bone")+900))
	check(os.Chtimes(at("home/b/one"), moment, moment), os.Chtimes(at("home/b/two"), moment, moment))
	check(os.Remove(at("etc/same-link")), os.Symlink("diff", at("etc/same-link")))
	check(unix.Lutimes(at("etc/same-link"), []unix.Timeval{{Sec: 1e9}, {Sec: 1e9}}))
	// Copied up, and as it was; made, and removed.
	info, err := os.Stat(at("z/one"))
	check(err, os.Chmod(at("z/one"), 0o600), os.Chmod(at("z/one"), info.Mode()))
	write(at("z/passing"), "p")
	check(os.Remove(at("z/passing")), os.Chmod(root, 0o711))
	write(at(".wh"), "a name that only begins like a whiteout")
	write(at("names/new\nline \xff"), "odd")
}

// tortureMore changes what torture may have left.
func tortureMore(root string) {
	at := func(path string) string { return filepath.Join(root, path) }
	for _, path := range []string{"home", "gone", "opaque/inner", "etc/three", "opt/deep/er/est", "etc/one"} {
		check(os.RemoveAll(at(path)))
	}
	check(os.MkdirAll(at("home/c"), 0o755), os.Symlink("/opt", at("etc/three")))
	write(at("gone/with"), "again, as a file")
	write(at("usr/lib/mod.py"), "print('changed')\n")
	check(os.Mkdir(at("opaque/inner"), 0o755))
	write(at("opaque/inner/one"), "1")
	check(os.Link(at("usr/lib/one"), at("usr/lib/four")), os.Link(at("usr/lib/one"), at("usr/aaa")))
}

// shuffle makes random changes, those that are possible. Symbolic links may lead out of root: os.Root does not follow
// them there, onto this machine's own files.
func shuffle(t *testing.T, r *rand.Rand, dir string, n int) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	check(err)
	defer root.Close()
	for i := range n {
		var paths []string
		dirs := []string{"."}
		_ = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
			if path != "." {
				paths = append(paths, path)
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
			}
			return err
		})
		slices.Sort(paths)
		if len(paths) < 5 {
			return
		}
		any := func() string { return paths[r.IntN(len(paths))] }
		fresh := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("n%d", r.IntN(20)))
		switch r.IntN(12) {
		case 0:
			_ = root.RemoveAll(any())
		case 1:
			_ = root.Remove(any())
		case 2:
			_ = root.Rename(any(), fresh)
		case 3:
			_ = root.Link(any(), fresh)
		case 4:
			_ = root.Symlink("/"+any(), fresh)
		case 5:
			_ = root.Mkdir(fresh, 0o755)
		case 6:
			_ = root.Chmod(any(), os.FileMode(r.IntN(0o777)))
		case 7:
			_ = root.Lchown(any(), r.IntN(3), r.IntN(3))
		case 8:
			p := any()
			if fi, err := root.Lstat(p); err == nil && fi.Mode().IsRegular() {
				_ = root.WriteFile(p, []byte(strings.Repeat("w", r.IntN(2000))), 0o644)
			}
		case 9:
			at := time.Unix(1e9+int64(r.IntN(3)), int64(r.IntN(2)))
			_ = root.Chtimes(any(), at, at)
		case 10:
			p := any()
			_ = root.RemoveAll(p)
			_ = root.Mkdir(p, 0o755)
		default:
			_ = root.WriteFile(fresh, []byte(fmt.Sprint(i, r.Uint64())), 0o644)
		}
	}
}

// linksBelow is a tar with hard links to files of lower layers.
func linksBelow(t *testing.T) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Name: "etc/lower-link", Typeflag: tar.TypeLink, Linkname: "etc/one", Mode: 0o640, ModTime: moment},
		{Name: "home/other", Typeflag: tar.TypeLink, Linkname: "home/b/one", Mode: 0o644, ModTime: moment},
		{Name: "home/b/two", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: moment},
	} {
		check(w.WriteHeader(h))
	}
	check(w.Close())
	return buf.Bytes()
}

func open(data []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

func late(d digest.Digest) func() (digest.Digest, error) {
	return func() (digest.Digest, error) { return d, nil }
}

// apply makes a layer of a tar.
func (w *world) apply(parent string, data []byte) string {
	w.t.Helper()
	w.serial++
	key := fmt.Sprintf("extract-%d", w.serial)
	opt := snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": key})
	mounts, err := w.s.Prepare(w.ctx, key, parent, opt)
	w.must(err)
	upper, ok, err := w.s.Extraction(w.ctx, mounts)
	if err != nil || !ok {
		w.t.Fatal(ok, err)
	}
	in, err := w.s.Layers().IngestBlob(w.ctx, layer.Blob{Digest: digest.FromBytes(data), Open: open(data)})
	w.must(err)
	w.must(w.s.Applied(w.ctx, upper, in))
	w.must(w.s.Commit(w.ctx, "committed-"+key, key, opt))
	return "committed-" + key
}

var errFull = errors.New("the disk is full")

// failingStore takes no more than a few bytes.
type failingStore struct{ ctdcontent.Store }

func (s failingStore) Writer(ctx context.Context, opts ...ctdcontent.WriterOpt) (ctdcontent.Writer, error) {
	w, err := s.Store.Writer(ctx, opts...)
	return failingWriter{w}, err
}

type failingWriter struct{ ctdcontent.Writer }

func (failingWriter) Write([]byte) (int, error) { return 0, errFull }

// links names what is no directory in a tar: type and target.
func (w *world) links(desc ocispec.Descriptor) (all []string) {
	w.t.Helper()
	data, err := ctdcontent.ReadBlob(w.ctx, w.store, desc)
	w.must(err)
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return all
		}
		w.must(err)
		if h.Typeflag != tar.TypeDir {
			all = append(all, fmt.Sprintf("%q %c %q", h.Name, h.Typeflag, h.Linkname))
		}
	}
}
