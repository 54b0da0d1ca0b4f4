package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
)

// spread is a figure over several runs.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Unit   string  `json:"unit"`
}

func spreadOf(unit string, values []float64) spread {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n == 0 {
		return spread{Unit: unit}
	}
	return spread{(sorted[(n-1)/2] + sorted[n/2]) / 2, sorted[0], sorted[n-1], unit}
}

// metric is one row: how it is read from a trial of two steps.
type metric struct {
	key, title, unit string
	of               func(trial) float64
}

// metrics are the rows of the demo. "first" is the first image on an empty node,
// "rebuild" the second: the same content, other times and owners, another registry.
var metrics = []metric{
	{"cold_pull", "first pull", "s", func(t trial) float64 { return t.Steps[0].Pull }},
	{"rebuild_pull", "pull of the rebuild", "s", func(t trial) float64 { return t.Steps[1].Pull }},
	{"cold_pull_flushed", "first pull, until all is on disk", "s", func(t trial) float64 { return t.Steps[0].Flushed }},
	{"rebuild_pull_flushed", "pull of the rebuild, until all is on disk", "s", func(t trial) float64 {
		return t.Steps[1].Flushed
	}},
	{"cold_cpu", "first pull, CPU", "s", func(t trial) float64 { return t.Steps[0].CPU }},
	{"rebuild_cpu", "pull of the rebuild, CPU", "s", func(t trial) float64 { return t.Steps[1].CPU }},
	{"cold_run", "first container run after the pull", "s", func(t trial) float64 { return t.Steps[0].Run }},
	{"rebuild_run", "container run after the rebuild", "s", func(t trial) float64 { return t.Steps[1].Run }},
	{"bytes", "disk for both", "MB", func(t trial) float64 { return float64(t.Steps[1].Used.Bytes) }},
	{"inodes", "inodes for both", "", func(t trial) float64 { return float64(t.Steps[1].Used.Inodes) }},
	{"cold_bytes", "disk for the first image", "MB", func(t trial) float64 { return float64(t.Steps[0].Used.Bytes) }},
	{"cold_inodes", "inodes for the first image", "", func(t trial) float64 { return float64(t.Steps[0].Used.Inodes) }},
	{"second_bytes", "disk added by the rebuild", "MB", func(t trial) float64 {
		return float64(t.Steps[1].Used.Sub(t.Steps[0].Used).Bytes)
	}},
	{"second_inodes", "inodes added by the rebuild", "", func(t trial) float64 {
		return float64(t.Steps[1].Used.Sub(t.Steps[0].Used).Inodes)
	}},
	{"peak_memory", "peak memory, containerd and daemon", "MB", func(t trial) float64 { return float64(t.PeakMemory) }},
}

// demoReport is what out/demo.json holds.
type demoReport struct {
	// Ratios are medians of dedup divided by those of overlayfs.
	Ratios   map[string]float64           `json:"ratios"`
	Subjects map[string]map[string]spread `json:"subjects"` // subject -> metric key; bytes in bytes
	Images   []imageFacts                 `json:"images"`
	Machine  map[string]string            `json:"machine"`
	Versions map[string]string            `json:"versions"`
	Runs     int                          `json:"runs"`
	Time     time.Time                    `json:"time"`
	Trials   []trial                      `json:"trials"`

	order []string // of subjects
}

type imageFacts struct {
	Name   string `json:"name"`
	Layers int    `json:"layers"`
	Blobs  int64  `json:"compressed_bytes"`
	Tars   int64  `json:"uncompressed_bytes"`
}

const baseline = "overlayfs"

// summarise turns trials into medians and ratios.
func summarise(order []string, trials []trial) demoReport {
	r := demoReport{Ratios: map[string]float64{}, Subjects: map[string]map[string]spread{}, Trials: trials,
		Time: time.Now().UTC(), order: order}
	for _, subject := range order {
		row := map[string]spread{}
		for _, m := range metrics {
			var values []float64
			for _, t := range trials {
				if t.Subject == subject {
					values = append(values, m.of(t))
				}
			}
			unit := m.unit
			if unit == "MB" {
				unit = "bytes"
			}
			row[m.key] = spreadOf(unit, values)
		}
		r.Subjects[subject] = row
	}
	for _, m := range metrics {
		if ratio, ok := r.ratio("dedup", m.key); ok {
			r.Ratios[m.key] = ratio
		}
	}
	return r
}

