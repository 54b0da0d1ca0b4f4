package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// WriteBlob makes a blob of its recipe and writes it to w. The error wraps ErrNoRecipe where none is kept. What was
// written before an error is worth nothing.
func WriteBlob(ctx context.Context, s *Store, blob digest.Digest, w io.Writer) (err error) {
	r := s.recipes
	k, ok := r.recipeOf(blob, true)
	if !ok {
		return fmt.Errorf("blob %s: %w", blob, ErrNoRecipe)
	}
	defer s.Release(k.layer)
	f, rec, err := r.begin(k)
	if err != nil {
		return err
	}
	defer f.Close()
	defer rec.Close()
	defer func() {
		r.count(func(st *RecipeStats) {
			if err == nil {
				st.Followed, st.FollowedBytes = st.Followed+1, st.FollowedBytes+rec.Size
			} else if ctx.Err() == nil {
				st.Useless++
			}
		})
	}()
	mem, err := r.budget.share(ctx, false)
	if err != nil {
		return err
	}
	defer mem.end()
	l, err := r.read(ctx, k.layer, mem)
	if err != nil {
		return err
	}
	err = rec.Build(ctx, w, l)
	r.discard(k, err)
	if errors.Is(err, recipe.ErrOtherBytes) {
		err = fmt.Errorf("%w; a payload may be damaged: run `dedupctl fsck`", err)
	}
	return err
}

// OpenBlob makes a blob of its recipe, in a file that has no name: it goes when it is closed. It is whole, and what its
// digest says.
func OpenBlob(ctx context.Context, s *Store, blob digest.Digest) (f *os.File, size int64, err error) {
	info, err := s.Recipe(blob)
	if err == nil {
		err = s.checkRoom(ctx, info.Size)
	}
	if err != nil {
		return nil, 0, err
	}
	if f, err = os.CreateTemp(s.path(dirIngest), "blob-"); err != nil {
		return nil, 0, fmt.Errorf("make blob %s: %w", blob, err)
	}
	if err = os.Remove(f.Name()); err == nil {
		err = WriteBlob(ctx, s, blob, f)
	}
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("make blob %s: %w", blob, s.explain(err)), f.Close())
	}
	return f, info.Size, nil
}
