// Command dashboard draws a Grafana dashboard without Grafana: it reads what was scraped of a daemon into Prometheus's
// own database, evaluates each panel's queries with Prometheus's own engine, and draws the panels in their places as
// one SVG. It fails if a query returned nothing.
//
// It knows the panel types, units and variables that deploy/grafana-dashboard.json uses, and refuses others. It has a
// module of its own, so that the database is no dependency of the snapshotter.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
)

func main() {
	board := flag.String("board", "", "the dashboard's JSON")
	scrapes := flag.String("scrapes", "", "directory of scrapes: MILLISECONDS.prom, by the time of each")
	out := flag.String("out", "", "the SVG to write")
	flag.Parse()
	if err := run(context.Background(), *board, *scrapes, *out); err != nil {
		fmt.Fprintln(os.Stderr, "dashboard:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, board, scrapes, out string) (err error) {
	text, err := os.ReadFile(board)
	if err != nil {
		return fmt.Errorf("read the dashboard: %w", err)
	}
	b, err := parse(text)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dashboard-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r, err := load(ctx, dir, scrapes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.db.Close()) }()
	svg, empty, err := b.draw(ctx, r)
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, svg, 0o644); err != nil {
		return err
	}
	for _, e := range empty {
		err = errors.Join(err, fmt.Errorf("panel %q: no data: %s", e.panel, e.expr))
	}
	return err
}
