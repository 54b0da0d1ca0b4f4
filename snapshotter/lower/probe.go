package lower

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Kernel is what the probe found out about overlayfs here.
type Kernel struct {
	// Options every overlay mount gets.
	Options []string
	// Metacopy: data-only lower layers need metacopy=on (Linux 6.5 to 6.15), so that containers' upper
	// directories may hold files without bytes.
	Metacopy bool
	// Loop: EROFS has to be mounted from loop devices.
	Loop bool
	// NoVerity tells why objects have no fs-verity; nil when they have, and Options ask overlayfs to compare it.
	NoVerity error
}

// ProbePrefix names the probe's directory below the root.
const ProbePrefix = "probe-"

// Features are what the kernel and a file system offer, found out by trying: versions are not compared, since
// distributions backport.
type Features struct {
	// Erofs, Upper and DataOnly tell why EROFS cannot be mounted, the file system cannot hold overlayfs's upper
	// directories, or overlayfs does not serve data-only lower layers: nil when they can. Without EROFS nothing
	// is said of DataOnly.
	Erofs, Upper, DataOnly error
	// Loop: EROFS is mounted from a loop device, not straight from its file (6.12).
	Loop bool
	// Counted tells what fails inside a container where the kernel counts an EROFS mounted from its file as a level of
	// stacked file systems (some of 6.12 to 6.18), of which there may be two: Loop is set then. nil elsewhere.
	Counted error
	// Nested tells why no overlay can be mounted over a container's files, as some programs in containers do.
	Nested error
	// Options are what every overlay mount gets; Metacopy says that metacopy=on is one of them (Linux 6.5 to 6.15).
	Options  []string
	Metacopy bool
	// IDMapped tells why the chain image's mount cannot be ID-mapped, Verity why objects cannot have fs-verity that
	// overlayfs compares with chain images.
	IDMapped, Verity error
}

// Examine tries out what the daemon needs, in a private directory below dir, which it removes.
func Examine(dir string) (Features, error) {
	return examine(dir, examination{idmap: true, verity: true})
}

// examination says what to look at beside what every daemon needs.
type examination struct {
	idmap, verity bool
	// metacopy: keep metacopy=on also where the kernel does without.
	metacopy bool
}

// Probe examines the root and says what the daemon cannot do without. With metacopy, metacopy=on stays where the kernel does
// without.
func Probe(root string, want Verity, metacopy bool) (k Kernel, err error) {
	f, err := examine(root, examination{verity: want == VerityAuto || want == VerityOn, metacopy: metacopy})
	switch {
	case err != nil:
		return k, fmt.Errorf("probe: %w", err)
	case errors.Is(errors.Join(f.Erofs, f.Upper, f.DataOnly), unix.ENOSPC):
		return k, fmt.Errorf("probe: %w", errors.Join(f.Erofs, f.Upper, f.DataOnly))
	case f.Erofs != nil:
		return k, fmt.Errorf("the kernel does not mount EROFS (load it with `modprobe erofs`, or use a kernel with CONFIG_EROFS_FS; "+
			"before Linux 6.12 loop devices are needed too): %w", f.Erofs)
	case f.Upper != nil:
		return k, fmt.Errorf("the file system cannot hold overlayfs's upper directories (use ext4, or XFS with ftype=1, not overlayfs, NFS or FUSE): %w", f.Upper)
	case f.DataOnly != nil:
		return k, fmt.Errorf("overlayfs does not serve data-only lower layers (Linux 6.5 or newer has them): %w", f.DataOnly)
	}
	k = Kernel{Options: f.Options, Metacopy: f.Metacopy, Loop: f.Counted != nil}
	if k.NoVerity, err = want.decide(f.Verity); err == nil && k.NoVerity == nil {
		k.Options = append(k.Options, verityOption(k.Metacopy))
	}
	return k, err
}

// examine mounts a small chain image over one object, writable, and reads it back.
func examine(parent string, look examination) (f Features, err error) {
	dir, err := os.MkdirTemp(parent, ProbePrefix)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	payload := []byte("served from an object")
	object, err := writeProbe(dir, payload)
	if err == nil {
		err = writeProbeImage(filepath.Join(dir, "chain.erofs"), object, nil)
	}
	if err != nil {
		return f, err
	}
	empty, image := filepath.Join(dir, "empty"), filepath.Join(dir, "image")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return f, err
	}
	f.Upper = tryOverlay(dir, empty, nil, nil)
	if f.Loop, f.Erofs = mountErofs(filepath.Join(dir, "chain.erofs"), image, false); f.Erofs != nil {
		return f, nil
	}
	defer func() { err = errors.Join(err, unix.Unmount(image, unix.MNT_DETACH)) }()
	if f.Upper == nil {
		for _, k := range kernelChoices(look.metacopy) {
			if f.DataOnly = tryOverlay(dir, image, k.Options, payload); f.DataOnly == nil {
				f.Options, f.Metacopy = k.Options, k.Metacopy
				break
			}
		}
		if err := f.examineStacking(dir, image); err != nil {
			return f, err
		}
	}
	if look.idmap {
		f.IDMapped = tryIDMap(dir, image)
	}
	if f.Verity = errors.New("not asked for"); look.verity {
		f.Verity = errors.New("overlayfs does not serve data-only lower layers")
		if f.Upper == nil && f.DataOnly == nil {
			f.Verity = tryVerity(dir, f, object, payload)
		}
	}
	return f, nil
}

