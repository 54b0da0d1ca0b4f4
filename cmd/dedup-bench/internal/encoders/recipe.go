package encoders

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/archive"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// Recipe is what it takes to make a tar again from the files of a store.
type Recipe struct {
	Files, Pycs int
	Bytes       int64 // of the recipe
}

// MakeRecipe measures the recipe of a tar in memory.
func MakeRecipe(ctx context.Context, data []byte) (r Recipe, err error) {
	var payloads sums
	entries, err := archive.ReadTar(ctx, bytes.NewReader(data), &payloads, nil)
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
	var out bytes.Buffer
	none := func(content.ObjectID, []byte, int64) error { return errors.New("payloads are not kept") }
	_, err = recipe.Tar(ctx, &out, bytes.NewReader(data), recipe.Layer{Entries: entries, ReadAt: none})
	// A store of fidelity "python" has another time in timestamp pycs: four bytes each.
	r.Bytes = int64(out.Len()) + 4*int64(r.Pycs)
	return r, err
}

// sums takes payloads, and keeps their names.
type sums struct{}

// Put implements archive.Payloads.
func (sums) Put(e *content.Entry, r io.Reader) error {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	e.Object = content.ObjectID{Sum: content.Sum(h.Sum(nil))}
	return nil
}
