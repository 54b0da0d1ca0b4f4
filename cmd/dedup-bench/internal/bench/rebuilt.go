package bench

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
)

// rebuilt writes the layer of a pip install as another run of pip, hours later and by another user,
// would have made it: other mtimes, the ones in compiled files too, and other owners. Only packages that
// keep wants are in it, and a file that no other build has.
func rebuilt(w io.Writer, l *image.Layer, build int, keep func(pkg string) bool) error {
	later := time.Duration(build) * time.Hour
	tw := tar.NewWriter(w)
	err := eachMember(l, func(h *tar.Header, tr *tar.Reader) error {
		if pkg := packageOf(h.Name); pkg != "" && !keep(pkg) {
			return nil
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return fmt.Errorf("read %s: %w", h.Name, err)
		}
		h.Uid, h.Gid = 1000+build, 1000+build
		h.ModTime = h.ModTime.Add(later)
		// PEP 552: magic, flags, mtime and size of the source; flags 0 is the form with an mtime.
		if strings.HasSuffix(h.Name, ".pyc") && len(data) >= 16 && bytes.Equal(data[4:8], make([]byte, 4)) {
			mtime := binary.LittleEndian.Uint32(data[8:])
			binary.LittleEndian.PutUint32(data[8:], mtime+uint32(later/time.Second))
		}
		return errors.Join(tw.WriteHeader(h), writeAll(tw, data))
	})
	if err != nil {
		return fmt.Errorf("rebuild a layer: %w", err)
	}
	text := fmt.Appendf(nil, "build %d\n%s", build, strings.Repeat(fmt.Sprintf("line of build %d\n", build), 200))
	return errors.Join(
		tw.WriteHeader(&tar.Header{Name: "build", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text)),
			ModTime: image.DefaultTime}),
		writeAll(tw, text), tw.Close())
}

func writeAll(w io.Writer, data []byte) error {
	_, err := w.Write(data)
	return err
}

// packageOf is the package of a site-packages that a member belongs to, "" for none.
func packageOf(name string) string {
	parts := strings.Split(strings.TrimSuffix(name, "/"), "/")
	const depth = 6 // usr/local/lib/python3/dist-packages/package
	if len(parts) < depth {
		return ""
	}
	pkg, _, _ := strings.Cut(strings.ToLower(parts[depth-1]), "-") // with its dist-info
	return pkg
}

// inShare is true for a share of all names, always the same ones.
func inShare(share float64, names ...any) bool {
	h := fnv.New32a()
	fmt.Fprintln(h, names...)
	return float64(h.Sum32()%1000) < share*1000
}
