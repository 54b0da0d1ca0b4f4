package layer

import (
	"cmp"
	"context"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// Duplicates tell where what is stored once and used many times comes from. Each list has the row first that saves
// most. Payloads that lie inline in trees are not counted.
type Duplicates struct {
	Paths    []Duplicate // directories, as pathGroup says
	Types    []Duplicate // endings of file names
	Packages []Duplicate // of pip and dpkg, all versions of one together
}

// Duplicate is a group of files.
type Duplicate struct {
	Name string
	// Files and Used are counted once for each use of a layer; Used is the sum of the files' sizes.
	Files, Used int64
	// Objects are what the files are stored as, Stored their sizes. One that several groups share counts
	// for the group that came first.
	Objects, Stored int64
}

func (d Duplicate) saved() int64 { return d.Used - d.Stored }

// maxGroups bounds the rows that are kept while counting: names come from images.
const maxGroups = 10_000

// others takes what comes when there are too many groups.
const others = "(others)"

// groups counts files by name.
type groups map[string]*Duplicate

func (g groups) add(name string, uses, size int64, first bool) {
	d := g[name]
	if d == nil && len(g) >= maxGroups {
		name = others
		d = g[name]
	}
	if d == nil {
		d = &Duplicate{Name: name}
		g[name] = d
	}
	d.Files += uses
	d.Used += uses * size
	if first {
		d.Objects++
		d.Stored += size
	}
}

// most returns the n groups that save most.
func (g groups) most(n int) []Duplicate {
	list := make([]Duplicate, 0, len(g))
	for _, d := range g {
		list = append(list, *d)
	}
	slices.SortFunc(list, func(a, b Duplicate) int {
		return cmp.Or(cmp.Compare(b.saved(), a.saved()), cmp.Compare(a.Name, b.Name))
	})
	return list[:min(n, len(list))]
}

// Duplicates reads the tree of every layer and returns the limit largest groups of each kind. What comes or
// goes meanwhile may or may not be counted.
func (r *reports) Duplicates(ctx context.Context, limit int) (Duplicates, error) {
	paths, types, packages := groups{}, groups{}, groups{}
	list := r.List()
	err := r.inPasses(func(mine func(content.ObjectID) bool) error {
		seen := map[shortID]struct{}{}
		owners, of := map[string]string(nil), -1
		return r.walkTrees(ctx, list, func(i int, f *tree.File) (err error) {
			uses := int64(list[i].Holds)
			if f.Object.IsZero() || uses == 0 || !mine(f.Object) {
				return nil
			}
			if of != i {
				if owners, err = r.packagesOf(ctx, list[i]); err != nil {
					return err
				}
				of = i
			}
			path := string(f.Path)
			_, known := seen[shorten(f.Object)]
			seen[shorten(f.Object)] = struct{}{}
			paths.add(pathGroup(path), uses, f.Size, !known)
			types.add(fileType(path), uses, f.Size, !known)
			if owner := owners[realPath(path)]; owner != "" {
				packages.add(owner, uses, f.Size, !known)
			}
			return nil
		})
	})
	if err != nil {
		return Duplicates{}, err
	}
	return Duplicates{Paths: paths.most(limit), Types: types.most(limit), Packages: packages.most(limit)}, nil
}

// packageDirs hold what package managers install, wherever they are.
var packageDirs = map[string]bool{"site-packages": true, "dist-packages": true, "node_modules": true, "gems": true}

// pathGroup returns the directory that a file is counted under: up to the first that holds packages,
// else the first three below usr and the first two elsewhere.
func pathGroup(p string) string {
	dir, _ := content.SplitPath(p)
	if dir == "" {
		return "/"
	}
	parts := strings.Split(dir, "/")
	for i, part := range parts {
		if packageDirs[part] {
			return "/" + strings.Join(parts[:i+1], "/")
		}
	}
	depth := 2
	if parts[0] == "usr" {
		depth = 3
	}
	return "/" + strings.Join(parts[:min(depth, len(parts))], "/")
}

var (
	sharedObject = regexp.MustCompile(`\.so(\.[0-9.]+)?$`)
	ending       = regexp.MustCompile(`[^.]\.([A-Za-z][A-Za-z0-9_+-]{0,11})$`)
)

// fileType returns the ending of a file's name.
func fileType(p string) string {
	name := path.Base(p)
	if sharedObject.MatchString(name) {
		return ".so"
	}
	if m := ending.FindStringSubmatch(name); m != nil {
		return "." + strings.ToLower(m[1])
	}
	return "(none)"
}
