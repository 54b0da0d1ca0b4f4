package report

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// blocks are what WriteDocs writes, each between "<!-- NAME -->" and "<!-- end of NAME -->".
var blocks = []struct {
	name    string
	corpora bool // it is about corpora
	text    func(r Report, plots string) string
}{
	{"results", false, Report.Markdown},
	{"corpora", true, Report.corporaMarkdown},
	{"corpora in short", true, Report.corporaSummary},
}

// WriteDocs writes tables into a Markdown file, between the marks that it has, and plots into the directory beside it
// that has the file's name without its ending. The results of corpora are kept there too, in corpora/: they take long,
// and Read reads them again.
func (r Report) WriteDocs(path string) error {
	doc, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("write docs: %w", err)
	}
	plots := strings.TrimSuffix(path, filepath.Ext(path))
	marked := false
	for _, b := range blocks {
		part := r.only(b.corpora)
		if _, found := Fill(doc, b.name, ""); !found {
			continue
		}
		marked = true
		if len(part.Results) == 0 {
			continue
		}
		doc, _ = Fill(doc, b.name, b.text(part, filepath.Base(plots)))
		if b.name == "corpora in short" {
			continue // no plot
		}
		if err := part.Plots(plots); err != nil {
			return err
		}
		if b.corpora {
			if err := part.WriteData(filepath.Join(plots, "corpora")); err != nil {
				return err
			}
		}
	}
	if !marked {
		return fmt.Errorf("write docs: %s has no line <!-- results --> or <!-- corpora --> with its end", path)
	}
	return writeFile(path, doc)
}

// Fill returns doc with text between "<!-- NAME -->" and "<!-- end of NAME -->", and whether it has both.
func Fill(doc []byte, name, text string) ([]byte, bool) {
	head, rest, found := bytes.Cut(doc, fmt.Appendf(nil, "<!-- %s -->", name))
	_, foot, ended := bytes.Cut(rest, fmt.Appendf(nil, "<!-- end of %s -->", name))
	if !found || !ended {
		return doc, false
	}
	return fmt.Appendf(nil, "%[1]s<!-- %[2]s -->\n\n%[3]s\n<!-- end of %[2]s -->%[4]s", head, name, text, foot), true
}
