package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"github.com/prometheus/prometheus/tsdb"
)

// record is what was scraped of one daemon.
type record struct {
	db         *tsdb.DB
	start, end time.Time
	interval   time.Duration // between scrapes
}

// load reads scrapes into a database in dir.
func load(ctx context.Context, dir, scrapes string) (*record, error) {
	files, err := filepath.Glob(filepath.Join(scrapes, "*.prom"))
	if err != nil || len(files) < 10 {
		return nil, errors.Join(fmt.Errorf("%d scrapes in %s: too few", len(files), scrapes), err)
	}
	var times []int64
	for _, path := range files {
		at, err := strconv.ParseInt(strings.TrimSuffix(filepath.Base(path), ".prom"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("scrape %s: its name is no time: %w", path, err)
		}
		times = append(times, at)
	}
	slices.Sort(times)
	db, err := tsdb.Open(dir, nil, nil, tsdb.DefaultOptions(), nil)
	if err != nil {
		return nil, fmt.Errorf("open a database for metrics: %w", err)
	}
	r := &record{db: db, start: time.UnixMilli(times[0]), end: time.UnixMilli(times[len(times)-1])}
	r.interval = (r.end.Sub(r.start) / time.Duration(len(times)-1)).Round(time.Second)
	for _, at := range times {
		body, err := os.ReadFile(filepath.Join(scrapes, fmt.Sprintf("%d.prom", at)))
		if err == nil {
			err = r.add(ctx, body, at)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("scrape %d: %w", at, err), db.Close())
		}
	}
	return r, nil
}

// add stores one scrape, as Prometheus does.
func (r *record) add(ctx context.Context, body []byte, at int64) error {
	to := r.db.Appender(ctx)
	p := textparse.NewPromParser(append(bytes.TrimSpace(body), '\n'), labels.NewSymbolTable(), false)
	for {
		entry, err := p.Next()
		if errors.Is(err, io.EOF) {
			return to.Commit()
		}
		if err != nil {
			return errors.Join(err, to.Rollback())
		}
		if entry != textparse.EntrySeries {
			continue
		}
		var l labels.Labels
		p.Labels(&l)
		_, _, v := p.Series()
		// What Prometheus adds to each series of a target.
		l = labels.NewBuilder(l).Set("instance", "node-1:9741").Set("job", "dedup-snapshotter").Labels()
		if _, err := to.Append(0, l, at, v); err != nil {
			return errors.Join(err, to.Rollback())
		}
	}
}
