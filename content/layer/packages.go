package layer

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"io/fs"
	"path"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

const (
	// maxList is the largest list of a package's files that is read, in bytes; that of a package with 100,000
	// files has about this size.
	maxList = 16 << 20
	// maxOwned bounds the files of one layer whose packages are remembered.
	maxOwned = 1 << 20
)

// packagesOf returns the packages of a layer's files, by realPath, as the package managers' lists in the same layer
// say. The lists are foreign bytes: one that makes no sense names files that are not there.
func (r *reports) packagesOf(ctx context.Context, l Listed) (map[string]string, error) {
	owners := map[string]string{}
	err := tree.Files(r.treePath(l.ID), l.ID, func(f *tree.File) error {
		if !bytes.HasSuffix(f.Path, []byte(".list")) && !bytes.HasSuffix(f.Path, []byte("/RECORD")) {
			return nil
		}
		name, files := packageList(string(f.Path))
		if files == nil || f.Size > maxList {
			return ctx.Err()
		}
		data := f.Data
		if !f.Object.IsZero() {
			var err error
			if data, err = r.objects.Read(f.Object); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		for _, file := range files(data) {
			if len(owners) >= maxOwned {
				return fs.SkipAll
			}
			owners[realPath(file)] = name
		}
		return nil
	})
	if errors.Is(err, fs.SkipAll) || errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return owners, err
}

// packageList tells whether a path is where a package manager lists the files of a package, and how to read it.
func packageList(p string) (name string, files func([]byte) []string) {
	dir, base := content.SplitPath(p)
	if dir == "var/lib/dpkg/info" {
		name, ok := strings.CutSuffix(base, ".list")
		if !ok {
			return "", nil
		}
		name, _, _ = strings.Cut(name, ":") // the architecture
		return name + " (dpkg)", dpkgFiles
	}
	site, info := content.SplitPath(dir)
	if name, ok := strings.CutSuffix(info, ".dist-info"); ok && base == "RECORD" {
		name, _, _ = strings.Cut(name, "-") // the version
		return name + " (pip)", func(data []byte) []string { return pipFiles(site, data) }
	}
	return "", nil
}

// dpkgFiles reads absolute paths, one a line.
func dpkgFiles(data []byte) []string {
	var files []string
	for line := range bytes.Lines(data) {
		if p := strings.Trim(string(line), "/\n"); p != "" && p != "." {
			files = append(files, p)
		}
	}
	return files
}

// pipFiles reads a RECORD (PEP 376): a CSV whose first column is a path relative to site-packages.
func pipFiles(site string, data []byte) []string {
	var files []string
	r := csv.NewReader(bytes.NewReader(data))
	r.FieldsPerRecord, r.LazyQuotes, r.ReuseRecord = -1, true, true
	for {
		record, err := r.Read()
		if err != nil {
			return files // its end, or no CSV from here on
		}
		if file := record[0]; !path.IsAbs(file) {
			files = append(files, path.Join(site, file))
		}
	}
}

// realPath writes the path of a file in a directory that merged-usr systems have moved below usr as dpkg may have it.
func realPath(p string) string {
	rest, ok := strings.CutPrefix(p, "usr/")
	if !ok {
		return p
	}
	switch top, _, _ := strings.Cut(rest, "/"); top {
	case "bin", "sbin", "lib", "lib32", "lib64", "libx32":
		return rest
	}
	return p
}
