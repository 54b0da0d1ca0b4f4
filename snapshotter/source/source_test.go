package source

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	ctdcontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

// served is a store with a recipe of one blob, and a client of its content service.
func served(t *testing.T) (*Source, ctdcontent.Store, []byte) {
	t.Helper()
	layers, err := layer.Open(t.Context(), layer.Options{Root: t.TempDir()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var plain, packed bytes.Buffer
	w := tar.NewWriter(&plain)
	text := strings.Repeat("text of a file\n", 300_000)
	if err := w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewWriterLevel(&packed, gzip.NoCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(plain.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	blob := layer.Blob{Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len()),
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(packed.Bytes())), nil
		}}
	in, err := layers.IngestBlob(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	diffID := content.DiffID{Sum: sha256.Sum256(plain.Bytes())}
	if err := layer.MakeRecipe(t.Context(), layers, diffID, blob); err != nil {
		t.Fatal(err)
	}
	s := New(layers)
	server, listener := grpc.NewServer(), bufconn.Listen(1<<20)
	contentapi.RegisterContentServer(server, s.Server())
	go func() { _ = server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		layers.Release(in.Layer)
		if err := layers.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, contentproxy.NewContentStore(conn), packed.Bytes()
}

// Several clients read a blob at once, in any order; it is made once, and goes after them.
func TestRead(t *testing.T) {
	s, client, blob := served(t)
	s.kept = time.Hour
	d := digest.FromBytes(blob)
	if i, err := client.Info(t.Context(), d); err != nil || i.Size != int64(len(blob)) || i.Digest != d {
		t.Errorf("%+v, %v", i, err)
	}
	var listed []digest.Digest
	err := client.Walk(t.Context(), func(i ctdcontent.Info) error { listed = append(listed, i.Digest); return nil })
	if err != nil || !slices.Equal(listed, []digest.Digest{d}) {
		t.Errorf("listed %v, %v", listed, err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ra, err := client.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
			if err != nil {
				t.Error(err)
				return
			}
			defer ra.Close()
			got, err := io.ReadAll(ctdcontent.NewReader(ra))
			if err != nil || !bytes.Equal(got, blob) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			part := make([]byte, 1000)
			if _, err := ra.ReadAt(part, 777); err != nil || !bytes.Equal(part, blob[777:1777]) {
				t.Errorf("from the middle: %v", err)
			}
		})
	}
	wg.Wait()
	if st := s.layers.RecipeStats(); st.Followed != 1 {
		t.Errorf("made %d times", st.Followed)
	}
	s.mu.Lock()
	s.kept = 50 * time.Millisecond
	s.mu.Unlock()
	if got, err := ctdcontent.ReadBlob(t.Context(), client, ocispec.Descriptor{Digest: d}); err != nil ||
		!bytes.Equal(got, blob) {
		t.Errorf("once more: %d bytes, %v", len(got), err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		left := len(s.blobs)
		s.mu.Unlock()
		if left == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the blob stays")
		}
	}
}

// Nothing else is there, and nothing can be changed.
func TestReadOnly(t *testing.T) {
	_, client, blob := served(t)
	ctx, d := t.Context(), digest.FromBytes(blob)
	for _, none := range []digest.Digest{digest.FromString("other"), digest.SHA512.FromString("other")} {
		if _, err := client.Info(ctx, none); !errdefs.IsNotFound(err) {
			t.Errorf("info of what is not there: %v", err)
		}
		if _, err := client.ReaderAt(ctx, ocispec.Descriptor{Digest: none}); !errdefs.IsNotFound(err) {
			t.Errorf("reading what is not there: %v", err)
		}
	}
	calls := map[string]func() error{
		"update": func() error { _, err := client.Update(ctx, ctdcontent.Info{Digest: d}, "labels"); return err },
		"delete": func() error { return client.Delete(ctx, d) },
		"abort":  func() error { return client.Abort(ctx, "ref") },
		"status": func() error { _, err := client.Status(ctx, "ref"); return err },
		"list":   func() error { _, err := client.ListStatuses(ctx); return err },
		"write": func() error {
			w, err := client.Writer(ctx, ctdcontent.WithRef("ref"))
			if err == nil {
				_, err = w.Write([]byte("data"))
			}
			return err
		},
	}
	for name, call := range calls {
		if err := call(); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "read only") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No more blobs than a few lie on the disk; those that nobody reads make room.
func TestKept(t *testing.T) {
	s, _, _ := served(t)
	var taken []*blob
	id := func(i int) digest.Digest { return digest.FromString(strings.Repeat("x", i)) }
	for i := range maxKept {
		b, mine, err := s.take(id(i))
		if err != nil || !mine {
			t.Fatal(i, mine, err)
		}
		close(b.ready)
		taken = append(taken, b)
	}
	if _, _, err := s.take(id(maxKept)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one more: %v", err)
	}
	s.release(taken[0], id(0))
	if _, mine, err := s.take(id(maxKept)); err != nil || !mine {
		t.Errorf("one more after another: %v, %v", mine, err)
	}
	s.blobs = nil
}
