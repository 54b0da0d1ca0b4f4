package dedup

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// function is one of the product's, with the names of all that it mentions.
type function struct {
	at       string // as ARCHITECTURE.md names it
	mentions map[string]bool
}

// functions are all of the product, by the name that a caller writes.
func functions(t *testing.T) (byName map[string][]*function, byPlace map[string]*function) {
	t.Helper()
	byName, byPlace = map[string][]*function{}, map[string]*function{}
	for _, top := range []string{"content", "snapshotter", "cmd"} {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			for _, decl := range file.Decls {
				if fn, ok := decl.(*ast.FuncDecl); ok && fn.Body != nil {
					f := &function{filepath.ToSlash(filepath.Dir(path)) + "." + receiver(fn) + fn.Name.Name, mentioned(fn.Body)}
					byName[fn.Name.Name] = append(byName[fn.Name.Name], f)
					byPlace[f.at] = f
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return byName, byPlace
}

// receiver is "Type." of a method, without pointer and type parameters.
func receiver(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return ""
	}
	expr := fn.Recv.List[0].Type
	for {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.Ident:
			return e.Name + "."
		default:
			return ""
		}
	}
}

func mentioned(body ast.Node) map[string]bool {
	names := map[string]bool{}
	ast.Inspect(body, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok {
			names[id.Name] = true
		}
		return true
	})
	return names
}

// leads reports whether one function mentions another by name, or a function does that it mentions, and so on for so
// many steps. Names are all that is compared, since calls may go through a channel, a callback or gRPC.
func leads(byName map[string][]*function, from *function, name string, between int) bool {
	if from.mentions[name] {
		return true
	}
	for next := range from.mentions {
		for _, f := range byName[next] {
			if between > 0 && leads(byName, f, name, between-1) {
				return true
			}
		}
	}
	return false
}

// step is a function as the walks name it.
var step = regexp.MustCompile("`((?:content|snapshotter|cmd)[a-z/-]*\\.[\\w.]+)`")

// Each step of ARCHITECTURE.md's walks is a function that there is, and one of the steps before it leads there.
func TestWalks(t *testing.T) {
	text, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	_, walks, ok := strings.Cut(string(text), "\n## Four walks through the code\n")
	walks, _, more := strings.Cut(walks, "\n## ")
	if !ok || !more {
		t.Fatal("ARCHITECTURE.md has no walks")
	}
	byName, byPlace := functions(t)
	list := strings.Split(walks, "\n**")[1:]
	if len(list) != 4 {
		t.Errorf("%d walks", len(list))
	}
	for _, walk := range list {
		title, steps, _ := strings.Cut(walk, "**")
		t.Run(title, func(t *testing.T) {
			var seen []*function
			for _, m := range step.FindAllStringSubmatch(steps, -1) {
				f := byPlace[m[1]]
				if f == nil {
					t.Errorf("there is no %s", m[1])
					continue
				}
				name := f.at[strings.LastIndex(f.at, ".")+1:]
				led := len(seen) == 0
				for _, before := range seen {
					led = led || leads(byName, before, name, 2)
				}
				if !led {
					t.Errorf("no step before %s leads there", f.at)
				}
				seen = append(seen, f)
			}
			if len(seen) < 8 {
				t.Errorf("%d steps", len(seen))
			}
		})
	}
}
