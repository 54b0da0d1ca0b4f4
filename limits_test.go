package dedup

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestLimits: the page of limits says what the constants say.
func TestLimits(t *testing.T) {
	text := readPage(t, "docs/limits.md")
	row := regexp.MustCompile("(?m)^\\| [^|]+ \\| ([0-9,]+)( [KMGTP]iB)?[^|]* \\| `([a-z/]+)\\.(\\w+)` \\|")
	rows := row.FindAllStringSubmatch(text, -1)
	constants := newConstants()
	for _, m := range rows {
		want, err := strconv.ParseUint(strings.ReplaceAll(m[1], ",", ""), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		want <<= map[string]int{"": 0, " KiB": 10, " MiB": 20, " GiB": 30, " TiB": 40, " PiB": 50}[m[2]]
		got, err := constants.value(m[3], m[4])
		if err != nil || got != want {
			t.Errorf("%s.%s is %d, the page says %d; %v", m[3], m[4], got, want, err)
		}
	}
	if named := strings.Count(text, "| `content") + strings.Count(text, "| `snapshotter"); len(rows) < 15 ||
		len(rows) != named {
		t.Errorf("%d rows with numbers, %d with constants", len(rows), named)
	}
}

// constantsOf evaluates constants of this module without building it.
type constantsOf struct {
	fset     *token.FileSet
	std      types.Importer
	packages map[string]*types.Package
}

func (c *constantsOf) value(dir, name string) (uint64, error) {
	pkg, err := c.Import(module + "/" + dir)
	if err != nil {
		return 0, err
	}
	k, ok := pkg.Scope().Lookup(name).(*types.Const)
	if !ok {
		return 0, fmt.Errorf("package %s has no constant %s", dir, name)
	}
	v, ok := number(k.Val())
	if !ok {
		return 0, fmt.Errorf("%s.%s is %s", dir, name, k.Val())
	}
	return v, nil
}

// Import implements types.Importer: packages of this module, math and time; of all others nothing is needed.
func (c *constantsOf) Import(path string) (*types.Package, error) {
	dir, ours := strings.CutPrefix(path, module+"/")
	switch {
	case path == "math", path == "time":
		return c.std.Import(path)
	case c.packages[path] != nil:
		return c.packages[path], nil
	case !ours:
		pkg := types.NewPackage(path, filepath.Base(path))
		pkg.MarkComplete()
		return pkg, nil
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		f, err := parser.ParseFile(c.fset, name, text, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	// what it cannot know is no constant
	config := types.Config{IgnoreFuncBodies: true, Importer: c, Error: func(error) {}}
	pkg, _ := config.Check(path, c.fset, files, nil)
	c.packages[path] = pkg
	return pkg, nil
}
