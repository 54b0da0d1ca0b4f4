package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func samples() []Sample {
	var all []Sample
	for subject, values := range map[string][]float64{"overlayfs": {8, 4, 5}, "erofs": {1.5, 1.5, 1.5}, "dedup": {1, 3, 2},
		"dedup-exact": {3}} {
		for _, v := range values {
			all = append(all, Sample{"cold", subject, "pull", "s", v}, Sample{"cold", subject, "disk", "bytes", v * 1e6})
		}
	}
	return append(all, Sample{"known", "dedup", "pull", "s", 0.05})
}

func sample(results []Result) Report {
	return Report{Results: results, Baseline: "overlayfs", References: []string{"erofs"}, About: About{
		Machine:  map[string]string{"cpus": "2", "cpu": "a <fast> one", "kernel": "6.18"},
		Versions: map[string]string{"containerd": "2.4.2"}, Settings: map[string]string{"runs": "3"},
	}}
}

func TestSummarise(t *testing.T) {
	s := func(subject string, v float64) Sample { return Sample{"cold", subject, "pull", "s", v} }
	got := Summarise([]Sample{s("b", 9), s("a", 4), s("b", 1), s("a", 1), s("b", 2), s("a", 2), s("a", 9)})
	want := []Result{
		{"cold", "b", "pull", "s", 2, 1, 9, 3},
		{"cold", "a", "pull", "s", 3, 1, 9, 4},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A second run replaces what it measured again and nothing else.
func TestMerge(t *testing.T) {
	old := []Result{{Scenario: "cold", Subject: "a", Metric: "gone"}, {Scenario: "cold", Subject: "b"},
		{Scenario: "start", Subject: "a"}}
	newer := []Result{{Scenario: "cold", Subject: "a", Metric: "pull"}}
	want := []Result{{Scenario: "cold", Subject: "b"}, {Scenario: "start", Subject: "a"},
		{Scenario: "cold", Subject: "a", Metric: "pull"}}
	if diff := cmp.Diff(want, Merge(old, newer)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The names in results.json are what scripts read.
func TestResultsFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sub")
	r := sample(Summarise(samples()))
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var list []map[string]any
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, x := range list {
		if x["scenario"] == "cold" && x["subject"] == "dedup" && x["metric"] == "pull" {
			found = true
			want := map[string]any{"scenario": "cold", "subject": "dedup", "metric": "pull", "unit": "s", "median": 2.0,
				"min": 1.0, "max": 3.0, "runs": 3.0}
			if diff := cmp.Diff(want, x); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		}
	}
	if !found {
		t.Errorf("no pull of dedup in %s", data)
	}
	back, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r.Results, back.Results); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestTables(t *testing.T) {
	r := sample(Summarise(samples()))
	r.About.Skipped = map[string]string{"native": "no reason"}
	var text strings.Builder
	if err := r.Print(&text); err != nil {
		t.Fatal(err)
	}
	for name, table := range map[string]string{"terminal": text.String(), "Markdown": r.Markdown("plots")} {
		for _, want := range []string{
			"dedup/overlayfs", "dedup-exact/erofs", "5.00 (4.00–8.00) s", "2.00 (1.00–3.00) s", "5.00 (4.00–8.00) MB",
			"0.400",            // 2 / 5
			"50.0 ms",          // of a scenario without a baseline
			"0.125–0.750",      // the range of a ratio
			"0.010",            // known by the cold pull of overlayfs
			"missed", "native", // what is not flattering, and why something is not there
			"a <fast> one",
		} {
			if !strings.Contains(table, want) {
				t.Errorf("%s: no %q in\n%s", name, want, table)
			}
		}
	}
}

func TestNumber(t *testing.T) {
	for _, tt := range []struct {
		x    Result
		want string
	}{
		{Result{Unit: "s", Median: 0.0000123, Max: 0.0000123, Min: 0.0000123}, "12.3 µs"},
		{Result{Unit: "s", Median: 0.5, Min: 0.25, Max: 1.5}, "0.50 (0.25–1.50) s"},
		{Result{Unit: "bytes", Median: 12.4e9, Min: 12.4e9, Max: 12.4e9}, "12.4 GB"},
		{Result{Unit: "inodes", Median: 123456, Min: 123456, Max: 123456}, "123456"},
		{Result{Unit: "s"}, "0 µs"},
	} {
		if got := Format(tt.x); got != tt.want {
			t.Errorf("%+v is %q, want %q", tt.x, got, tt.want)
		}
	}
}

// Every figure is whole XML, says what it was measured on and has all subjects and figures in it.
func TestPlots(t *testing.T) {
	dir := t.TempDir()
	r := sample(Summarise(samples()))
	if err := r.Plots(dir); err != nil {
		t.Fatal(err)
	}
	for name, wants := range map[string][]string{
		"cold.svg":   {"overlayfs", "erofs", "exact", "× 0.400", "pull [s]", "disk [MB]", "containerd 2.4.2", "&lt;fast&gt;"},
		"known.svg":  {"50.0", "known: "},
		"ratios.svg": {"cold: pull / overlayfs", "0.4", "containerd 2.4.2"},
	} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		for d := xml.NewDecoder(bytes.NewReader(data)); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
		}
		for _, want := range wants {
			if !bytes.Contains(data, []byte(want)) {
				t.Errorf("%s has no %q", name, want)
			}
		}
	}
}

// A figure of nothing but zeros, and one of a single subject, can be drawn.
func TestPlotsOfLittle(t *testing.T) {
	zero := Summarise([]Sample{{"cold", "erofs", "CPU", "s", 0}, {"cold", "overlayfs", "CPU", "s", 0},
		{"rebuild", "dedup", "pull", "s", 1}})
	if err := sample(zero).Plots(t.TempDir()); err != nil {
		t.Error(err)
	}
}

// Only what stands between the marks changes, however often it is written.
func TestWriteDocs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "benchmarks.md")
	text := "# Head\n<!-- results -->\nstale words\n<!-- end of results -->\nfoot\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	r := sample(Summarise(samples()))
	var last string
	for range 2 {
		if err := r.WriteDocs(path); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if last != "" && last != string(data) {
			t.Errorf("written again it is other:\n%s", cmp.Diff(last, string(data)))
		}
		last = string(data)
	}
	if !strings.HasPrefix(last, "# Head\n") || !strings.HasSuffix(last, "\nfoot\n") || strings.Contains(last, "stale") {
		t.Errorf("written:\n%s", last)
	}
	if !strings.Contains(last, "![cold](benchmarks/cold.svg)") {
		t.Errorf("no plot in\n%s", last)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(path), "benchmarks/cold.svg")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte("no marks"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteDocs(path); err == nil {
		t.Error("a file without marks was written")
	}
}
