package lower

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// PageCache says what containers share in memory.
type PageCache string

const (
	// PageCacheAuto is PageCacheShared where the kernel can.
	PageCacheAuto PageCache = ""
	// PageCacheShared: equal files of all images, by way of data-only lower layers (Linux 6.5).
	PageCacheShared PageCache = "shared"
	// PageCachePrivate: the files of one image among its containers.
	PageCachePrivate PageCache = "private"
)

// Kernel is what the probe found out here, and what follows from it.
type Kernel struct {
	// Shared: chain images lie over mounted packs, in which equal files are in memory once.
	Shared bool
	// Metacopy: data-only lower layers need metacopy=on (Linux 6.5 to 6.15), so that containers' upper
	// directories may hold files without bytes.
	Metacopy bool
	// Loop: EROFS has to be mounted from loop devices.
	Loop bool
	// NoDense tells why no images with blocks of 512 bytes can be mounted; nil when they can.
	NoDense error
	// NoVerity tells why packs and chain images have no fs-verity; nil when they have.
	NoVerity error
	// NoIDMap tells why owners cannot be mapped; nil when they can.
	NoIDMap error
	// Defaults are what overlayfs has on where a mount does not speak of it.
	Defaults Defaults
}

// Defaults are parameters of overlayfs's module that are not off here.
type Defaults struct{ Xino, Metacopy, Redirect bool }

// Features are what the kernel and a file system offer, found out by trying: versions are not compared, since
// distributions backport.
type Features struct {
	// Erofs, Upper and DataOnly tell why a chain image over a pack cannot be mounted and read, the file system cannot
	// hold overlayfs's upper directories, or overlayfs does not serve data-only lower layers: nil when they can. Without
	// EROFS nothing is said of DataOnly.
	Erofs, Upper, DataOnly error
	// Dense tells why no image with blocks of 512 bytes can be mounted over a dense pack (Linux 6.4 can, and 6.1 from
	// 6.1.115 on). Without EROFS nothing is said of it.
	Dense error
	// Loop: EROFS is mounted from a loop device, not straight from its file (6.12).
	Loop bool
	// Counted tells what fails inside a container where the kernel counts an EROFS mounted from its file as a level of
	// stacked file systems (some of 6.12 to 6.18), of which there may be two: Loop is set then. nil elsewhere.
	Counted error
	// Nested tells why no overlay can be mounted over a container's files, as some programs in containers do.
	Nested error
	// Metacopy says that data-only lower layers need metacopy=on (Linux 6.5 to 6.15).
	Metacopy bool
	Defaults Defaults
	// IDMapped tells why no overlay can be mounted over the ID-mapped mount of a chain image, Verity why packs cannot
	// have fs-verity, Punch why no holes can be made in them.
	IDMapped, Verity, Punch error
}

// Mode names what follows for chain images: what containers share in memory, and where EROFS is mounted from.
func (f Features) Mode() string {
	cache, from := PageCachePrivate, "file"
	if f.DataOnly == nil {
		cache = PageCacheShared
	}
	if f.Loop {
		from = "loop"
	}
	return fmt.Sprintf("%s, %s", cache, from)
}

// Examine tries out what the daemon needs, in a private directory below dir, which it removes.
func Examine(dir string) (Features, error) { return examine(dir, false) }

