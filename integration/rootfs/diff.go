package rootfs

import (
	"fmt"
	"maps"
	"path"
	"slices"
)

// DiffOptions say which differences do not count. Lists hold path.Match patterns of
// paths in a Tree.
type DiffOptions struct {
	// RootTime ignores the root directory's own mtime: an image without an entry for it
	// leaves it to the snapshotter.
	RootTime bool
	// Times ignores mtimes of matching paths.
	Times []string
	// Owners ignores mode, uid and gid of matching paths.
	Owners []string
	// Paths ignores matching paths altogether.
	Paths []string
}

// Diff says how got differs from want, one line a difference, sorted by path; nil when
// it does not.
func Diff(want, got Tree, opts DiffOptions) []string {
	all := map[string]bool{}
	for p := range want {
		all[p] = true
	}
	for p := range got {
		all[p] = true
	}
	var lines []string
	for _, p := range slices.Sorted(maps.Keys(all)) {
		if matches(opts.Paths, p) {
			continue
		}
		w, inWant := want[p]
		g, inGot := got[p]
		switch {
		case !inGot:
			lines = append(lines, fmt.Sprintf("%s: missing, want a %s", p, w.Type))
		case !inWant:
			lines = append(lines, fmt.Sprintf("%s: unexpected %s", p, g.Type))
		default:
			lines = append(lines, compare(p, w, g, opts)...)
		}
	}
	return lines
}

func compare(p string, w, g Entry, opts DiffOptions) []string {
	var lines []string
	check := func(what string, want, got any) {
		if want != got {
			lines = append(lines, fmt.Sprintf("%s: %s is %v, want %v", p, what, got, want))
		}
	}
	check("type", w.Type, g.Type)
	if !matches(opts.Owners, p) {
		check("mode", fmt.Sprintf("%04o", w.Mode), fmt.Sprintf("%04o", g.Mode))
		check("uid", w.UID, g.UID)
		check("gid", w.GID, g.GID)
	}
	check("size", w.Size, g.Size)
	if !(opts.RootTime && p == ".") && !matches(opts.Times, p) {
		const layout = "2006-01-02T15:04:05.000000000Z"
		check("mtime", w.MTime.Format(layout), g.MTime.Format(layout))
	}
	check("nlink", w.Nlink, g.Nlink)
	check("hardlink group", w.Group, g.Group)
	check("link target", w.Target, g.Target)
	check("device", fmt.Sprintf("%#x", w.Rdev), fmt.Sprintf("%#x", g.Rdev))
	check("sha256", w.SHA256, g.SHA256)
	names := maps.Clone(w.Xattrs)
	if names == nil {
		names = map[string]string{}
	}
	maps.Copy(names, g.Xattrs)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		wv, inWant := w.Xattrs[name]
		gv, inGot := g.Xattrs[name]
		if inWant != inGot || wv != gv {
			lines = append(lines, fmt.Sprintf("%s: xattr %s is %s, want %s", p, name, show(gv, inGot), show(wv, inWant)))
		}
	}
	return lines
}

func show(value string, present bool) string {
	if !present {
		return "absent"
	}
	return fmt.Sprintf("%q", value)
}

func matches(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, p)
		return err == nil && ok
	})
}
