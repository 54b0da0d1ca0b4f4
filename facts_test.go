package dedup

import (
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Numbers that several pages name are what the code has. Each is the group of a pattern, wherever that matches.
func TestFacts(t *testing.T) {
	constants := newConstants()
	inline := `(?:[Pp]ayloads?|[Ff]iles|file)\s+of (?:up to|at most) ([\d,]+) bytes|[Pp]ayloads up to ([\d,]+) bytes` +
		`|inline up to ([\d,]+) bytes|with ([\d,]+) bytes 2\.7 %`
	for _, fact := range []struct {
		pattern   string
		dir, name string
		unit      uint64
		pages     int // at least so many name it
	}{
		{inline, "content", "InlineMax", 1, 5},
		{`[Tt]rees have format (\d+)`, "content/tree", "formatVersion", 1, 1},
		{`[Tt]rees of format (\d+) are taken`, "content/tree", "formerVersion", 1, 1},
		{`stores (?:have )?layout (\d+)|[Ll]ayout (\d+); older builds`, "snapshotter", "layoutVersion", 1, 2},
		{`options than ([\d,]+) bytes are never`, "snapshotter/lower", "maxOptions", 1, 1},
		{`Prepare waits (\d+) ms at most for an ingest`, "snapshotter", "ingestPatience", 1_000_000, 1},
		{`, and (\d+) s for what lies below`, "snapshotter", "belowPatience", 1_000_000_000, 1},
	} {
		want, err := constants.value(fact.dir, fact.name)
		if err != nil {
			t.Error(err)
			continue
		}
		pages := 0
		for path, text := range texts(t) {
			for _, m := range regexp.MustCompile(strings.ReplaceAll(fact.pattern, " ", `\s+`)).FindAllStringSubmatch(text, -1) {
				pages++
				digits := strings.ReplaceAll(strings.Join(m[1:], ""), ",", "")
				if got, err := strconv.ParseUint(digits, 10, 64); err != nil || got*fact.unit != want {
					t.Errorf("%s says %q, and %s.%s is %d", path, m[0], fact.dir, fact.name, want/fact.unit)
				}
			}
		}
		if pages < fact.pages {
			t.Errorf("%s.%s is named %d times, not %d: %s", fact.dir, fact.name, pages, fact.pages, fact.pattern)
		}
	}
}

// texts are the pages and the definitions of formats, by path. Benchmarks speak of the build that was measured.
func texts(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "proto/dedup/v1/*.proto"} {
		paths, err := filepath.Glob(pattern)
		if err != nil || len(paths) == 0 {
			t.Fatal(pattern, err)
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all[path] = string(text)
		}
	}
	return all
}

// The tree of files in content's documentation is what the code makes in the root, and no more.
func TestLayoutOnDisk(t *testing.T) {
	doc, err := os.ReadFile("content/doc.go")
	if err != nil {
		t.Fatal(err)
	}
	_, tree, _ := strings.Cut(string(doc), "//	<root>/\n")
	drawn := map[string]bool{}
	for line := range strings.Lines(tree) {
		line, ok := strings.CutPrefix(line, "//	  ")
		if !ok {
			break
		}
		for name := range strings.SplitSeq(line[:strings.Index(line+"   ", "   ")], ", ") {
			name, _, _ = strings.Cut(strings.TrimSpace(name), "/")
			drawn[name] = true
		}
	}
	made := map[string]bool{}
	for _, dir := range []string{"content/layer", "snapshotter"} {
		maps.Copy(made, rootNames(t, dir))
	}
	delete(made, "not-built-yet") // it is never there
	if got, want := slices.Sorted(maps.Keys(drawn)), slices.Sorted(maps.Keys(made)); !slices.Equal(got, want) {
		t.Errorf("content/doc.go draws %q, and the code makes %q", got, want)
	}
}

// rootNames are the first arguments of all calls of path, which joins with the root, in a package.
func rootNames(t *testing.T, dir string) map[string]bool {
	t.Helper()
	paths, err := filepath.Glob(dir + "/*.go")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	constants := map[string]string{}
	var arguments []string
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				for i, v := range n.Values {
					if lit, ok := v.(*ast.BasicLit); ok && lit.Kind == token.STRING && i < len(n.Names) {
						constants[n.Names[i].Name], _ = strconv.Unquote(lit.Value)
					}
				}
			case *ast.CallExpr:
				if sel, ok := n.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "path" || len(n.Args) == 0 {
					break
				}
				switch arg := n.Args[0].(type) {
				case *ast.BasicLit:
					name, _ := strconv.Unquote(arg.Value)
					names[name] = true
				case *ast.Ident:
					arguments = append(arguments, arg.Name)
				}
			}
			return true
		})
	}
	for _, a := range arguments {
		if name, ok := constants[a]; ok {
			names[name] = true
		}
	}
	return names
}

// newConstants returns what evaluates constants.
func newConstants() *constantsOf {
	c := &constantsOf{fset: token.NewFileSet(), packages: map[string]*types.Package{}}
	c.std = importer.ForCompiler(c.fset, "source", nil)
	return c
}

// number is a constant's value; versions are text.
func number(v constant.Value) (uint64, bool) {
	if v.Kind() == constant.String {
		n, err := strconv.ParseUint(constant.StringVal(v), 10, 64)
		return n, err == nil
	}
	return constant.Uint64Val(constant.ToInt(v))
}
