package blobs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.etcd.io/bbolt"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// contentStore is containerd's own, with namespaces.
func contentStore(t testing.TB) ctdcontent.Store {
	t.Helper()
	dir := t.TempDir()
	files, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return metadata.NewDB(db, files, nil).ContentStore()
}

func write(t testing.TB, ctx context.Context, store ctdcontent.Store, mediaType string, data []byte,
	labels map[string]string) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := ctdcontent.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(data), desc,
		ctdcontent.WithLabels(labels)); err != nil {
		t.Fatal(err)
	}
	return desc
}

// testImage is an image of n layers; its layers' blobs are not written.
type testImage struct {
	manifest ocispec.Manifest
	config   ocispec.Image
	chains   []content.ChainID
	blobs    [][]byte
}

func newImage(name string, n int) testImage {
	img := testImage{manifest: ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest}}
	img.config.RootFS.Type = "layers"
	for i := range n {
		blob := fmt.Appendf(nil, "layer %d of %s", i, name)
		img.blobs = append(img.blobs, blob)
		img.manifest.Layers = append(img.manifest.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob), Size: int64(len(blob))})
		img.config.RootFS.DiffIDs = append(img.config.RootFS.DiffIDs, digest.FromString(fmt.Sprintf("tar %d of %s", i, name)))
	}
	for _, c := range identity.ChainIDs(append([]digest.Digest(nil), img.config.RootFS.DiffIDs...)) {
		sum, _ := content.ParseSum(c.String())
		img.chains = append(img.chains, content.ChainID{Sum: sum})
	}
	return img
}

func (img testImage) write(t testing.TB, ctx context.Context, store ctdcontent.Store) {
	t.Helper()
	config, _ := json.Marshal(img.config)
	img.manifest.Config = write(t, ctx, store, ocispec.MediaTypeImageConfig, config, nil)
	manifest, _ := json.Marshal(img.manifest)
	write(t, ctx, store, ocispec.MediaTypeImageManifest, manifest,
		map[string]string{labelConfig: img.manifest.Config.Digest.String()})
}

func (img testImage) writeLayer(t testing.TB, ctx context.Context, store ctdcontent.Store, i int) {
	t.Helper()
	write(t, ctx, store, ocispec.MediaTypeImageLayerGzip, img.blobs[i], nil)
}

func find(t *testing.T, ctx context.Context, s *Store, chain content.ChainID, hint digest.Digest) string {
	t.Helper()
	b, ok, err := s.Find(ctx, chain, hint)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return ""
	}
	r, err := b.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestFind(t *testing.T) {
	store := contentStore(t)
	s, ctx, other := New(store, nil), namespaces.WithNamespace(t.Context(), "one"),
		namespaces.WithNamespace(t.Context(), "two")
	img := newImage("app", 3)
	if got := find(t, ctx, s, img.chains[1], ""); got != "" {
		t.Errorf("found %q in an empty store", got)
	}
	img.write(t, ctx, store)
	if got := find(t, ctx, s, img.chains[1], ""); got != "" {
		t.Errorf("found %q before the blob was there", got)
	}
	img.writeLayer(t, ctx, store, 1)
	if got := find(t, ctx, s, img.chains[1], ""); got != "layer 1 of app" {
		t.Errorf("found %q", got)
	}
	for i, chain := range []content.ChainID{img.chains[0], img.chains[2], {}} {
		if got := find(t, ctx, s, chain, ""); got != "" {
			t.Errorf("%d: found %q", i, got)
		}
	}
	if got := find(t, other, s, img.chains[1], ""); got != "" {
		t.Errorf("another namespace finds %q", got)
	}
	if got := find(t, other, s, img.chains[1], digest.FromBytes(img.blobs[1])); got != "" {
		t.Errorf("another namespace finds %q by digest", got)
	}
	if got := find(t, ctx, s, content.ChainID{Sum: content.Sum{1}},
		digest.FromBytes(img.blobs[1])); got != "layer 1 of app" {
		t.Errorf("the hint finds %q", got)
	}
	if got := find(t, ctx, s, content.ChainID{Sum: content.Sum{1}}, "sha256:short"); got != "" {
		t.Errorf("a bad hint finds %q", got)
	}
	// Gone from containerd, gone here.
	if err := store.Delete(ctx, digest.FromBytes(img.blobs[1])); err != nil {
		t.Fatal(err)
	}
	if got := find(t, ctx, s, img.chains[1], ""); got != "" {
		t.Errorf("found %q after its removal", got)
	}
}

