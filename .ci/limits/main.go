// Command limits checks the limits that keep this tree readable, and fails when one is passed:
//
//	type      at most 30 methods
//	function  at most 80 lines
//	file      at most 500 lines of Go, 600 of a test
//	line      at most 120 columns, in Go and in Markdown; a tab counts as one, tables and links may be longer
//
// The file "known" beside it lists what passed a limit before the limit was checked, one place and its size a
// line. An entry that is no longer needed, or is larger than it has to be, fails too: the list only shrinks.
// `go run ./.ci/limits -update` writes it anew.
package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	maxMethods  = 30
	maxFunction = 80
	maxFile     = 500
	maxTestFile = 600
	maxColumns  = 120
	knownFile   = ".ci/limits/known"
)

// sizes maps a place and what is measured there to its size: "path what" -> size.
type sizes map[string]int

func main() {
	update := flag.Bool("update", false, "write the list of known places anew")
	flag.Parse()
	if err := run(*update); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(update bool) error {
	found, err := measure()
	if err != nil {
		return err
	}
	if update {
		return found.write(knownFile)
	}
	known, err := readKnown(knownFile)
	if err != nil {
		return err
	}
	var wrong []string
	for _, place := range slices.Sorted(maps.Keys(found)) {
		if found[place] > known[place] {
			wrong = append(wrong, fmt.Sprintf("%s: %d", place, found[place]))
		}
	}
	for _, place := range slices.Sorted(maps.Keys(known)) {
		if found[place] < known[place] {
			wrong = append(wrong, fmt.Sprintf("%s: %s says %d, and it is less: run `go run ./.ci/limits -update`",
				place, knownFile, known[place]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("limits passed (.ci/limits/main.go has them):\n%s", strings.Join(wrong, "\n"))
	}
	return nil
}

// measure returns every place of the tree that passes a limit.
func measure() (sizes, error) {
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.go", "*.md").Output()
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	found := sizes{}
	methods := map[string]int{}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		text, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			continue // removed, and not yet committed
		}
		if err != nil {
			return nil, err
		}
		found.lines(path, string(text))
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, ".pb.go") {
			if err := found.code(path, text, methods); err != nil {
				return nil, err
			}
		}
	}
	for receiver, n := range methods {
		if n > maxMethods {
			found[receiver+" methods"] = n
		}
	}
	return found, nil
}

// lines looks at the lengths of lines, and of the file.
func (s sizes) lines(path, text string) {
	if strings.HasSuffix(path, ".pb.go") {
		return
	}
	long := 0
	markdown := strings.HasSuffix(path, ".md")
	code := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		start := strings.TrimLeft(line, " ") // in a list they are indented
		code = code != strings.HasPrefix(start, "```")
		free := markdown && (code || strings.HasPrefix(start, "|") || strings.Contains(line, "](")) ||
			!markdown && strings.Contains(line, "://")
		if !free && utf8.RuneCountInString(line) > maxColumns {
			long++
		}
	}
	if long > 0 {
		s[path+" long-lines"] = long
	}
	limit := maxFile
	if strings.HasSuffix(path, "_test.go") {
		limit = maxTestFile
	}
	if n := strings.Count(text, "\n"); n > limit && !markdown {
		s[path+" lines"] = n
	}
}

// code looks at functions, and counts methods by package and receiver.
func (s sizes) code(path string, text []byte, methods map[string]int) error {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, text, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	for _, d := range file.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		n := set.Position(fn.End()).Line - set.Position(fn.Pos()).Line + 1
		if n > maxFunction {
			s[path+" "+fn.Name.Name] = n
		}
		if fn.Recv != nil && len(fn.Recv.List) == 1 && !strings.HasSuffix(path, "_test.go") {
			methods[filepath.Dir(path)+"."+receiver(fn.Recv.List[0].Type)]++
		}
	}
	return nil
}

func receiver(t ast.Expr) string {
	switch t := t.(type) {
	case *ast.StarExpr:
		return receiver(t.X)
	case *ast.IndexExpr:
		return receiver(t.X)
	case *ast.Ident:
		return t.Name
	}
	return "?"
}

func readKnown(path string) (sizes, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	known := sizes{}
	for line := range strings.Lines(string(text)) {
		place, n, ok := cutLast(strings.TrimSpace(line))
		var size int
		if _, err := fmt.Sscan(n, &size); !ok || err != nil {
			return nil, fmt.Errorf("%s: %q is no place with a size", path, line)
		}
		known[place] = size
	}
	return known, nil
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, ' ')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func (s sizes) write(path string) error {
	var b strings.Builder
	for _, place := range slices.Sorted(maps.Keys(s)) {
		fmt.Fprintf(&b, "%s %d\n", place, s[place])
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
