package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	ctdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/recipe"
)

// keepRecipes keeps a recipe of each blob that goes from the disk, where one can be made. A blob without goes all the
// same, as it does where no recipes are kept. Only the end of ctx is an error.
func (t *Trimmer) keepRecipes(ctx context.Context, plan TrimPlan) error {
	if t.recipes == nil || plan.noRecipes {
		return nil
	}
	for at := range plan.Images {
		i := &plan.Images[at]
		refs := slices.Collect(maps.Values(i.refs))
		done := map[digest.Digest]bool{}
		for n, desc := range i.image.Layers {
			if _, goes := plan.going[desc.Digest]; !goes || done[desc.Digest] || !slices.Contains(refs, desc.Digest.String()) {
				continue
			}
			done[desc.Digest] = true
			b, err := t.store.Blob(namespaces.WithNamespace(ctx, i.Namespace), desc)
			if err == nil {
				open := b.Open
				b.Open = func(ctx context.Context) (io.ReadCloser, error) {
					return open(namespaces.WithNamespace(ctx, i.Namespace))
				}
				err = t.recipes.MakeRecipe(ctx, i.image.DiffIDs[n], b)
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			switch {
			case err == nil:
				i.Recipes++
			case errors.Is(err, recipe.ErrNoEncoder), errors.Is(err, recipe.ErrTooLarge):
				log.G(ctx).WithError(err).Debug("kept no recipe: the dropped blob can come only from its registry")
			default:
				log.G(ctx).WithError(err).Warn("kept no recipe: the dropped blob can come only from its registry")
			}
		}
	}
	return nil
}

// Write puts a blob that write makes into the content store, under a lease of the caller's namespace; containerd
// compares its digest. One that is there is left alone.
func (s *Store) Write(ctx context.Context, blob digest.Digest, size int64, lease string,
	write func(io.Writer) error,
) (err error) {
	ctx, _, err = outgoing(ctx)
	if err != nil {
		return err
	}
	ctx = leases.WithLease(ctx, lease)
	ref := "dedup-recipe-" + blob.String()
	w, err := ctdcontent.OpenWriter(ctx, s.content, ctdcontent.WithRef(ref),
		ctdcontent.WithDescriptor(ocispec.Descriptor{Digest: blob, Size: size}))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write blob %s into containerd's content store: %w", blob, err)
	}
	defer func() {
		if cerr := w.Close(); err == nil {
			err = cerr
		}
		if err != nil { // what a try has left would be taken for the beginning
			if aerr := s.content.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
				err = errors.Join(err, aerr)
			}
		}
	}()
	st, err := w.Status()
	if err == nil && st.Offset > 0 {
		err = w.Truncate(0)
	}
	if err == nil {
		err = write(w)
	}
	if err == nil {
		err = w.Commit(ctx, size, blob)
	}
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write blob %s into containerd's content store: %w", blob, err)
	}
	return nil
}
