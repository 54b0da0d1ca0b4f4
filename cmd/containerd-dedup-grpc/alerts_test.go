package main

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
	"go.yaml.in/yaml/v3"
)

const (
	alertsFile    = "../../deploy/alerts.yaml"
	dashboardFile = "../../deploy/grafana-dashboard.json"
)

// checkAlerts reads the alert rules as Prometheus does: its own parser for the expressions, and no key that a rule
// does not have.
func checkAlerts(t *testing.T, names []string) {
	t.Helper()
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	d := yaml.NewDecoder(strings.NewReader(readFile(t, alertsFile)))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatalf("%s: %v", alertsFile, err)
	}
	about := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" ||
				r.Labels["severity"] == "" {
				t.Errorf("alert %q is not whole", r.Alert)
			}
			for _, name := range checkExpr(t, "alert "+r.Alert, r.Expr, names) {
				about[name] = true
			}
		}
	}
	for _, name := range []string{"dedup_root_free_bytes", "dedup_root_free_inodes", "dedup_damaged_layers",
		"dedup_gc_errors_total"} {
		if !about[name] {
			t.Errorf("no alert is about %s", name)
		}
	}
}

// checkDashboard does the same for every query of the dashboard, and sees to it that every metric has a place there.
func checkDashboard(t *testing.T, names []string) {
	t.Helper()
	var board struct {
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(readFile(t, dashboardFile)), &board); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	// What Grafana puts in for its variables.
	grafana := strings.NewReplacer("$__rate_interval", "5m", "$__range", "6h", "$instance", ".*")
	shown, ids := map[string]bool{}, map[int]bool{}
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			for _, name := range checkExpr(t, "panel "+p.Title, grafana.Replace(q.Expr), names) {
				shown[name] = true
			}
		}
	}
	for _, name := range names {
		if !shown[name] {
			t.Errorf("%s is in no panel of %s", name, dashboardFile)
		}
	}
}

// checkExpr parses a PromQL expression and returns the metrics that it reads. Those that are ours must be exposed.
func checkExpr(t *testing.T, where, text string, names []string) (used []string) {
	t.Helper()
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(text)
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return nil
	}
	parser.Inspect(expr, func(n parser.Node, _ []parser.Node) error {
		if v, ok := n.(*parser.VectorSelector); ok {
			used = append(used, strings.TrimSuffix(v.Name, "_bucket")) // of a histogram
		}
		return nil
	})
	standard := regexp.MustCompile(`^(process|go)_`)
	for _, name := range used {
		if !slices.Contains(names, name) && !standard.MatchString(name) {
			t.Errorf("%s reads %q, which no scrape has", where, name)
		}
	}
	if len(used) == 0 {
		t.Errorf("%s reads nothing", where)
	}
	return used
}
