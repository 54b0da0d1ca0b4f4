package lower

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/verity"
)

// Verity says whether objects and chain images get fs-verity. Then chain images hold the digests of the objects that they lead to,
// and the kernel opens no other.
type Verity string

const (
	// VerityOff: no.
	VerityOff Verity = "off"
	// VerityAuto: where the kernel and the file system can.
	VerityAuto Verity = "auto"
	// VerityOn: yes, or the store does not open.
	VerityOn Verity = "on"
)

// decide returns why there will be no fs-verity, nil when there will be; missing is what the kernel or the file system lacks.
func (v Verity) decide(missing error) (no, err error) {
	switch v {
	case "", VerityOff:
		return errors.New("not asked for"), nil
	case VerityAuto:
		return missing, nil
	case VerityOn:
		if missing != nil {
			return missing, fmt.Errorf("fs-verity is asked for and does not work here (ext4 has it with the feature verity: `tune2fs -O verity` on its device; "+
				"overlayfs compares it since Linux 6.6; else set verity to \"auto\" or \"off\"): %w", missing)
		}
		return nil, nil
	}
	return nil, fmt.Errorf("verity %q: want auto, on or off", string(v))
}

// verityOption makes overlayfs compare digests. Where containers' upper directories may hold files without bytes, some may be from
// a time when fs-verity was off and have no digest: "require" would refuse these. In a chain image every one has one.
func verityOption(metacopy bool) string {
	if metacopy {
		return "verity=on"
	}
	return "verity=require"
}

// tryVerity reads the probe's file, with fs-verity, through an image that holds its digest.
func tryVerity(dir string, f Features, object *content.Entry, payload []byte) (err error) {
	path := filepath.Join(dir, "objects", object.Object.Path())
	if err := verity.EnablePath(path); err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	digest, err := verity.Measure(fd)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	image, target := filepath.Join(dir, "hashed.erofs"), filepath.Join(dir, "hashed")
	err = writeProbeImage(image, object, func(content.ObjectID) verity.Digest { return digest })
	if err == nil {
		err = errors.Join(verity.EnablePath(image), os.Mkdir(target, 0o700))
	}
	if err != nil {
		return err
	}
	if _, err := mountErofs(image, target, false); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(target, unix.MNT_DETACH)) }()
	return tryOverlay(dir, target, append(append([]string(nil), f.Options...), verityOption(f.Metacopy)), payload)
}

// write writes a chain's image.
func (c *Chains) write(ctx context.Context, to io.Writer, root *tree.Node) error {
	var digest func(content.ObjectID) verity.Digest
	if c.opts.Digests != nil {
		digests, err := c.opts.Digests(ctx, objectsOf(root))
		if err != nil {
			return err
		}
		digest = func(id content.ObjectID) verity.Digest { return digests[id] }
	}
	w := bufio.NewWriterSize(to, 1<<20)
	if _, err := erofs.WriteVerity(ctx, w, root, digest); err != nil {
		return err
	}
	return w.Flush()
}

// isHashed reports whether an image has fs-verity, where it should. One that has not was copied here with the whole store, as
// backups are: its objects have none either, and the kernel would refuse all of them. Built again, it gives it to them.
func (c *Chains) isHashed(n Name) bool {
	if c.opts.Digests == nil {
		return true
	}
	f, err := os.Open(c.Image(n))
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = verity.Measure(int(f.Fd()))
	return err == nil
}

// objectsOf returns the objects below a node, each once.
func objectsOf(root *tree.Node) (ids []content.ObjectID) {
	seen := map[content.ObjectID]bool{}
	var walk func(*tree.Node)
	walk = func(n *tree.Node) {
		if id := n.Entry.Object; !id.IsZero() && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
		for _, child := range n.Children {
			walk(child)
		}
	}
	walk(root)
	return ids
}
