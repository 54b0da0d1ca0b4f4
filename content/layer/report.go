package layer

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Listed is a layer in a report.
type Listed struct {
	Facts
	// Holds are the snapshots that use the layer, and ingests that are under way.
	Holds int
	// File is what its tree file occupies, in bytes, rounded up to blocks of 4 KiB.
	File int64
}

// EqualGroups returns the sets of two or more layers in list that have one payload digest, which
// are equal but for mtime, uid and gid: most bytes first, each set in list's order.
func EqualGroups(list []Listed) [][]Listed {
	byPayload := map[content.PayloadDigest][]Listed{}
	for _, l := range list {
		byPayload[l.Payload] = append(byPayload[l.Payload], l)
	}
	var groups [][]Listed
	for _, g := range byPayload {
		if len(g) > 1 {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b []Listed) int {
		return cmp.Or(cmp.Compare(b[0].Bytes, a[0].Bytes), bytes.Compare(a[0].Payload.Sum[:], b[0].Payload.Sum[:]))
	})
	return groups
}

// Objects returns how many objects are stored.
func (p *packed) Objects() int { return p.objects.Len() }

// Measure returns what objects, trees and recipes occupy on the disk, directories included. It looks at every
// file, without holding up ingests: what comes or goes meanwhile may or may not be counted.
func (r *reports) Measure(ctx context.Context) (Usage, error) {
	return DiskUsage(ctx, r.path(dirPacks), r.path(dirLayers), r.path(dirObjects), r.path(dirRecipes))
}

// DiskUsage returns what the trees below dirs occupy as the file system accounts it. Files that vanish
// meanwhile are no error.
func DiskUsage(ctx context.Context, dirs ...string) (u Usage, err error) {
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				err = ctx.Err()
			}
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &st)
			}
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			u.Bytes += st.Blocks * 512 // stat(2): in units of 512 bytes, whatever the block size
			u.Inodes++
			return err
		})
		if err != nil {
			return Usage{}, fmt.Errorf("measure %s: %w", dir, err)
		}
	}
	return u, nil
}
