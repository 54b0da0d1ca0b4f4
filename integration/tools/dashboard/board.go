package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
)

// board is what of a dashboard's JSON is drawn.
type board struct {
	Title  string
	Panels []panel
}

// panel is a row's head, a single figure or a plot over time.
type panel struct {
	Type    string
	Title   string
	GridPos struct{ X, Y, W, H float64 }
	Targets []struct{ Expr, LegendFormat string }

	FieldConfig struct {
		Defaults struct {
			Unit       string
			Thresholds struct {
				Steps []struct {
					Color string
					Value *float64
				}
			}
		}
	}
	Options struct{ ColorMode string }
}

// series is one line of a panel.
type series struct {
	name   string
	points []promql.FPoint
}

func (s series) last() float64 { return s.points[len(s.points)-1].F }

// parse reads a dashboard and refuses what draw cannot draw.
func parse(data []byte) (board, error) {
	var b board
	if err := json.Unmarshal(data, &b); err != nil {
		return b, fmt.Errorf("read the dashboard: %w", err)
	}
	for _, p := range b.Panels {
		if !slices.Contains([]string{"row", "stat", "timeseries"}, p.Type) {
			return b, fmt.Errorf("panel %q: type %q is not known here", p.Title, p.Type)
		}
		if _, err := format(p.FieldConfig.Defaults.Unit, 0); err != nil {
			return b, fmt.Errorf("panel %q: %w", p.Title, err)
		}
	}
	return b, nil
}

// empty is a query that returned nothing.
type empty struct{ panel, expr string }

// evaluated is a panel with its lines.
type evaluated struct {
	panel
	lines []series
}

// evaluate runs all queries over what was recorded.
func (b board) evaluate(ctx context.Context, r *record) (list []evaluated, nothing []empty, err error) {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 50e6, Timeout: time.Minute, LookbackDelta: 5 * time.Minute,
		Parser: parser.NewParser(parser.Options{})})
	whole := fmt.Sprintf("%ds", int(math.Ceil(r.end.Sub(r.start).Seconds())))
	rate := fmt.Sprintf("%ds", int((4 * r.interval).Seconds())) // Grafana's rule: four scrapes
	variables := strings.NewReplacer("$__rate_interval", rate, "$__range", whole, "$instance", ".*")
	for _, p := range b.Panels {
		e := evaluated{panel: p}
		for _, t := range p.Targets {
			q, err := engine.NewRangeQuery(ctx, r.db, nil, variables.Replace(t.Expr), r.start.Add(4*r.interval), r.end,
				r.interval)
			if err != nil {
				return nil, nil, fmt.Errorf("panel %q: %w", p.Title, err)
			}
			result := q.Exec(ctx)
			matrix, err := result.Matrix()
			if err != nil {
				return nil, nil, fmt.Errorf("panel %q: %w", p.Title, err)
			}
			before := len(e.lines)
			for _, s := range matrix {
				points := slices.DeleteFunc(slices.Clone(s.Floats), func(p promql.FPoint) bool {
					return math.IsNaN(p.F) || math.IsInf(p.F, 0)
				})
				if len(points) > 0 {
					e.lines = append(e.lines, series{legend(t.LegendFormat, s.Metric), points})
				}
			}
			if len(e.lines) == before {
				nothing = append(nothing, empty{p.Title, t.Expr})
			}
			q.Close()
		}
		list = append(list, e)
	}
	return list, nothing, nil
}

// legend fills in the labels of a series.
func legend(text string, l labels.Labels) string {
	l.Range(func(label labels.Label) {
		text = strings.ReplaceAll(text, "{{"+label.Name+"}}", label.Value)
	})
	return text
}

// format is a figure in one of Grafana's units.
func format(unit string, v float64) (string, error) {
	scaled := func(v, step float64, names ...string) string {
		i := 0
		for ; math.Abs(v) >= step && i < len(names)-1; i++ {
			v /= step
		}
		return strings.TrimSpace(digits(v) + " " + names[i])
	}
	switch unit {
	case "", "none":
		return digits(v), nil
	case "short":
		return scaled(v, 1000, "", "K", "Mil", "Bil"), nil
	case "bytes":
		return scaled(v, 1024, "B", "KiB", "MiB", "GiB", "TiB"), nil
	case "Bps":
		return scaled(v, 1000, "B/s", "kB/s", "MB/s", "GB/s"), nil
	case "percentunit":
		return digits(100*v) + "%", nil
	case "s":
		switch a := math.Abs(v); {
		case a == 0:
			return "0 s", nil
		case a < 1e-3:
			return digits(v*1e6) + " µs", nil
		case a < 1:
			return digits(v*1e3) + " ms", nil
		}
		return digits(v) + " s", nil
	}
	return "", fmt.Errorf("unit %q is not known here", unit)
}

// digits has three significant ones.
func digits(v float64) string {
	a := math.Abs(v)
	decimals := 0
	switch {
	case a == math.Trunc(a):
	case a < 0.1:
		decimals = 4
	case a < 10:
		decimals = 2
	case a < 100:
		decimals = 1
	}
	return fmt.Sprintf("%.*f", decimals, v)
}
