package main

import (
	"strings"
	"testing"
)

const log = `    kernels_test.go:1: table: bullseye | kernel | 5.10.0-32-cloud-amd64
    kernels_test.go:1: table: bullseye | mode | refused, mount /tmp/x/private: invalid argument
row: mode=shared, file
    kernels_test.go:1: table: sid | kernel | 7.2.13+deb14-cloud-amd64
    kernels_test.go:1: table: sid | reboot | pass
    kernels_test.go:1: table: sid | mode | shared, file
    kernels_test.go:1: table: sid | reboot | FAIL
`

// The last result of a cell counts, also where it is a failure, and rows come in the table's order.
func TestDraw(t *testing.T) {
	want := `| | 5.10.0-32 (Debian 11) | 7.2.13 (unstable) |
| --- | --- | --- |
| mode | refused, EROFS over packs does not mount: invalid argument | shared, file |
| reboot | | FAIL |
`
	got, err := draw([]byte(log))
	if err != nil || got != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	if _, err := draw([]byte("ok\n")); err == nil {
		t.Error("a log without results makes a table")
	}
}

// Only what stands between the marks changes, and a page without them is an error.
func TestPut(t *testing.T) {
	doc := "# Head\n" + begin + "\nstale\n" + end + "\nfoot\n"
	got, err := put([]byte(doc), "| new |\n")
	if want := "# Head\n" + begin + "\n\n| new |\n\n" + end + "\nfoot\n"; err != nil || string(got) != want {
		t.Errorf("%v: %q", err, got)
	}
	if _, err := put([]byte(strings.ReplaceAll(doc, end, "")), "x"); err == nil {
		t.Error("a page without its end of the table is written")
	}
}
