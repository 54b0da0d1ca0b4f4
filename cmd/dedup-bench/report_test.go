package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []float64
		want   spread
	}{
		{"none", nil, spread{Unit: "s"}},
		{"one", []float64{3}, spread{3, 3, 3, "s"}},
		{"odd, unsorted", []float64{9, 1, 2}, spread{2, 1, 9, "s"}},
		{"even", []float64{4, 1, 2, 9}, spread{3, 1, 9, "s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, spreadOf("s", tt.values)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// The names that issue trackers and scripts rely on are in the file, and are dedup
// divided by overlayfs.
func TestReportRatios(t *testing.T) {
	take := func(subject string, pulls [2]float64, used [2]rootfs.Used) trial {
		tr := trial{Subject: subject}
		for i := range pulls {
			tr.Steps = append(tr.Steps, step{Pull: pulls[i], Flushed: pulls[i] + 1, Used: used[i]})
		}
		return tr
	}
	r := summarise([]string{"overlayfs", "dedup"}, []trial{
		take("overlayfs", [2]float64{8, 4}, [2]rootfs.Used{{Bytes: 600, Inodes: 60}, {Bytes: 1000, Inodes: 100}}),
		take("dedup", [2]float64{4, 1}, [2]rootfs.Used{{Bytes: 480, Inodes: 20}, {Bytes: 500, Inodes: 30}}),
	})
	path := filepath.Join(t.TempDir(), "sub/demo.json")
	if err := r.write(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Ratios map[string]float64 }
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]float64{
		"bytes": 0.5, "inodes": 0.3, "cold_pull": 0.5, "rebuild_pull": 0.25,
		"second_bytes": 0.05, "second_inodes": 0.25, "cold_pull_flushed": 5.0 / 9,
	} {
		if got.Ratios[name] != want {
			t.Errorf("ratios.%s is %v, want %v", name, got.Ratios[name], want)
		}
	}
	var table strings.Builder
	if err := r.print(&table); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(table.String(), "dedup / overlayfs") || !strings.Contains(table.String(), "0.250") {
		t.Errorf("table:\n%s", table.String())
	}

	docs := filepath.Join(t.TempDir(), "README.md")
	marked := "before\n<!-- demo -->\nold\n<!-- end of demo -->\nafter\n"
	if err := os.WriteFile(docs, []byte(marked), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.writeDocs(docs); err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"before\n<!-- demo -->\n", "\n| first pull | 8.00 s | 4.00 s | 0.500 |\n",
		"<!-- end of demo -->\nafter\n"} {
		if !strings.Contains(string(written), want) || strings.Contains(string(written), "old") {
			t.Errorf("docs lack %q, or have the old table:\n%s", want, written)
		}
	}
	if err := r.writeDocs(path); err == nil {
		t.Error("a file without the marks was written")
	}
}
