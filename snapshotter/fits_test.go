package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// linkTar is a layer with a hard link to target, which is a file of the layer itself, but comes later, where later is
// set.
func linkTar(t *testing.T, target string, later bool, xattrs map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	records := map[string]string{}
	for k, v := range xattrs {
		records["SCHILY.xattr."+k] = v
	}
	headers := []*tar.Header{{Name: "link", Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644, PAXRecords: records}}
	if later {
		headers = append(headers, &tar.Header{Name: target, Mode: 0o644})
	}
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// A layer that cannot lie on its parent is refused when it comes in, by whichever door, and leaves nothing.
func TestLayerThatDoesNotFit(t *testing.T) {
	large := map[string]string{}
	for i := range 5 {
		large[fmt.Sprint("user.", i)] = strings.Repeat("x", 15_000)
	}
	base := layerTar(t, map[string]string{"a": payload("a"), "d/f": "f"})
	for name, row := range map[string]struct {
		top  []byte
		want string // "" where it fits
	}{
		"target of the layer below": {linkTar(t, "a", false, nil), ""},
		"no target": {linkTar(t, "nowhere", false, nil),
			`hard link "link" names "nowhere", which no layer below has`},
		"before its target": {linkTar(t, "late", true, nil), `hard link "link" names "late", which no layer below has`},
		"a directory":       {linkTar(t, "d", false, nil), `hard link "link" names "d", which is a directory`},
		"too many xattrs":   {linkTar(t, "a", false, large), "extended attributes"},
	} {
		t.Run(name, func(t *testing.T) {
			for door, push := range doors {
				t.Run(door, func(t *testing.T) {
					store := contentStore(t)
					s, ctx := openWith(t, store, false), ns(t, "one")
					img := newPulled(base, row.top)
					img.write(t, ctx, store, 0)
					parent := servedBy(t, s, ctx, "", img, 0)
					err := push(t, s, ctx, parent, img, func() { img.write(t, ctx, store, 0, 1) })
					if row.want == "" {
						if err != nil {
							t.Fatal(err)
						}
						return
					}
					if !errors.Is(err, tree.ErrUnfit) || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), row.want) {
						t.Errorf("got %v, want %q", err, row.want)
					}
					s.layers.Wait()
					if n := len(s.layers.List()); n != 1 {
						t.Errorf("%d layers are there, one below", n)
					}
				})
			}
		})
	}
}

// doors bring layer 1 of an image in, on a parent, and remove what a client removes when that fails.
var doors = map[string]func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled,
	arrive func()) error{
	"apply": func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled, arrive func()) error {
		return applyOn(t, s, ctx, parent, map[string]string{labelRef: img.chains[1]}, img.tars[1])
	},
	"commit side by side": func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled,
		arrive func()) error {
		labels := map[string]string{labelRef: img.chains[1], labelDiffID: img.diffs[1], labelParentChain: img.chains[0]}
		return applyOn(t, s, ctx, "", labels, img.tars[1], snapshots.WithParent(parent))
	},
	"blob at hand": func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled,
		arrive func()) error {
		arrive()
		return served(prepare(s, ctx, parent, map[string]string{labelRef: img.chains[1]}))
	},
	"known": func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled, arrive func()) error {
		in := ingestTar(t, s, ctx, img.tars[1]) // another image has brought it in
		defer s.layers.Release(in.Layer)
		return served(prepare(s, ctx, parent, map[string]string{labelRef: img.chains[1]}))
	},
	"known and staged": func(t *testing.T, s *Snapshotter, ctx context.Context, parent string, img pulled,
		arrive func()) error {
		in := ingestTar(t, s, ctx, img.tars[1])
		defer s.layers.Release(in.Layer)
		labels := map[string]string{labelRef: img.chains[1], labelDiffID: img.diffs[1], labelParentChain: img.chains[0]}
		mounts, err := prepare(s, ctx, "", labels)
		if err != nil || !mounts[0].ReadOnly() {
			t.Fatal(mounts, err)
		}
		key := "one/1/extract-" + img.chains[1]
		err = s.Commit(ctx, "one/2/"+img.chains[1], key, snapshots.WithLabels(labels), snapshots.WithParent(parent))
		return removeFailed(t, s, ctx, key, err)
	},
}

// served makes success of a hit.
func served(_ any, err error) error {
	switch {
	case errdefs.IsAlreadyExists(err):
		return nil
	case err == nil:
		return errors.New("not served")
	}
	return err
}

func ingestTar(t *testing.T, s *Snapshotter, ctx context.Context, blob []byte) layer.Ingested {
	t.Helper()
	in, err := s.layers.IngestBlob(ctx,
		layer.Blob{Digest: digest.FromBytes(blob), Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(blob)), nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func applyOn(t *testing.T, s *Snapshotter, ctx context.Context, parent string, labels map[string]string, blob []byte,
	opts ...snapshots.Opt) error {
	t.Helper()
	mounts, err := prepare(s, ctx, parent, labels)
	if err != nil {
		t.Fatal(err)
	}
	upper, ok, err := s.Extraction(ctx, mounts)
	if err != nil || !ok {
		t.Fatal(mounts, err)
	}
	key := "one/1/extract-" + labels[labelRef]
	if err = s.Applied(ctx, upper, ingestTar(t, s, ctx, blob)); err == nil {
		err = s.Commit(ctx, "one/2/"+labels[labelRef], key, append(opts, snapshots.WithLabels(labels))...)
	}
	return removeFailed(t, s, ctx, key, err)
}

func removeFailed(t *testing.T, s *Snapshotter, ctx context.Context, key string, err error) error {
	t.Helper()
	if err == nil {
		return nil
	}
	if rerr := s.Remove(ctx, key); rerr != nil {
		t.Error(rerr)
	}
	return err
}
