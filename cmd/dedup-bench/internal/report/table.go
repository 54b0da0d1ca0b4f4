package report

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// Print writes the tables for a terminal.
func (r Report) Print(w io.Writer) error {
	for _, scenario := range r.scenarios() {
		fmt.Fprintf(w, "\n%s: %s\n", scenario, Describe(scenario))
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		for _, row := range r.rows(scenario) {
			fmt.Fprintln(tw, strings.Join(row, "\t"))
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	if list := r.targets(); len(list) > 0 {
		fmt.Fprintln(w, "\nagainst the targets:")
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		for _, t := range list {
			fmt.Fprintf(tw, "%s\t%s / %s\t%.3f\t(%s)\twant <= %.3g\t%s\n", t.title(), t.subject, t.reference, t.ratio,
				t.ranged(), t.want, t.verdict())
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.About.Skipped)) {
		fmt.Fprintf(w, "\n%s was skipped: %s\n", name, r.About.Skipped[name])
	}
	fmt.Fprintf(w, "\n%s\n", r.Caption())
	return nil
}

// rows is a head, and one row for each metric of a scenario.
func (r Report) rows(scenario string) [][]string {
	subjects := r.subjects(scenario)
	divisors := slices.DeleteFunc(append([]string{r.Baseline}, r.References...), func(name string) bool {
		return !slices.Contains(subjects, name)
	})
	head := append([]string{""}, subjects...)
	type pair struct{ subject, by string }
	var pairs []pair
	for _, by := range divisors {
		for _, s := range subjects {
			if strings.HasPrefix(s, "dedup") || by == r.Baseline && s != by {
				pairs = append(pairs, pair{s, by})
				head = append(head, s+"/"+by)
			}
		}
	}
	rows := [][]string{head}
	for _, metric := range distinct(r.of(scenario), func(x Result) string { return x.Metric }) {
		row := []string{metric}
		for _, s := range subjects {
			cell := "-"
			if x, ok := r.find(scenario, s, metric); ok {
				cell = Format(x)
			}
			row = append(row, cell)
		}
		for _, p := range pairs {
			row = append(row, r.ratio(scenario, metric, p.subject, p.by))
		}
		rows = append(rows, row)
	}
	return rows
}

func (r Report) ratio(scenario, metric, subject, by string) string {
	a, inA := r.find(scenario, subject, metric)
	b, inB := r.find(scenario, by, metric)
	if !inA || !inB || b.Median <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.3f", a.Median/b.Median)
}

// Markdown is all tables, with the plots that lie in the directory plots, if it is not "".
func (r Report) Markdown(plots string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", strings.Join(wrap(r.Caption(), 118), "\n"))
	if list := r.targets(); len(list) > 0 {
		b.WriteString("\n### Against the targets\n\n")
		if plots != "" {
			fmt.Fprintf(&b, "![ratios](%s/ratios.svg)\n\n", plots)
		}
		b.WriteString("| | divided | ratio (min-max) | target | |\n| --- | --- | --- | --- | --- |\n")
		for _, t := range list {
			fmt.Fprintf(&b, "| %s | %s / %s | %.3f (%s) | %.3g | %s |\n", t.title(), t.subject, t.reference, t.ratio, t.ranged(),
				t.want, t.verdict())
		}
	}
	for _, scenario := range r.scenarios() {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", scenario, sentence(Describe(scenario)))
		if plots != "" {
			fmt.Fprintf(&b, "![%s](%s/%s.svg)\n\n", scenario, plots, scenario)
		}
		for i, row := range r.rows(scenario) {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
			if i == 0 {
				b.WriteString("|" + strings.Repeat(" --- |", len(row)) + "\n")
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.About.Skipped)) {
		fmt.Fprintf(&b, "\n%s was skipped: %s\n", name, r.About.Skipped[name])
	}
	return b.String()
}

func sentence(s string) string { return strings.ToUpper(s[:1]) + s[1:] + "." }

// Caption names machine, versions and settings in one line.
func (r Report) Caption() string {
	m, v, s := r.About.Machine, r.About.Versions, r.About.Settings
	var parts []string
	add := func(format string, values ...string) {
		args := make([]any, len(values))
		for i, value := range values {
			if value == "" {
				return
			}
			args[i] = value
		}
		parts = append(parts, fmt.Sprintf(format, args...))
	}
	add("%s × %s", m["cpus"], m["cpu"])
	add("%s memory", m["memory"])
	add("Linux %s", m["kernel"])
	add("containerd %s", v["containerd"])
	add("mkfs.erofs %s", v["mkfs.erofs"])
	add("commit %s", v["commit"])
	add("gunzip with %s", v["gunzip"])
	add("scale %s", s["scale"])
	add("%s unpacks at once", s["unpacks"])
	add("images %s", s["images"])
	if s["runs"] == "1" {
		add("%s run", s["runs"])
	} else {
		add("medians of %s runs (min–max)", s["runs"])
	}
	if !r.About.Time.IsZero() {
		add("%s", r.About.Time.Format("2006-01-02"))
	}
	return strings.Join(parts, ", ")
}

// Format is a figure as a person reads it, with its range.
func Format(x Result) string {
	scale, unit := scaleOf(x.Unit, x.Max)
	text := number(x.Median / scale)
	if x.Min != x.Max {
		text += fmt.Sprintf(" (%s–%s)", number(x.Min/scale), number(x.Max/scale))
	}
	return strings.TrimSpace(text + " " + unit)
}

// scaleOf returns a divisor and the name of the unit for figures up to largest.
func scaleOf(unit string, largest float64) (float64, string) {
	switch {
	case unit == "bytes" && largest >= 1e9:
		return 1e9, "GB"
	case unit == "bytes" && largest >= 1e5:
		return 1e6, "MB"
	case unit == "bytes":
		return 1e3, "kB"
	case unit == "s" && largest < 1e-3:
		return 1e-6, "µs"
	case unit == "s" && largest < 1:
		return 1e-3, "ms"
	case unit == "inodes" || unit == "":
		return 1, ""
	}
	return 1, unit
}

// number has three significant digits, and no exponent.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95 || a == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