// One diffID in two compressions: whichever blob is there serves.
func TestFindOtherCompression(t *testing.T) {
	store := contentStore(t)
	s, ctx := New(store, nil), namespaces.WithNamespace(t.Context(), "one")
	img := newImage("app", 2)
	img.write(t, ctx, store)
	again := newImage("app", 2)
	again.blobs[1] = []byte("the same in zstd")
	again.manifest.Layers[1].Digest, again.manifest.Layers[1].Size = digest.FromBytes(again.blobs[1]),
		int64(len(again.blobs[1]))
	again.write(t, ctx, store)
	again.writeLayer(t, ctx, store, 1)
	if got := find(t, ctx, s, img.chains[1], ""); got != "the same in zstd" {
		t.Errorf("found %q", got)
	}
}

func TestWithAndEnds(t *testing.T) {
	store := contentStore(t)
	s, ctx := New(store, nil), namespaces.WithNamespace(t.Context(), "one")
	img := newImage("app", 2)
	if whole, part := s.Ends("one", img.chains[1]); whole || part {
		t.Error("something is known before anybody looked")
	}
	img.write(t, ctx, store)
	found, err := s.With(ctx, img.manifest.Layers[0].Digest)
	if err != nil || len(found) != 1 || len(found[0].Layers) != 2 {
		t.Fatal(found, err)
	}
	for i, want := range []bool{false, true} {
		if whole, part := s.Ends("one", img.chains[i]); whole != want || part == want {
			t.Errorf("chain %d: whole %v, part %v", i, whole, part)
		}
	}
	if whole, part := s.Ends("two", img.chains[1]); whole || part {
		t.Error("another namespace knows it")
	}
}

// Manifests and configs are foreign: what makes no sense is left out, and nothing else with it.
func TestHostileImages(t *testing.T) {
	huge := newImage("huge", 1)
	huge.config.Author = strings.Repeat("a", maxJSON)
	fewer := newImage("fewer", 3)
	fewer.config.RootFS.DiffIDs = fewer.config.RootFS.DiffIDs[:2]
	bad := newImage("bad", 2)
	bad.config.RootFS.DiffIDs[1] = "sha512:1234"
	path := newImage("path", 2)
	path.manifest.Layers[1].Digest = "sha256:../../../../etc/passwd"
	store := contentStore(t)
	s, ctx := New(store, nil), namespaces.WithNamespace(t.Context(), "one")
	for _, img := range []testImage{huge, fewer, bad, path, newImage("none", 0)} {
		img.write(t, ctx, store)
		for i := range img.blobs {
			img.writeLayer(t, ctx, store, i)
		}
	}
	for _, text := range []string{"", "null", "[]", "{", `{"layers": 7}`,
		`{"layers":[{"digest":""}],"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":""}}`} {
		write(t, ctx, store, ocispec.MediaTypeImageManifest, []byte(text+" "), map[string]string{labelConfig: "x"})
	}
	good := newImage("good", 1)
	good.write(t, ctx, store)
	good.writeLayer(t, ctx, store, 0)
	if got := find(t, ctx, s, good.chains[0], ""); got != "layer 0 of good" {
		t.Errorf("found %q", got)
	}
	for _, img := range []testImage{huge, fewer, bad, path} {
		if got := find(t, ctx, s, img.chains[0], ""); got != "" {
			t.Errorf("found %q", got)
		}
	}
}

// What a cold pull pays for the look at the content store: one walk over all blobs of the namespace.
func BenchmarkRefresh(b *testing.B) {
	for _, n := range []int{10, 100} {
		b.Run(fmt.Sprintf("%d images of 10 layers", n), func(b *testing.B) {
			store := contentStore(b)
			ctx := namespaces.WithNamespace(b.Context(), "one")
			for i := range n {
				img := newImage(fmt.Sprint(i), 10)
				img.write(b, ctx, store)
				for l := range img.blobs {
					img.writeLayer(b, ctx, store, l)
				}
			}
			s := New(store, nil)
			if _, _, err := s.Find(ctx, content.ChainID{Sum: content.Sum{1}}, ""); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, _, err := s.Find(ctx, content.ChainID{Sum: content.Sum{1}}, ""); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
