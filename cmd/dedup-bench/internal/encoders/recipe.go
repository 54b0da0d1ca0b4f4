package encoders

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// Recipe is what the product does with a blob.
type Recipe struct {
	Files, Pycs int
	// Bytes are those of the recipe of the tar, with the timestamps that a store of fidelity "python" has changed.
	Bytes int64
	// Encoder is the product's that makes the blob; "" for none. Looked is how long it took to find out.
	Encoder string
	Looked  time.Duration
	// Made is how long it took to write the recipe, the look included, and Built to make the blob of it.
	Made, Built time.Duration
}

// MakeRecipe makes the recipe of the blob in a file, whose tar is data, and the blob of that.
func MakeRecipe(ctx context.Context, path string, data []byte) (r Recipe, err error) {
	payloads := objects{}
	entries, err := archive.ReadTar(ctx, bytes.NewReader(data), payloads, nil)
	if err != nil {
		return r, err
	}
	for _, e := range entries {
		if e.Kind != content.Regular || e.Size == 0 {
			continue
		}
		r.Files++
		if strings.HasSuffix(e.Path, ".pyc") {
			r.Pycs++
		}
	}
	l := recipe.Layer{ID: content.LayerID{Sum: sha256.Sum256(data)}, Entries: entries, ReadAt: payloads.readAt}
	var of bytes.Buffer
	if _, err := recipe.Tar(ctx, &of, bytes.NewReader(data), l); err != nil {
		return r, err
	}
	r.Bytes = int64(of.Len()) + 4*int64(r.Pycs)
	return r, r.follow(ctx, path, int64(len(data)), l)
}

func (r *Recipe) follow(ctx context.Context, path string, tarSize int64, l recipe.Layer) error {
	blob, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b := recipe.Blob{Sum: sha256.Sum256(blob), Size: int64(len(blob)), TarSize: tarSize,
		Open: func() (io.ReadCloser, error) { return os.Open(path) }}
	start := time.Now()
	_, err = recipe.Find(ctx, b.Open, nil)
	if r.Looked = time.Since(start); errors.Is(err, recipe.ErrNoEncoder) {
		return nil
	}
	start = time.Now()
	var file bytes.Buffer
	if _, err = recipe.Make(ctx, &file, b, l, nil); err != nil {
		return err
	}
	r.Made = time.Since(start)
	rec, err := recipe.Read(&file)
	if err != nil {
		return err
	}
	defer rec.Close()
	start = time.Now()
	err = rec.Build(ctx, io.Discard, l)
	if r.Built = time.Since(start); errors.Is(err, recipe.ErrOtherBytes) {
		return nil
	}
	r.Encoder = rec.Encoder
	return err
}

// objects are payloads in memory.
type objects map[content.ObjectID][]byte

// Put implements archive.Payloads.
func (o objects) Put(e *content.Entry, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if len(data) <= content.InlineMax {
		e.Data = data
		return nil
	}
	e.Object.Sum = sha256.Sum256(data)
	o[e.Object] = data
	return nil
}

func (o objects) readAt(id content.ObjectID, b []byte, off int64) error {
	if data := o[id]; off+int64(len(b)) <= int64(len(data)) {
		copy(b, data[off:])
		return nil
	}
	return fmt.Errorf("no object %s", id)
}
