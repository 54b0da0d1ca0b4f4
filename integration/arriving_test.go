package integration

import (
	"archive/tar"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// halting answers the first request for a blob with its first half, then does what a test says.
type halting struct {
	t    *testing.T
	dir  string // of the registry
	blob string // hex
	// then gets the second half once the first is sent.
	then func(w http.ResponseWriter, rest []byte)
	once sync.Once
}

func (h *halting) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first := false
		if r.Method == http.MethodGet && h.blob != "" && strings.HasSuffix(r.URL.Path, h.blob) {
			h.once.Do(func() { first = true })
		}
		if !first {
			next.ServeHTTP(w, r)
			return
		}
		b, err := os.ReadFile(filepath.Join(h.dir, "sha256", h.blob))
		if err != nil {
			h.t.Error(err)
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		w.Header().Set("Content-Type", "application/octet-stream")
		if _, err := w.Write(b[:len(b)/2]); err != nil {
			h.t.Error(err)
		}
		h.then(w, b[len(b)/2:])
	})
}

// A layer is stored while its blob is still on its way. What then does not arrive, or arrives as something else, leaves
// nothing behind and harms no later pull.
func TestIngestWhileArriving(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		then  func(w http.ResponseWriter, rest []byte)
		fails bool
	}{
		"arrives":                 {then: func(w http.ResponseWriter, rest []byte) { _, _ = w.Write(rest) }},
		"is cut off, and resumed": {then: func(http.ResponseWriter, []byte) { panic(http.ErrAbortHandler) }, fails: true},
		"turns out to be another": {then: func(w http.ResponseWriter, rest []byte) {
			rest[len(rest)/2] ^= 1
			_, _ = w.Write(rest)
		}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startDedup(t, node.Options{Daemon: map[string]any{"log_level": "debug"}})
			files := []image.Entry{{Name: "./", Type: tar.TypeDir, Mode: 0o755}}
			for i := range 40 {
				files = append(files, payload("arriving", fmt.Sprintf("file-%02d", i), 100_000))
			}
			large := layer(t, files...)
			h := &halting{t: t, dir: t.TempDir(), blob: large.Hash.Hex}
			h.then = func(w http.ResponseWriter, rest []byte) {
				if !objectsAppear(n) {
					t.Error("nothing is stored while the blob is on its way")
				}
				row.then(w, rest)
			}
			reg, err := registry.Start(registry.Options{Dir: h.dir, Wrap: h.wrap})
			must(t, err)
			t.Cleanup(func() { reg.Close() })
			ref := push(t, reg, "app:1", large)
			err = n.Pull(testContext(t), node.Snapshotter, ref)
			if row.fails && err == nil {
				t.Error("half a blob was pulled")
			}
			if row.fails {
				waitForNothing(t, n)
				// containerd would go on where it stopped, also behind bytes that are wrong.
				ctx, store := testContext(t), n.Client().ContentStore()
				running, lerr := store.ListStatuses(ctx)
				must(t, lerr)
				for _, s := range running {
					if name != "is cut off, and resumed" {
						must(t, ignoreNotFound(store.Abort(ctx, s.Ref)))
					}
				}
				err = n.Pull(testContext(t), node.Snapshotter, ref)
			}
			must(t, err)
			must(t, n.Pull(testContext(t), "overlayfs", ref))
			equal(t, dump(t, n, "overlayfs", ref), dump(t, n, node.Snapshotter, ref), noRootTime)
			if r := fsck(t, n, 0); len(r.Findings) > 0 {
				t.Errorf("%+v", r.Findings)
			}
		})
	}
}

// objectsAppear waits until something is stored.
func objectsAppear(n *node.Node) bool {
	for range 2400 {
		if packed(n) >= 100_000 {
			return true
		}
		time.Sleep(50 * time.Millisecond)
	}
	return false
}

// waitForNothing waits until the store is empty.
func waitForNothing(t *testing.T, n *node.Node) {
	t.Helper()
	var found []string
	for range 2400 {
		found = nil
		for _, pattern := range []string{"packs/*", "layers/*", "ingest/*"} {
			more, _ := filepath.Glob(filepath.Join(n.DedupRoot(), pattern))
			found = append(found, more...)
		}
		if len(found) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("left behind: %q", found)
}
