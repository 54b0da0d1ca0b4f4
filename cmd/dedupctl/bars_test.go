package main

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestStatusBars(t *testing.T) {
	s := Status{
		LogicalBytes: 800e6, StoredBytes: 200e6, StoredInodes: 10,
		FreeBytes: 6e9, TotalBytes: 10e9, FreeInodes: 900_000, TotalInodes: 1_000_000,
	}
	var out strings.Builder
	writeStatusBars(&out, newBars(80, "C"), s)
	want := `
logical  ----------------------  800 MB
stored   ######                  200 MB
disk     #--------               200 MB of ours, 3.80 GB of others, 6.00 GB free
inodes   #--                     10 of ours, 99,990 of others
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for _, width := range []int{0, 1, 40, 50, 81, 500} {
		out.Reset()
		writeStatusBars(&out, newBars(width, "en_US.UTF-8"), s)
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > max(width, 1) {
				t.Errorf("a terminal of %d columns gets a line of %d: %q", width, n, line)
			}
		}
	}
	out.Reset()
	writeStatusBars(&out, newBars(100, "C.UTF-8"), Status{}) // an empty store
	if strings.ContainsAny(out.String(), "█░#") {
		t.Error(out.String())
	}
}

func TestImagesBars(t *testing.T) {
	list := []Image{
		{Namespace: "default", Names: []string{"app:1"}, StoredBytes: 400e6, ExclusiveBytes: 100e6},
		{Namespace: "default", Names: []string{"app:2"}, StoredBytes: 200e6},
	}
	var plain, drawn strings.Builder
	writeImages(&plain, list)
	writeImagesBars(&drawn, newBars(60, "C"), list)
	if plain.String() != drawn.String() {
		t.Errorf("without room the table is another one:\n%s", &drawn)
	}
	drawn.Reset()
	writeImagesBars(&drawn, newBars(140, "C.UTF-8"), list)
	lines := strings.Split(drawn.String(), "\n")
	for i, want := range []string{
		"█ EXCLUSIVE ░ SHARED", strings.Repeat("█", 10) + strings.Repeat("░", 30), "  " + strings.Repeat("░", 20),
	} {
		if !strings.HasSuffix(lines[i], want) {
			t.Errorf("line %d does not end with %q:\n%s", i, want, &drawn)
		}
	}
	if lines[len(lines)-2] != "2 images with 0 B of files" {
		t.Errorf("%q", lines)
	}
}
