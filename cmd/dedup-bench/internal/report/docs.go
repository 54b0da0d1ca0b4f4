package report

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Marks between which WriteDocs writes.
const (
	docsStart = "<!-- results -->"
	docsEnd   = "<!-- end of results -->"
)

// WriteDocs writes the tables into a Markdown file, between its marks, and the plots into the
// directory beside it that has the file's name without its ending.
func (r Report) WriteDocs(path string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("write docs: %w", err)
	}
	head, rest, found := bytes.Cut(old, []byte(docsStart))
	_, foot, ended := bytes.Cut(rest, []byte(docsEnd))
	if !found || !ended {
		return fmt.Errorf("write docs: %s has no line %s followed by %s", path, docsStart, docsEnd)
	}
	plots := strings.TrimSuffix(path, filepath.Ext(path))
	if err := r.Plots(plots); err != nil {
		return err
	}
	text := string(head) + docsStart + "\n\n" + r.Markdown(filepath.Base(plots)) + "\n" + docsEnd + string(foot)
	return writeFile(path, []byte(text))
}