// Probe examines the root and says what the daemon cannot do without. With metacopy, metacopy=on stays where the
// kernel does without.
func Probe(root string, want Verity, cache PageCache, metacopy bool) (k Kernel, err error) {
	f, err := examine(root, metacopy)
	switch {
	case err != nil:
		return k, fmt.Errorf("probe: %w", err)
	case errors.Is(errors.Join(f.Erofs, f.Upper, f.DataOnly), unix.ENOSPC):
		return k, fmt.Errorf("probe: %w", errors.Join(f.Erofs, f.Upper, f.DataOnly))
	case f.Erofs != nil:
		return k, fmt.Errorf("the kernel does not mount EROFS images over packs (load it with `modprobe erofs`, "+
			"or use Linux 5.16 or newer with CONFIG_EROFS_FS; "+
			"before Linux 6.12 loop devices are needed too): %w", f.Erofs)
	case f.Upper != nil:
		return k, fmt.Errorf("the file system cannot hold overlayfs's upper directories "+
			"(use ext4, or XFS with ftype=1, not overlayfs, NFS or FUSE): %w", f.Upper)
	case runsOut(f.Dense): // else all dense packs would be copied
		return k, fmt.Errorf("probe: %w", f.Dense)
	}
	k = Kernel{
		Shared: f.DataOnly == nil, Metacopy: metacopy, Loop: f.Loop, Defaults: f.Defaults, NoIDMap: f.IDMapped,
		NoDense: f.Dense,
	}
	switch cache {
	case PageCacheAuto:
	case PageCachePrivate:
		k.Shared = false
	case PageCacheShared:
		if f.DataOnly != nil {
			return k, fmt.Errorf("page_cache is \"shared\", and overlayfs does not serve data-only lower layers "+
				"(Linux 6.5 or newer has them; "+
				"else set page_cache to \"private\", or leave it out): %w", f.DataOnly)
		}
	default:
		return k, fmt.Errorf("page_cache %q: want shared or private", string(cache))
	}
	if k.Shared && f.Metacopy {
		k.Metacopy = true
	}
	k.NoVerity, err = want.decide(f.Verity)
	return k, err
}

// examine mounts small chain images over a pack, in both flavours, writable, and reads them. With keep, metacopy=on
// stays.
func examine(parent string, keep bool) (f Features, err error) {
	dir, release, err := ProbeDir(parent, ProbePrefix)
	if err != nil {
		return f, err
	}
	defer release()
	p := newProber(dir)
	defer func() { err = errors.Join(err, p.close()) }()
	f.Defaults = Defaults{overlayDefault("xino_auto"), overlayDefault("metacopy"), overlayDefault("redirect_dir")}
	f.Verity, f.Punch = verity.Probe(dir), p.tryPunch()
	if err := p.write(); err != nil {
		return f, err
	}
	empty, err := p.make("empty")
	if err != nil {
		return f, err
	}
	f.Upper = p.tryOverlay(Kernel{Metacopy: keep, Defaults: f.Defaults}, Stack{Lower: []string{empty}}, false)
	f.Loop = p.needsLoop()
	image, err := p.mount("private", f.Loop)
	if err == nil {
		err = p.check(image)
	}
	if f.Erofs = err; err != nil || f.Upper != nil {
		return f, nil
	}
	if err := f.examineStacking(p, image); err != nil {
		return f, err
	}
	f.DataOnly = p.tryShared(&f, keep)
	f.Dense = p.tryDense(f.Loop)
	f.IDMapped = p.tryIDMap(image, f.Defaults)
	return f, nil
}

// prober holds what an examination has made.
type prober struct {
	dir     string
	payload []byte
	packs   map[bool]erofs.Device // by whether they are dense
	mounted []string
}

func newProber(dir string) *prober {
	return &prober{dir: dir, payload: []byte(strings.Repeat("served from a pack", 100))}
}

func (p *prober) path(name string) string { return filepath.Join(p.dir, name) }

func (p *prober) make(name string) (string, error) {
	return p.path(name), os.Mkdir(p.path(name), 0o755)
}

func (p *prober) close() error {
	var errs []error
	for _, at := range p.mounted {
		errs = append(errs, unix.Unmount(at, unix.MNT_DETACH))
	}
	return errors.Join(append(errs, os.RemoveAll(p.dir))...)
}

// packFile is the file of a pack.
func packFile(dense bool) string {
	if dense {
		return "dense-pack"
	}
	return "pack"
}

// write writes packs, and images of both flavours over them.
func (p *prober) write() error {
	p.packs = map[bool]erofs.Device{}
	return errors.Join(p.writeOver(false), p.writeOver(true))
}