func (r demoReport) ratio(subject, key string) (float64, bool) {
	a, inA := r.Subjects[subject][key]
	b, inB := r.Subjects[baseline][key]
	if !inA || !inB || b.Median == 0 {
		return 0, false
	}
	return a.Median / b.Median, true
}

// table is the head and the rows of what is printed: medians, as cell writes them, and ratios.
func (r demoReport) table(cell func(metric, spread) string) (rows [][]string) {
	head := append([]string{""}, r.order...)
	for _, s := range r.order {
		if s != baseline {
			head = append(head, s+" / "+baseline)
		}
	}
	rows = append(rows, head)
	for _, m := range metrics {
		row := []string{m.title}
		for _, s := range r.order {
			row = append(row, cell(m, r.Subjects[s][m.key]))
		}
		for _, s := range r.order {
			if s == baseline {
				continue
			}
			text := "-"
			if ratio, ok := r.ratio(s, m.key); ok {
				text = fmt.Sprintf("%.*f", max(3, 1-int(math.Floor(math.Log10(max(ratio, 1e-6))))), ratio)
			}
			row = append(row, text)
		}
		rows = append(rows, row)
	}
	return rows
}

// print writes the table for a terminal.
func (r demoReport) print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range r.table(cell) {
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	return tw.Flush()
}

// caption says what was measured, and on what.
func (r demoReport) caption() string {
	return fmt.Sprintf("containerd %s, kernel %s, %s CPUs, all decompress with %s, medians of %d runs",
		r.Versions["containerd"], r.Machine["kernel"], r.Machine["cpus"], r.Versions["gunzip"], r.Runs)
}

// writeDocs writes the table into a Markdown file, between its marks.
func (r demoReport) writeDocs(path string) error {
	doc, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("write docs: %w", err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s,\ncommit %s, %s:\n\n", r.caption(), r.Versions["commit"], r.Time.Format(time.DateOnly))
	for i, row := range r.table(medianCell) {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString(strings.Repeat("| --- ", len(row)) + "|\n")
		}
	}
	doc, ok := report.Fill(doc, "demo", b.String())
	if !ok {
		return fmt.Errorf("write docs: %s has no line <!-- demo --> with its end", path)
	}
	if err := os.WriteFile(path, doc, 0o644); err != nil {
		return fmt.Errorf("write docs: %w", err)
	}
	return nil
}

// medianCell leaves minimum and maximum out.
func medianCell(m metric, s spread) string {
	if m.unit == "s" {
		return fmt.Sprintf("%.2f s", s.Median)
	}
	return cell(m, s)
}

func cell(m metric, s spread) string {
	switch m.unit {
	case "s":
		return fmt.Sprintf("%.2f s (%.2f-%.2f)", s.Median, s.Min, s.Max)
	case "MB":
		return fmt.Sprintf("%.1f MB", s.Median/1e6)
	default:
		return fmt.Sprintf("%.0f", s.Median)
	}
}

// write writes the report as JSON; the file is whole or absent.
func (r demoReport) write(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := os.WriteFile(path+".new", append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// machine describes what the figures were taken on.
func machine(dir string) map[string]string {
	m := map[string]string{"arch": runtime.GOARCH, "cpus": fmt.Sprint(runtime.NumCPU())}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m["kernel"] = unix.ByteSliceToString(uts.Release[:])
	}
	if model, ok := field("/proc/cpuinfo", "model name"); ok {
		m["cpu"] = model
	}
	if total, ok := field("/proc/meminfo", "MemTotal"); ok {
		m["memory"] = total
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil {
		m["file_system"] = fmt.Sprintf("%#x", st.Type)
		if name, ok := map[int64]string{0xef53: "ext4", 0x58465342: "xfs", 0x9123683e: "btrfs",
			0x01021994: "tmpfs"}[int64(st.Type)]; ok {
			m["file_system"] = name
		}
	}
	return m
}

func field(path, key string) (string, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", false
	}
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value), true
		}
	}
	return "", false
}
