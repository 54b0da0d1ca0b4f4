package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
)

// print writes v as JSON when asked to, else as text for a person.
func print[T any](c *cli.Context, v T, text func(io.Writer, T)) error {
	if !jsonWanted(c) {
		w := &errWriter{w: c.App.Writer}
		text(w, v)
		return w.err
	}
	e := json.NewEncoder(c.App.Writer)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// errWriter keeps the first error, so that a full disk behind a redirection is an error of the command.
type errWriter struct {
	w   io.Writer
	err error
}

func (w *errWriter) Write(p []byte) (int, error) {
	if w.err == nil {
		if _, err := w.w.Write(p); err != nil {
			w.err = fmt.Errorf("print: %w", err)
		}
	}
	return len(p), nil
}

// table aligns columns; rows are separated by newlines, cells by tabs.
func table(w io.Writer, rows func(w io.Writer)) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	rows(t)
	_ = t.Flush() // w keeps the error
}

// size writes bytes with three digits and a decimal unit, like df --si and image registries.
func size(n int64) string {
	if n < 1000 {
		return strconv.FormatInt(n, 10) + " B"
	}
	v, unit := float64(n)/1000, 0
	for units := "kMGTPE"; ; unit++ {
		digits := 2
		switch {
		case v >= 99.95:
			digits = 0
		case v >= 9.995:
			digits = 1
		}
		if v < 999.5 || unit == len(units)-1 {
			return fmt.Sprintf("%.*f %cB", digits, v, units[unit])
		}
		v /= 1000
	}
}

// count writes a number with commas between thousands.
func count(n int64) string {
	s := strconv.FormatInt(n, 10)
	start := 0
	if n < 0 {
		start = 1
	}
	for i := len(s) - 3; i > start; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural writes a number and what is counted.
func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(n) + " " + many
}

func percent(part, whole int64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

// ratio writes how many times more one is than the other.
func ratio(logical, stored int64) string {
	if logical == 0 || stored == 0 {
		return "-"
	}
	r := float64(logical) / float64(stored)
	if r < 1 {
		return fmt.Sprintf("%.2fx", r)
	}
	return fmt.Sprintf("%.1fx", r)
}

// short cuts a digest to what tells layers apart; --json has all of it.
func short(digest string) string {
	const prefix, digits = "sha256:", 12
	if len(digest) > len(prefix) && digest[:len(prefix)] == prefix {
		digest = digest[len(prefix):]
	}
	return digest[:min(digits, len(digest))]
}

// plain shows text of foreign origin without what a terminal would obey or a table would trip over.
func plain(text string) string {
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			quoted := strconv.QuoteToGraphic(text)
			return quoted[1 : len(quoted)-1]
		}
	}
	return text
}
