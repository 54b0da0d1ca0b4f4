package integration

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// beside are the two snapshotters whose results a client compares.
var beside = []string{"overlayfs", node.Snapshotter}

// needClients skips a test that is part of `make test-clients` only.
func needClients(t *testing.T) {
	t.Helper()
	if os.Getenv("DEDUP_CLIENTS") == "" {
		t.Skip("takes minutes: make test-clients")
	}
}

// made is an image that a client has made, as far as two runs of one recipe agree.
type made struct {
	Config  v1.Config
	History []string
	Layers  [][]string // one line an entry
}

// sameImages fails the test unless the images that clients made of one recipe are equal, entry by entry. Times of the
// recipe's steps differ: what has changed since the test began shows no time. It returns the first.
func sameImages(t *testing.T, since time.Time, refs ...string) made {
	t.Helper()
	var first made
	for i, ref := range refs {
		m := readImage(t, pushed(t, ref), since)
		if i == 0 {
			first = m
		} else if diff := cmp.Diff(first, m); diff != "" {
			t.Errorf("%s is not as %s (-want +got):\n%s", ref, refs[0], diff)
		}
	}
	if len(first.Layers) == 0 {
		t.Errorf("%s has no layers", refs[0])
	}
	return first
}

// pushed is an image in a registry on loopback.
func pushed(t *testing.T, ref string) v1.Image {
	t.Helper()
	parsed, err := name.ParseReference(ref, name.Insecure)
	must(t, err)
	img, err := remote.Image(parsed, remote.WithContext(testContext(t)))
	must(t, err)
	return img
}

func readImage(t *testing.T, img v1.Image, since time.Time) made {
	t.Helper()
	file, err := img.ConfigFile()
	must(t, err)
	m := made{Config: file.Config}
	for _, h := range file.History {
		m.History = append(m.History, fmt.Sprintf("%s empty=%v", h.CreatedBy, h.EmptyLayer))
	}
	layers, err := img.Layers()
	must(t, err)
	for _, l := range layers {
		r, err := l.Uncompressed()
		must(t, err)
		lines, err := readEntries(r, since)
		must(t, errors.Join(err, r.Close()))
		m.Layers = append(m.Layers, lines)
	}
	return m
}

// readEntries describes a tar, one line an entry, sorted: builders that export in parallel keep no order.
func readEntries(r io.Reader, since time.Time) ([]string, error) {
	var lines []string
	sources, compiled := map[string]int64{}, map[string]uint32{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		key := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
		switch {
		case strings.HasSuffix(key, ".py"):
			sources[key] = h.ModTime.Unix()
		case strings.HasSuffix(key, ".pyc") && len(content) > 16 && binary.LittleEndian.Uint32(content[4:]) == 0:
			compiled[key] = binary.LittleEndian.Uint32(content[8:])
			copy(content[8:12], "time") // its source's, so of the step; checked below
		case strings.HasSuffix(key, "stargz.index.json"):
			content = nil // has all times again
		}
		lines = append(lines, describe(h, key, content, since))
	}
	for key, at := range compiled {
		dir, base := filepath.Split(key)
		source := filepath.Join(filepath.Dir(filepath.Clean(dir)), strings.SplitN(base, ".", 2)[0]+".py")
		if is, ok := sources[source]; ok {
			lines = append(lines, fmt.Sprintf("%s: valid %v", key, uint32(is) == at))
		}
	}
	slices.Sort(lines)
	return lines, nil
}

func describe(h *tar.Header, key string, content []byte, since time.Time) string {
	at := h.ModTime.UTC().Format(time.RFC3339Nano)
	if !h.ModTime.Before(since) {
		at = "of the step"
	}
	var records []string
	for _, k := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		switch k {
		case "mtime", "atime", "ctime", "path", "linkpath", "size":
		default:
			records = append(records, fmt.Sprintf("%s=%q", k, h.PAXRecords[k]))
		}
	}
	sum := sha256.Sum256(content)
	size := fmt.Sprint(h.Size, " ", hex.EncodeToString(sum[:6]))
	if content == nil {
		size = "-"
	}
	return fmt.Sprintf("%s %c %04o %d:%d %s %q %d,%d %s %v", key, h.Typeflag, h.Mode, h.Uid, h.Gid, size, h.Linkname,
		h.Devmajor, h.Devminor, at, records)
}

// contextDir is a directory to build from: names and contents of files.
func contextDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for path, content := range files {
		full := filepath.Join(dir, path)
		must(t, os.MkdirAll(filepath.Dir(full), 0o755))
		must(t, os.WriteFile(full, []byte(content), 0o644))
		old := time.Unix(1700000000, 0)
		must(t, os.Chtimes(full, old, old))
		must(t, os.Chtimes(filepath.Dir(full), old, old))
	}
	return dir
}

// gunzip opens what is gzip, and fails for anything else.
func gunzip(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }
