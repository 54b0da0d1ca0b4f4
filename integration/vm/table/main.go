// Command table draws the table of docs/kernels.md from what the tests of integration/vm have logged: their lines with
// "table: KERNEL | ROW | CELL". It reads logs in the order in which they are named; of two results for one cell the
// last one counts, a failed one included.
//
//	table [-docs FILE] LOG...
//
// Without -docs it prints the table. With it, the lines of FILE between <!-- kernels --> and <!-- end of kernels -->
// are written anew.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/vm"
)

// columns are the kernels, and what the head calls the distribution.
var columns = []struct{ suite, name string }{
	{vm.Bullseye, "Debian 11"}, {vm.Bookworm, "Debian 12"}, {vm.Trixie, "Debian 13"}, {vm.Sid, "unstable"},
	{vm.TrixieArm, "Debian 13, arm64"}, {vm.TrixieArm16K, "Debian 13, arm64, pages of 16 KiB"},
	{vm.SidPower, "unstable, ppc64le, pages of 64 KiB"},
}

// first are the rows that come first, in this order; the others follow as they were seen.
var first = []string{
	"mode", "doctor: mode",
	"two nearly equal images: equal to overlayfs", "torture: equal to overlayfs", "demo images: equal to overlayfs",
	"disk dedup", "disk overlayfs", "demo dedup", "demo overlayfs",
	"fs-verity", "reboot", "restarts and kill -9", "kill -9 in a pull", "many images: all back after removal",
	"loop devices left",
}

// titles are rows whose name says too little.
var titles = map[string]string{
	"disk dedup": "two nearly equal images: disk after each, dedup", "disk overlayfs": "the same, overlayfs",
	"demo dedup": "demo images: disk after each, dedup", "demo overlayfs": "the same, overlayfs",
}

const begin, end = "<!-- kernels -->", "<!-- end of kernels -->"

func main() {
	docs := flag.String("docs", "", "Markdown `FILE` that the table is written into")
	flag.Parse()
	if err := run(*docs, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "table:", err)
		os.Exit(1)
	}
}

func run(docs string, logs []string) error {
	var all []byte
	for _, name := range logs {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		all = append(all, b...)
	}
	text, err := draw(all)
	if err != nil {
		return err
	}
	if docs == "" {
		_, err := os.Stdout.WriteString(text)
		return err
	}
	doc, err := os.ReadFile(docs)
	if err != nil {
		return err
	}
	if doc, err = put(doc, text); err != nil {
		return fmt.Errorf("%s: %w", docs, err)
	}
	return os.WriteFile(docs, doc, 0o644)
}

// put replaces what stands between the marks.
func put(doc []byte, text string) ([]byte, error) {
	head, rest, found := bytes.Cut(doc, []byte(begin))
	_, foot, ended := bytes.Cut(rest, []byte(end))
	if !found || !ended {
		return nil, fmt.Errorf("no line %s with its %s", begin, end)
	}
	return fmt.Appendf(nil, "%s%s\n\n%s\n%s%s", head, begin, text, end, foot), nil
}

var cellLine = regexp.MustCompile(`(?m)table: ([^|\n]+) \| ([^|\n]+) \| (.*)$`)

// draw makes a Markdown table: a column for each kernel that is spoken of, a row for each thing that was looked at.
func draw(log []byte) (string, error) {
	cells := map[[2]string]string{} // kernel, row
	rows := slices.Clone(first)
	for _, m := range cellLine.FindAllSubmatch(log, -1) {
		suite, row := string(m[1]), string(m[2])
		cells[[2]string{suite, row}] = strings.TrimSpace(strings.ReplaceAll(string(m[3]), "|", `\|`))
		if !slices.Contains(rows, row) && row != "kernel" {
			rows = append(rows, row)
		}
	}
	kernels := slices.Clone(columns)
	kernels = slices.DeleteFunc(kernels, func(c struct{ suite, name string }) bool {
		return cells[[2]string{c.suite, "kernel"}] == ""
	})
	if len(kernels) == 0 {
		return "", errors.New("the logs have no line with a kernel: want the output of go test -v ./integration/vm")
	}
	var b strings.Builder
	b.WriteString("|")
	for _, k := range kernels {
		fmt.Fprintf(&b, " | %s (%s)", version(cells[[2]string{k.suite, "kernel"}]), k.name)
	}
	b.WriteString(" |\n|" + strings.Repeat(" --- |", len(kernels)+1) + "\n")
	for _, row := range rows {
		line, seen := "", false
		for _, k := range kernels {
			cell := short(cells[[2]string{k.suite, row}])
			if cell != "" {
				cell, seen = " "+cell, true
			}
			line += cell + " |"
		}
		if title := titles[row]; title != "" {
			row = title
		}
		if seen {
			fmt.Fprintf(&b, "| %s |%s\n", row, line)
		}
	}
	return b.String(), nil
}

// version is a kernel's release without its flavour.
func version(release string) string {
	release, _, _ = strings.Cut(release, "+")
	return regexp.MustCompile(`-(cloud|amd64|arm64|powerpc).*`).ReplaceAllString(release, "")
}

// short leaves out of a refusal where it was tried.
func short(cell string) string {
	return regexp.MustCompile(`mount /\S+: `).ReplaceAllString(cell, "EROFS over packs does not mount: ")
}
