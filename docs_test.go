package dedup

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// Every relative link of the documentation leads to a file that there is, and every anchor to a heading. Every test
// that is named as a witness exists.
func TestDocs(t *testing.T) {
	var pages []string
	tests := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" ||
			d.Name() == "out") {
			return fs.SkipDir
		}
		switch {
		case err != nil || d.IsDir():
		case strings.HasSuffix(path, ".md"):
			pages = append(pages, path)
		case strings.HasSuffix(path, "_test.go"):
			text, rerr := os.ReadFile(path)
			for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`).FindAllStringSubmatch(string(text),
				-1) {
				tests[m[1]] = true
			}
			return rerr
		}
		return err
	})
	if err != nil || len(pages) < 5 || len(tests) < 100 {
		t.Fatal(err, len(pages), len(tests))
	}
	links := 0
	for _, page := range pages {
		text := readPage(t, page)
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(m[1], "://") && !strings.HasPrefix(m[1], "mailto:") {
				links++
				checkLink(t, page, m[1])
			}
		}
		for _, m := range regexp.MustCompile(`\b(?:Test|Benchmark|Fuzz)[A-Z]\w+`).FindAllString(text, -1) {
			if !tests[m] {
				t.Errorf("%s names %s, which there is not", page, m)
			}
		}
	}
	if links < 20 {
		t.Errorf("only %d links were followed", links)
	}
}

// readPage returns a page without its blocks of code.
func readPage(t *testing.T, page string) string {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(string(text), "")
}

func checkLink(t *testing.T, page, link string) {
	t.Helper()
	path, anchor, _ := strings.Cut(link, "#")
	target := page
	if path != "" {
		target = filepath.Join(filepath.Dir(page), path)
	}
	if _, err := os.Stat(target); err != nil {
		t.Errorf("%s: %s: %v", page, link, err)
		return
	}
	if anchor != "" && !anchors(readPage(t, target))[anchor] {
		t.Errorf("%s: %s: no such heading", page, link)
	}
}

// anchors returns what GitHub makes of a page's headings.
func anchors(text string) map[string]bool {
	all := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#{1,6} (.+)$`).FindAllStringSubmatch(text, -1) {
		plain := regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(m[1], "$1")
		name := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(plain))
		unique := name
		for i := 1; all[unique]; i++ {
			unique = fmt.Sprintf("%s-%d", name, i)
		}
		all[unique] = true
	}
	return all
}

// The list of pages has each page, who reads it, and three questions.
func TestDocsList(t *testing.T) {
	text := readPage(t, "docs/index.md")
	pages, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(pages, "../ARCHITECTURE.md", "../CONTRIBUTING.md") {
		link := "](" + strings.TrimPrefix(page, "docs/") + ") |"
		_, row, listed := strings.Cut(text, link)
		row, _, _ = strings.Cut(row, "\n")
		if page != "docs/index.md" && (!listed || strings.Count(row, "?") != 3) {
			t.Errorf("docs/index.md has no row with three questions for %s", page)
		}
	}
}