// writeOver writes a pack with one payload that is looked at, and images over it.
func (p *prober) writeOver(dense bool) error {
	f, err := os.Create(p.path(packFile(dense)))
	if err != nil {
		return err
	}
	defer f.Close()
	id := content.ObjectID{Sum: sha256.Sum256(p.payload)}
	w := erofs.NewPackWriter(f, 1, dense)
	first := []byte("so that the next one begins within 4 KiB")
	if _, err := w.Append(content.ObjectID{Sum: sha256.Sum256(first)}, first); err != nil {
		return err
	}
	if _, err := w.Append(id, p.payload); err != nil {
		return err
	}
	sealed, err := w.Seal()
	if err != nil {
		return err
	}
	p.packs[dense] = sealed.Device()
	images := map[string]bool{"private": false, "shared": true}
	if dense {
		images = map[string]bool{"dense": true}
	}
	for name, redirect := range images {
		var b bytes.Buffer
		_, err := erofs.WriteChain(context.Background(), &b, &tree.Node{
			Entry: &content.Entry{Kind: content.Dir, Mode: 0o755},
			Children: []*tree.Node{{Name: "file", Entry: &content.Entry{
				Kind: content.Regular, Mode: 0o644, Size: int64(len(p.payload)), Object: id,
			}}},
		}, erofs.Options{
			Place:    func(content.ObjectID) (content.Place, bool) { return sealed.Place(1), true },
			Packs:    []erofs.Device{sealed.Device()},
			Redirect: redirect,
			Dense:    dense,
		})
		if err == nil {
			err = os.WriteFile(p.path(name), b.Bytes(), 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tryPunch makes a hole in a file.
func (p *prober) tryPunch() error {
	f, err := os.Create(p.path("punched"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 2*content.BlockSize)); err != nil {
		return err
	}
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, content.BlockSize)
}

// needsLoop tells whether the kernel mounts EROFS from devices alone.
func (p *prober) needsLoop() bool {
	at, err := p.make("from-file")
	if err != nil {
		return false // whoever mounts will say
	}
	err = mountFile(p.path("pack"), at, nil)
	if err == nil {
		p.mounted = append(p.mounted, at)
	}
	return errors.Is(err, unix.ENOTBLK)
}

// mount mounts an image over the pack.
func (p *prober) mount(name string, loop bool) (at string, err error) {
	if at, err = os.MkdirTemp(p.dir, name+"-"); err != nil {
		return at, err
	}
	dense := name == "dense"
	packs := func(content.PackID) string { return p.path(packFile(dense)) }
	if err = mountImage(p.path(name), at, []erofs.Device{p.packs[dense]}, packs, from(loop, dense)); err == nil {
		p.mounted = append(p.mounted, at)
	}
	return at, err
}

// check reads the file in a mount.
func (p *prober) check(at string) error {
	got, err := os.ReadFile(filepath.Join(at, "file"))
	if err == nil && !bytes.Equal(got, p.payload) {
		err = errors.New("a file does not show the bytes that its pack has")
	}
	return err
}

// tryShared finds out how overlays over packs work.
func (p *prober) tryShared(f *Features, keep bool) error {
	image, err := p.mount("shared", f.Loop)
	if err != nil {
		return err
	}
	pack, err := p.make("mounted-pack")
	if err != nil {
		return err
	}
	if err := mountPack(p.path("pack"), pack, p.packs[false], f.Loop); err != nil {
		return err
	}
	p.mounted = append(p.mounted, pack)
	for _, f.Metacopy = range []bool{keep, true} {
		k := Kernel{Metacopy: f.Metacopy, Defaults: f.Defaults}
		if err = p.tryOverlay(k, Stack{Lower: []string{image}, Packs: []string{pack}}, true); err == nil {
			return nil
		}
	}
	return err
}

// examineStacking finds out whether overlays work inside containers, and whether they do so only with loop devices.
func (f *Features) examineStacking(p *prober, image string) (err error) {
	if f.Nested = p.tryNested(image); f.Nested == nil || f.Loop {
		return nil
	}
	looped, err := p.mount("private", true)
	if err != nil {
		return nil // there are no loop devices to do better with
	}
	if p.tryNested(looped) == nil {
		f.Loop, f.Counted, f.Nested = true, f.Nested, nil
	}
	return nil
}

// tryNested mounts an overlay over an overlay, as programs in a container do, and writes to it.
func (p *prober) tryNested(image string) (err error) {
	lower := image
	for range 2 {
		s, merged, err := p.stack(Stack{Lower: []string{lower}})
		if err != nil {
			return err
		}
		options, err := Kernel{}.Overlay(s)
		if err != nil {
			return err
		}
		if err := unix.Mount("overlay", merged, "overlay", 0, strings.Join(options, ",")); err != nil {
			return fmt.Errorf("mount an overlay over the files of a container: %w", err)
		}
		lower = merged
		defer func() { err = errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH)) }()
	}
	return os.WriteFile(filepath.Join(lower, "new"), nil, 0o600)
}

// tryIDMap mounts an overlay over an image as containerd does for a container in a user namespace.
func (p *prober) tryIDMap(image string, d Defaults) (err error) {
	const root = 100000
	ids := fmt.Sprintf("0:%d:65536", root)
	users, err := mount.GetUsernsFD(ids, ids)
	if err != nil {
		return err
	}
	defer users.Close()
	target, err := p.make("mapped")
	if err != nil {
		return err
	}
	if err := mount.IDMapMount(image, target, int(users.Fd())); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(target, unix.MNT_DETACH)) }()
	s, merged, err := p.stack(Stack{Lower: []string{target}})
	if err != nil {
		return err
	}
	options, err := Kernel{Defaults: d}.Overlay(s)
	if err != nil {
		return err
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, strings.Join(options, ",")); err != nil {
		return fmt.Errorf("mount an overlay over an ID-mapped mount: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH)) }()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(merged, "file"), &st); err != nil {
		return err
	}
	if st.Uid != root || st.Gid != root {
		return fmt.Errorf("an overlay over an ID-mapped mount shows owner %d:%d, want %d", st.Uid, st.Gid, root)
	}
	return p.check(merged)
}

