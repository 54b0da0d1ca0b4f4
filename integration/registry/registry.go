// Package registry serves OCI images from a directory on a loopback address and keeps
// an access log, so that a test can ask which blobs were fetched.
//
// The protocol is go-containerregistry's; the blobs are plain files, which may be put
// there without a push. It does not authenticate or collect garbage, and encrypts only what
// ServeTLS serves.
//
// # On disk
//
//	<dir>/sha256/<64 hex>   blobs; manifests are in memory and end with the process
//	<dir>/access.log        one JSON Access per line
package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Options of a registry. Dir is required.
type Options struct {
	// Dir holds the blobs and the access log; it is made when missing.
	Dir string
	// Wrap may put a handler in front, to damage what clients get.
	Wrap func(http.Handler) http.Handler
}

// Registry is a running server.
type Registry struct {
	dir    string
	addr   string
	server *http.Server
	others []*http.Server // of ServeTLS
	log    *os.File

	mu sync.Mutex // guards writes to log
}

// Access is one answered request.
type Access struct {
	Method string `json:"method"`
	Path   string `json:"path"`
	Status int    `json:"status"`
	Bytes  int64  `json:"bytes"` // of the answer's body
}

// Start serves on a free port of 127.0.0.1 until Close.
func Start(opts Options) (*Registry, error) {
	if err := os.MkdirAll(filepath.Join(opts.Dir, "sha256"), 0o755); err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	file, err := os.OpenFile(logPath(opts.Dir), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("start registry: %w", err)
	}
	r := &Registry{dir: opts.Dir, addr: listener.Addr().String(), log: file}
	handler := registry.New(registry.WithBlobHandler(blobs{opts.Dir}), registry.Logger(log.New(io.Discard, "", 0)))
	if opts.Wrap != nil {
		handler = opts.Wrap(handler)
	}
	r.server = &http.Server{Handler: r.logged(handler), ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = r.server.Serve(listener) }()
	return r, nil
}

// Dir holds the blobs.
func (r *Registry) Dir() string { return r.dir }

// Addr is host:port.
func (r *Registry) Addr() string { return r.addr }

// Ref is the reference of an image in this registry; name is "repository:tag".
func (r *Registry) Ref(name string) string { return r.addr + "/" + name }

// Close stops serving. The directory stays.
func (r *Registry) Close() error {
	err := r.server.Close()
	for _, other := range r.others {
		err = errors.Join(err, other.Close())
	}
	return errors.Join(err, r.log.Close())
}

// ServeTLS also serves at another address, with a certificate.
func (r *Registry) ServeTLS(address string, certificate tls.Certificate) error {
	config := &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"}}
	listener, err := tls.Listen("tcp", address, config)
	if err != nil {
		return fmt.Errorf("serve the registry with TLS: %w", err)
	}
	other := &http.Server{Handler: r.server.Handler, ReadHeaderTimeout: 10 * time.Second, TLSConfig: config}
	r.others = append(r.others, other)
	go func() { _ = other.Serve(listener) }()
	return nil
}

// Log returns all requests answered so far.
func (r *Registry) Log() ([]Access, error) { return ReadLog(r.dir) }

// Fetched returns the digests of the blobs that clients have downloaded, in order.
func (r *Registry) Fetched() ([]v1.Hash, error) {
	all, err := r.Log()
	if err != nil {
		return nil, err
	}
	return Fetched(all), nil
}

// Fetched picks the downloaded blobs from a log.
func Fetched(accesses []Access) []v1.Hash {
	var hashes []v1.Hash
	for _, a := range accesses {
		_, name, isBlob := strings.Cut(a.Path, "/blobs/")
		if a.Method != http.MethodGet || a.Status/100 != 2 || !isBlob {
			continue
		}
		if h, err := v1.NewHash(name); err == nil {
			hashes = append(hashes, h)
		}
	}
	return hashes
}

// Requests counts what was asked of one blob or manifest, answered well or not.
type Requests struct{ Get, Head int }

// Blobs counts the requests for each blob of a log. An image's config is a blob too.
func Blobs(accesses []Access) map[v1.Hash]Requests {
	counts := map[v1.Hash]Requests{}
	for _, a := range accesses {
		if _, name, isBlob := strings.Cut(a.Path, "/blobs/"); isBlob {
			if h, err := v1.NewHash(name); err == nil {
				counts[h] = counts[h].with(a.Method)
			}
		}
	}
	return counts
}

// Manifests counts the requests for each manifest of a log, by "repository:tag" or "repository@digest".
func Manifests(accesses []Access) map[string]Requests {
	counts := map[string]Requests{}
	for _, a := range accesses {
		repository, name, isManifest := strings.Cut(strings.TrimPrefix(a.Path, "/v2/"), "/manifests/")
		if !isManifest {
			continue
		}
		separator := ":"
		if _, err := v1.NewHash(name); err == nil {
			separator = "@"
		}
		ref := repository + separator + name
		counts[ref] = counts[ref].with(a.Method)
	}
	return counts
}

func (r Requests) with(method string) Requests {
	switch method {
	case http.MethodGet:
		r.Get++
	case http.MethodHead:
		r.Head++
	}
	return r
}

// ReadLog reads the access log of the registry that serves dir, in this process or
// another one.
func ReadLog(dir string) ([]Access, error) {
	f, err := os.Open(logPath(dir))
	if err != nil {
		return nil, fmt.Errorf("read access log: %w", err)
	}
	defer f.Close()
	var all []Access
	for dec := json.NewDecoder(f); ; {
		var a Access
		if err := dec.Decode(&a); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("read access log: %w", err)
		}
		all = append(all, a)
	}
}

func logPath(dir string) string { return filepath.Join(dir, "access.log") }

func (r *Registry) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c := &counter{ResponseWriter: w, status: http.StatusOK}
		// Also when a handler cuts the connection by panicking with ErrAbortHandler.
		defer func() {
			line, err := json.Marshal(Access{req.Method, req.URL.Path, c.status, c.bytes})
			if err != nil {
				return
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			_, _ = r.log.Write(append(line, '\n'))
		}()
		next.ServeHTTP(c, req)
	})
}

type counter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.bytes += int64(n)
	return n, err
}

// ReadFrom keeps sendfile(2) working through the counter: a registry is remote in real
// life, and its CPU time should not slow the pull that is measured.
func (c *counter) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(c.ResponseWriter, src)
	c.bytes += n
	return n, err
}

// blobs is go-containerregistry's disk handler without its habit of hashing a blob on
// every request.
type blobs struct{ dir string }

func (b blobs) path(h v1.Hash) string { return filepath.Join(b.dir, h.Algorithm, h.Hex) }

func (b blobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	info, err := os.Stat(b.path(h))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, registry.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (b blobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(b.path(h))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, registry.ErrNotFound
	}
	return f, err
}

func (b blobs) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	defer rc.Close()
	f, err := os.CreateTemp(b.dir, "upload-")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, rc)
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), b.path(h))
}

func (b blobs) Delete(_ context.Context, _ string, h v1.Hash) error { return os.Remove(b.path(h)) }
