package layer

import (
	"context"
	"fmt"
	"iter"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Merge reads the trees of a chain, base first, and merges them. The empty
// chain is an empty root directory.
func (s *Store) Merge(ctx context.Context, chain []content.LayerID) (*tree.Node, error) {
	n, err := tree.MergeEach(ctx, readAhead(ctx, s, chain))
	if err != nil {
		return nil, fmt.Errorf("merge chain: %w", err)
	}
	return n, nil
}

// readAhead reads the trees of a chain, each while the one below it is being used.
func readAhead(ctx context.Context, s *Store, chain []content.LayerID) iter.Seq2[[]*content.Entry, error] {
	type read struct {
		entries []*content.Entry
		err     error
	}
	start := func(id content.LayerID) <-chan read {
		done := make(chan read, 1)
		go func() {
			_, entries, err := tree.Read(s.treePath(id), id)
			if isDamage(err) {
				s.harm(ctx, id, Damage{Tree: err})
			}
			if err != nil {
				err = fmt.Errorf("read layer %s: %w", id, err)
			}
			done <- read{entries, err}
		}()
		return done
	}
	return func(yield func([]*content.Entry, error) bool) {
		var next <-chan read
		defer func() {
			if next != nil {
				<-next // it may have to say that the tree is damaged
			}
		}()
		for i, id := range chain {
			if next == nil {
				next = start(id)
			}
			this := <-next
			next = nil
			if i+1 < len(chain) {
				next = start(chain[i+1])
			}
			if !yield(this.entries, this.err) {
				return
			}
		}
	}
}