// overlayDefault tells whether overlayfs has an option on where a mount does not speak of it.
func overlayDefault(parameter string) bool {
	b, err := os.ReadFile("/sys/module/overlay/parameters/" + parameter)
	return err == nil && strings.TrimSpace(string(b)) == "Y"
}

// stack adds directories to write to.
func (p *prober) stack(s Stack) (_ Stack, merged string, err error) {
	for name, dir := range map[string]*string{"upper": &s.Upper, "work": &s.Work, "merged": &merged} {
		if *dir, err = os.MkdirTemp(p.dir, name); err != nil {
			return s, merged, err
		}
	}
	return s, merged, nil
}

// tryOverlay mounts an overlay, writes to it, and, if asked to, reads the file in it.
func (p *prober) tryOverlay(k Kernel, s Stack, read bool) (err error) {
	s, merged, err := p.stack(s)
	if err != nil {
		return err
	}
	options, err := k.Overlay(s)
	if err != nil {
		return err
	}
	all := strings.Join(options, ",")
	if err := unix.Mount("overlay", merged, "overlay", 0, all); err != nil {
		return fmt.Errorf("mount overlay with %s: %w", all, err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH)) }()
	if err := os.WriteFile(filepath.Join(merged, "new"), nil, 0o600); err != nil {
		if full := os.Mkdir(filepath.Join(s.Upper, "room"), 0o700); errors.Is(err, unix.EROFS) && full != nil {
			err = full // overlayfs mounts read-only where it has no room for a directory of its own
		}
		return err
	}
	if !read {
		return nil
	}
	return p.check(merged)
}
