// Package report turns samples into medians, and those into results.json, tables and plots.
//
// # Files of a run's directory
//
//	results.json   a list of Result
//	about.json     About: machine, versions, settings, what was skipped
//	results.md     the tables as Markdown
//	*.svg          one figure for each scenario, and ratios.svg
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Result is one figure of one subject over several runs. Units: "s", "bytes", "inodes", ...
type Result struct {
	Scenario string  `json:"scenario"`
	Subject  string  `json:"subject"`
	Metric   string  `json:"metric"`
	Unit     string  `json:"unit"`
	Median   float64 `json:"median"`
	Min      float64 `json:"min"`
	Max      float64 `json:"max"`
	Runs     int     `json:"runs"`
}

// About says what results were taken on and how.
type About struct {
	Machine  map[string]string `json:"machine"`
	Versions map[string]string `json:"versions"`
	Settings map[string]string `json:"settings"`
	Skipped  map[string]string `json:"skipped,omitempty"` // subject or scenario -> why
	Time     time.Time         `json:"time"`
}

// Sample is one figure of one run.
type Sample struct {
	Scenario, Subject, Metric, Unit string
	Value                           float64
}

// Summarise makes one Result of all samples that differ in nothing but their value, in
// the order in which they first appear.
func Summarise(samples []Sample) []Result {
	var results []Result
	values := map[Result][]float64{}
	for _, s := range samples {
		key := Result{Scenario: s.Scenario, Subject: s.Subject, Metric: s.Metric, Unit: s.Unit}
		if values[key] == nil {
			results = append(results, key)
		}
		values[key] = append(values[key], s.Value)
	}
	for i, r := range results {
		sorted := slices.Sorted(slices.Values(values[r]))
		n := len(sorted)
		results[i].Median, results[i].Min, results[i].Max = (sorted[(n-1)/2]+sorted[n/2])/2, sorted[0], sorted[n-1]
		results[i].Runs = n
	}
	return results
}

// Merge puts newer results over older ones: a scenario and subject that was measured again has
// only its new figures.
func Merge(older, newer []Result) []Result {
	type key struct{ scenario, subject string }
	again := map[key]bool{}
	for _, r := range newer {
		again[key{r.Scenario, r.Subject}] = true
	}
	merged := slices.DeleteFunc(slices.Clone(older), func(r Result) bool { return again[key{r.Scenario, r.Subject}] })
	return append(merged, newer...)
}

// Report is what tables and plots are made of.
type Report struct {
	Results []Result
	About   About
	// Baseline and References are subjects that the others are divided by.
	Baseline   string
	References []string
}

// Read reads what Write wrote; a directory without results is an empty report.
func Read(dir string) (r Report, err error) {
	for name, into := range map[string]any{"results.json": &r.Results, "about.json": &r.About} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return r, fmt.Errorf("read results: %w", err)
		}
		if err := json.Unmarshal(data, into); err != nil {
			return r, fmt.Errorf("read results: %s: %w", filepath.Join(dir, name), err)
		}
	}
	return r, nil
}

// Write writes all files of a run's directory.
func (r Report) Write(dir string) error {
	if err := r.WriteData(dir); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, "results.md"), []byte(r.Markdown(""))); err != nil {
		return err
	}
	return r.Plots(dir)
}

// WriteData writes results.json and about.json.
func (r Report) WriteData(dir string) error {
	results := r.Results
	if results == nil {
		results = []Result{} // an empty list, not null
	}
	for name, from := range map[string]any{"results.json": results, "about.json": r.About} {
		data, err := json.MarshalIndent(from, "", "  ")
		if err != nil {
			return fmt.Errorf("write results: %w", err)
		}
		if err := writeFile(filepath.Join(dir, name), append(data, '\n')); err != nil {
			return err
		}
	}
	return nil
}

// writeFile leaves a whole file or the old one.
func writeFile(path string, data []byte) error {
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path+".new", data, 0o644)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	return nil
}

// find returns a figure.
func (r Report) find(scenario, subject, metric string) (Result, bool) {
	i := slices.IndexFunc(r.Results, func(x Result) bool {
		return x.Scenario == scenario && x.Subject == subject && x.Metric == metric
	})
	if i < 0 {
		return Result{}, false
	}
	return r.Results[i], true
}

func distinct(results []Result, of func(Result) string) []string {
	var names []string
	for _, r := range results {
		if name := of(r); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func (r Report) scenarios() []string {
	return distinct(r.Results, func(x Result) string { return x.Scenario })
}

// subjects of a scenario, the baseline first, in the order of measurement otherwise.
func (r Report) subjects(scenario string) []string {
	names := distinct(r.of(scenario), func(x Result) string { return x.Subject })
	order := append([]string{r.Baseline}, r.References...)
	rank := func(name string) int {
		if i := slices.Index(order, name); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortStableFunc(names, func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return len(a) - len(b) // dedup before dedup-exact
	})
	return names
}

func (r Report) of(scenario string) []Result {
	return slices.DeleteFunc(slices.Clone(r.Results), func(x Result) bool { return x.Scenario != scenario })
}
