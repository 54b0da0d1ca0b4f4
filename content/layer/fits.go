package layer

import (
	"context"
	"fmt"
	"slices"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Fits returns an error that wraps tree.ErrUnfit when a held layer cannot lie on the layers below it, which a chain's
// first container would find out otherwise. Only a layer with hard links into lower ones has to be looked at: below,
// which returns those layers, base first, is called for no other.
func (s *Store) Fits(ctx context.Context, id content.LayerID, below func() ([]content.LayerID, error)) error {
	own, err := belowOf(ctx, s, id)
	if err != nil || own.Links == 0 {
		return err
	}
	chain, err := below()
	if err != nil {
		return err
	}
	for _, lower := range chain {
		if own.Xattrs == 0 {
			break
		}
		b, err := belowOf(ctx, s, lower)
		if err != nil {
			return err
		}
		own.Xattrs += b.Xattrs
	}
	if own.Xattrs > content.MaxBelowXattrs {
		return fmt.Errorf("%w: hard links into lower layers add up to %d bytes of extended attributes, at most %d fit",
			tree.ErrUnfit, own.Xattrs, content.MaxBelowXattrs)
	}
	at := id
	links, err := tree.Links(s.treePath(id), id)
	if err == nil {
		chain = slices.Clone(chain)
		slices.Reverse(chain)
		err = tree.CheckLinks(ctx, links, chain, func(lower content.LayerID) string {
			at = lower
			return s.treePath(lower)
		})
	}
	if isDamage(err) {
		s.harm(ctx, at, Damage{Tree: err})
	}
	return err
}

// belowOf returns what of a layer depends on those below it. The tree of one that an older build stored is read, once.
func belowOf(ctx context.Context, s *Store, id content.LayerID) (tree.Below, error) {
	s.mu.RLock()
	st := s.layers[id]
	var known *tree.Below
	if st != nil {
		known = st.facts.Below
	}
	s.mu.RUnlock()
	if known != nil {
		return *known, nil
	}
	_, entries, err := tree.Read(s.treePath(id), id)
	if isDamage(err) {
		s.harm(ctx, id, Damage{Tree: err})
	}
	if err != nil {
		return tree.Below{}, fmt.Errorf("read layer %s: %w", id, err)
	}
	b := tree.BelowOf(entries)
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.layers[id]; st != nil {
		st.facts.Below = &b
	}
	return b, nil
}

// EachName calls fn for each entry of a held layer, in the order of its paths.
func EachName(ctx context.Context, s *Store, id content.LayerID, fn func(string, content.Kind, content.Flags)) error {
	err := tree.EachName(s.treePath(id), id, fn)
	if isDamage(err) {
		s.harm(ctx, id, Damage{Tree: err})
	}
	if err != nil {
		return fmt.Errorf("read layer %s: %w", id, err)
	}
	return nil
}