// examineStacking finds out whether overlays work inside containers, and whether they do so only with loop devices.
func (f *Features) examineStacking(dir, image string) (err error) {
	if f.Nested = tryNested(dir, image); f.Nested == nil || f.Loop {
		return nil
	}
	looped, err := os.MkdirTemp(dir, "looped")
	if err != nil {
		return err
	}
	if _, err := mountErofs(filepath.Join(dir, "chain.erofs"), looped, true); err != nil {
		return nil // there are no loop devices to do better with
	}
	if tryNested(dir, looped) == nil {
		f.Loop, f.Counted, f.Nested = true, f.Nested, nil
	}
	return unix.Unmount(looped, unix.MNT_DETACH)
}

// tryNested mounts an overlay over an overlay, as programs in a container do, and writes to it.
func tryNested(dir, image string) (err error) {
	lower := image
	for range 2 {
		paths := map[string]string{}
		for _, d := range []string{"upper", "work", "merged"} {
			if paths[d], err = os.MkdirTemp(dir, d); err != nil {
				return err
			}
		}
		options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, paths["upper"], paths["work"])
		if err := unix.Mount("overlay", paths["merged"], "overlay", 0, options); err != nil {
			return fmt.Errorf("mount an overlay over the files of a container: %w", err)
		}
		lower = paths["merged"]
		defer func() { err = errors.Join(err, unix.Unmount(paths["merged"], unix.MNT_DETACH)) }()
	}
	return os.WriteFile(filepath.Join(lower, "new"), nil, 0o600)
}

func tryIDMap(dir, image string) (err error) {
	users, err := mount.GetUsernsFD("0:100000:65536", "0:100000:65536")
	if err != nil {
		return err
	}
	defer users.Close()
	target := filepath.Join(dir, "mapped")
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := mount.IDMapMount(image, target, int(users.Fd())); err != nil {
		return err
	}
	return unix.Unmount(target, unix.MNT_DETACH)
}

// kernelChoices are the sets of options to try, the best first; with keep, all have metacopy=on.
func kernelChoices(keep bool) []Kernel {
	// xino=on would give image files numbers from 2^63 on, which programs that keep them in a double, or in 32 bits, cannot
	// tell apart. BuildKit reads few options, so it is refused only where the kernel's default is to have it.
	both := []string{"index=off"}
	if overlayDefault("xino_auto") {
		both = append(both, "xino=off")
	}
	plain := slices.Clone(both)
	if overlayDefault("metacopy") {
		plain = append(plain, "metacopy=off")
	}
	if overlayDefault("redirect_dir") || overlayDefault("metacopy") {
		// A renamed directory would be a redirect that no image can express.
		plain = append(plain, "redirect_dir=off")
	}
	// metacopy=on asks for redirects, so there it stays as it is.
	all := []Kernel{{Options: plain}, {Options: append(both, "metacopy=on"), Metacopy: true}}
	return slices.DeleteFunc(all, func(k Kernel) bool { return keep && !k.Metacopy })
}

// overlayDefault tells whether overlayfs has an option on where a mount does not speak of it.
func overlayDefault(parameter string) bool {
	b, err := os.ReadFile("/sys/module/overlay/parameters/" + parameter)
	return err == nil && strings.TrimSpace(string(b)) == "Y"
}

// writeProbe writes the object, and returns an entry that names it.
func writeProbe(dir string, payload []byte) (*content.Entry, error) {
	id := content.ObjectID{Sum: sha256.Sum256(payload)}
	object := filepath.Join(dir, "objects", id.Path())
	for _, d := range []string{filepath.Dir(object), filepath.Join(dir, "image")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	e := &content.Entry{Kind: content.Regular, Mode: 0o644, Size: int64(len(payload)), Object: id}
	return e, os.WriteFile(object, payload, 0o400)
}

func writeProbeImage(path string, e *content.Entry, digest func(content.ObjectID) verity.Digest) error {
	var b bytes.Buffer
	_, err := erofs.WriteVerity(context.Background(), &b, &tree.Node{
		Entry:    &content.Entry{Kind: content.Dir, Mode: 0o755},
		Children: []*tree.Node{{Name: "file", Entry: e}},
	}, digest)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o600)
}

// tryOverlay mounts an overlay on lower, writes to it, and, if want is not nil, reads the probe's
// file through the objects.
func tryOverlay(dir, lower string, options []string, want []byte) (err error) {
	paths := map[string]string{}
	for _, d := range []string{"upper", "work", "merged"} {
		if paths[d], err = os.MkdirTemp(dir, d); err != nil {
			return err
		}
	}
	stack := Stack{Lower: []string{lower}, Upper: paths["upper"], Work: paths["work"]}
	if want != nil {
		stack.Objects = filepath.Join(dir, "objects")
	}
	all := strings.Join(Kernel{Options: options}.Overlay(stack), ",")
	if err := unix.Mount("overlay", paths["merged"], "overlay", 0, all); err != nil {
		return fmt.Errorf("mount overlay with %s: %w", strings.Join(options, ","), err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(paths["merged"], unix.MNT_DETACH)) }()
	if err := os.WriteFile(filepath.Join(paths["merged"], "new"), nil, 0o600); err != nil {
		if full := os.Mkdir(filepath.Join(paths["upper"], "room"), 0o700); errors.Is(err, unix.EROFS) && full != nil {
			err = full // overlayfs mounts read-only where it has no room for a directory of its own
		}
		return err
	}
	if want == nil {
		return nil
	}
	got, err := os.ReadFile(filepath.Join(paths["merged"], "file"))
	if err == nil && !bytes.Equal(got, want) {
		err = errors.New("a file without data does not show its object's bytes")
	}
	return err
}
