package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A word that dedupctl does not know is an error that names the one that may be meant, or all that there are.
func TestDidYouMean(t *testing.T) {
	for _, row := range []struct {
		words string
		want  string
	}{
		{"stauts", `unknown command "stauts": did you mean status?`},
		{"image", `unknown command "image": did you mean images?`},
		{"dup", `unknown command "dup": did you mean duplicates?`},
		{"wibble", `unknown command "wibble": want status, images, layers`},
		{"config containrd", `unknown command "containrd": did you mean containerd?`},
		{"help stats", `unknown command "stats": did you mean status?`},
		{"images --namespce x", "did you mean --namespace?"},
		{"status --jsn", "did you mean --json?"},
		{"status --wibble", "flag provided but not defined: -wibble (see --help)"},
		{"images --sort siez", `unknown sort key "siez": did you mean size?`},
		{"layers --sort wibble", `unknown sort key "wibble": want added, entries, inodes, size, uses`},
	} {
		t.Run(row.words, func(t *testing.T) {
			var out, errs strings.Builder
			code := run(t.Context(), append([]string{"dedupctl"}, strings.Fields(row.words)...), &out, &errs)
			if code != exitUsage || !strings.Contains(errs.String(), row.want) {
				t.Errorf("exit code %d, %s", code, errs.String())
			}
		})
	}
}

// `help VERB` says what `VERB --help` does, on standard output.
func TestHelpVerb(t *testing.T) {
	for _, row := range []struct{ help, flag, contains string }{
		{"help", "--help", "see what containerd-dedup-grpc stores"},
		{"help images", "images --help", "--sort"},
		{"help config", "config --help", "containerd"},
		{"help config containerd", "config containerd --help", "--write"},
	} {
		t.Run(row.help, func(t *testing.T) {
			var out [2]strings.Builder
			var errs strings.Builder
			for i, words := range []string{row.help, row.flag} {
				args := append([]string{"dedupctl"}, strings.Fields(words)...)
				if code := run(t.Context(), args, &out[i], &errs); code != exitOK {
					t.Errorf("%s: exit code %d: %s", words, code, errs.String())
				}
			}
			if d := cmp.Diff(out[1].String(), out[0].String()); d != "" || !strings.Contains(out[0].String(), row.contains) {
				t.Errorf("(-flag +help): %s%s", d, out[0].String())
			}
		})
	}
}

// The path of a socket has few bytes, and the kernel says only "invalid argument".
func TestLongSocketPath(t *testing.T) {
	var out, errs strings.Builder
	socket := filepath.Join("/run", strings.Repeat("long/", 30), "s")
	code := run(t.Context(), []string{"dedupctl", "--address", socket, "status"}, &out, &errs)
	if code != exitFailure || !strings.Contains(errs.String(), "has 156 bytes, and that of a unix socket at most 107") {
		t.Errorf("exit code %d, %s", code, errs.String())
	}
}

// Images are sorted by what was asked for, the largest first.
func TestImageOrders(t *testing.T) {
	images := []Image{
		{Namespace: "a", Names: []string{"docker.io/app:1"}, LogicalBytes: 5, FreedBytes: 1, Users: 1},
		{Namespace: "b", Names: []string{"docker.io/web:2", "web@sha256:1"}, LogicalBytes: 9, FreedBytes: 0},
		{Namespace: "a", Names: []string{"quay.io/db:3"}, LogicalBytes: 7, FreedBytes: 8},
	}
	for _, row := range []struct {
		key  string
		want string
	}{{"size", "web db app"}, {"frees", "db app web"}, {"name", "app db web"}, {"users", "app web db"}} {
		var got []string
		sorted := append([]Image(nil), images...)
		slices.SortStableFunc(sorted, imageOrders[row.key])
		for _, i := range sorted {
			got = append(got, strings.Split(filepath.Base(i.Names[0]), ":")[0])
		}
		if d := cmp.Diff(row.want, strings.Join(got, " ")); d != "" {
			t.Errorf("by %s: %s", row.key, d)
		}
	}
}
