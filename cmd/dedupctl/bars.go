package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// bars draws amounts beside text, where a terminal allows it.
type bars struct {
	width       int // of the terminal, in columns; 0: no bars
	full, light string
}

const (
	// barMin and barMax are how long a bar may be, in columns.
	barMin, barMax = 10, 40
	// barGap is between text and bar.
	barGap = 2
)

// barsFor are the bars that the terminal behind c's output can show. Elsewhere, in a file or a pipe, there are none.
func barsFor(c *cli.Context) bars {
	f, ok := c.App.Writer.(*os.File)
	if !ok || jsonWanted(c) || os.Getenv("TERM") == "dumb" {
		return bars{}
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return bars{}
	}
	return newBars(int(size.Col), locale())
}

// locale is the one that counts for characters, as setlocale(3) has it.
func locale() string {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := os.Getenv(name); v != "" {
			return v
		}
	}
	return ""
}

func newBars(width int, locale string) bars {
	locale = strings.ToLower(locale)
	if strings.Contains(locale, "utf-8") || strings.Contains(locale, "utf8") {
		return bars{width, "█", "░"}
	}
	return bars{width, "#", "-"}
}

// draw returns a bar of two parts; whole is as long as the bar may get. What is there shows.
func (b bars) draw(length int, full, light, whole int64) string {
	if whole <= 0 {
		return ""
	}
	columns := func(n int64) int {
		c := int(float64(length)*float64(n)/float64(whole) + .5)
		if n > 0 {
			c = max(c, 1)
		}
		return min(c, length)
	}
	first := columns(full)
	return strings.Repeat(b.full, first) + strings.Repeat(b.light, min(columns(light), length-first))
}

// room is how long a bar may be behind text of so many columns; 0 where there is too little.
func (b bars) room(text int) int {
	length := min(b.width-text-barGap, barMax)
	if length < barMin {
		return 0
	}
	return length
}

// barRow is a line with a bar.
type barRow struct {
	label, text        string
	full, light, whole int64
}

// write writes lines with bars below each other.
func (b bars) write(w io.Writer, rows []barRow) {
	label, text := 0, 0
	for _, r := range rows {
		label, text = max(label, utf8.RuneCountInString(r.label)), max(text, utf8.RuneCountInString(r.text))
	}
	length := b.room(label + barGap + text)
	if length == 0 {
		return
	}
	for _, r := range rows {
		bar := b.draw(length, r.full, r.light, r.whole)
		pad := strings.Repeat(" ", length-utf8.RuneCountInString(bar))
		fmt.Fprintf(w, "%-*s  %s%s  %s\n", label, r.label, bar, pad, r.text)
	}
}

// beside puts a bar behind each line of a table but its head, and a legend behind that. Where the terminal has no room
// the table stays as it is.
func (b bars) beside(w io.Writer, legend string, rows []barRow, table func(io.Writer)) {
	var buf bytes.Buffer
	table(&buf)
	lines := strings.Split(strings.TrimSuffix(buf.String(), "\n"), "\n")
	text := 0
	for _, l := range lines[:min(len(rows)+1, len(lines))] {
		text = max(text, utf8.RuneCountInString(l))
	}
	length := b.room(text)
	for i, l := range lines {
		bar := ""
		switch {
		case length == 0 || i > len(rows):
		case i == 0:
			bar = legend
		default:
			bar = b.draw(length, rows[i-1].full, rows[i-1].light, rows[i-1].whole)
		}
		if bar != "" {
			l += strings.Repeat(" ", text-utf8.RuneCountInString(l)+barGap) + bar
		}
		fmt.Fprintln(w, l)
	}
}
