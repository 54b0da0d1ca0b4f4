package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Options of a run. Scenarios, Subjects, Runs and Scale are required.
type Options struct {
	Scenarios []string // of Scenarios
	Subjects  []Subject
	Runs      int
	// Scale of the scenarios whose size is not that of real images: 1 is what a laptop
	// does in minutes, 50 the size that others have published.
	Scale  float64
	Images []string // references that a user wants measured; none: built in ones
	Tmp    string   // directory for disks and registries; "" is os.TempDir()
	// Version of containerd; "" is the harness's default.
	Version string
	Daemon  string // binary; "" is bin/containerd-dedup-grpc
	// Unpacks is containerd's max_concurrent_unpacks; 0 is its default.
	Unpacks int
	Igzip   bool // let all subjects decompress with igzip
	Say     func(string)
	// Keep is called after each group with all samples so far, so that an interrupted
	// run has results.
	Keep func([]report.Sample) error
}

// group is scenarios that share a trial.
type group struct {
	scenarios []string
	seconds   float64 // that a trial takes at scale 1, for the first estimate of the time left
	// prepare makes inputs and returns what every trial does; nil, "why" skips the group.
	prepare func(ctx context.Context, s *stage) (do func(context.Context, *Trial) error, skip string, err error)
}

func groups() []group { return append(mainGroups(), corporaGroups()...) }

func mainGroups() []group {
	return []group{
		{[]string{"cold", "rebuild", "known", "delete"}, 9, preparePulls},
		{[]string{"start", "read", "restart"}, 8, prepareUse},
		{[]string{"mapped"}, 8, prepareMapped},
		{[]string{"layers100"}, 6, prepareLayers},
		{[]string{"commit"}, 30, prepareCommit},
		{[]string{"build"}, 12, prepareBuild},
		{[]string{"fleet"}, 15, prepareFleet},
		{[]string{"python"}, 25, preparePython},
		{[]string{"memory"}, 6, prepareMemory},
		{[]string{"scale"}, 10, prepareScale},
	}
}

// Scenarios lists the names of the scenarios that "all" stands for, in the order of reports.
func Scenarios() []string {
	var names []string
	for _, g := range mainGroups() {
		names = append(names, g.scenarios...)
	}
	return names
}

// Outcome of a run.
type Outcome struct {
	Samples []report.Sample
	Skipped map[string]string // subject or scenario -> why it could not run here
}

// Run takes all subjects through all scenarios. What it returns beside an error holds what was
// measured before.
func Run(ctx context.Context, opts Options) (out Outcome, err error) {
	out.Skipped = map[string]string{}
	if opts.Tmp == "" {
		opts.Tmp = os.TempDir()
	}
	sweep(opts.Tmp)
	if err := node.Require(ctx, opts.Say, node.Runc); err != nil {
		return out, err
	}
	opts.Subjects = slices.DeleteFunc(slices.Clone(opts.Subjects), func(s Subject) bool {
		err := s.usable(ctx, opts.Daemon, opts.Say)
		if err != nil {
			out.Skipped[s.Name] = err.Error()
			opts.Say(fmt.Sprintf("subject %s cannot run here: %v", s.Name, err))
		}
		return err != nil
	})
	if len(opts.Subjects) == 0 {
		return out, errors.New("no subject can run here")
	}
	var chosen []group
	for _, g := range groups() {
		if slices.ContainsFunc(g.scenarios, func(name string) bool { return slices.Contains(opts.Scenarios, name) }) {
			chosen = append(chosen, g)
		}
	}
	e := newEstimate(chosen, opts)
	for _, g := range chosen {
		if err := runGroup(ctx, g, opts, &out, e); err != nil {
			return out, err
		}
		e.done()
		if opts.Keep != nil {
			if err := opts.Keep(out.Samples); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

func runGroup(ctx context.Context, g group, opts Options, out *Outcome, e *estimate) (err error) {
	names := slices.DeleteFunc(slices.Clone(g.scenarios), func(name string) bool {
		return !slices.Contains(opts.Scenarios, name)
	})
	title := strings.Join(names, ", ")
	s, err := newStage(opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	opts.Say("preparing " + title)
	do, skip, err := g.prepare(ctx, s)
	if err != nil {
		return fmt.Errorf("prepare %s: %w", title, err)
	}
	if skip != "" {
		for _, name := range names {
			out.Skipped[name] = skip
		}
		opts.Say(title + " skipped: " + skip)
		return nil
	}
	warm, err := s.warmImage(ctx)
	if err != nil {
		return fmt.Errorf("prepare %s: %w", title, err)
	}
	order := slices.Clone(opts.Subjects)
	for run := range opts.Runs {
		for _, subject := range order {
			start := time.Now()
			trial := func() ([]report.Sample, error) { return take(ctx, opts, subject, &warm, do) }
			if subject.Name == Limit {
				if s.limit == nil {
					continue
				}
				trial = func() ([]report.Sample, error) { return s.limit(ctx) }
			}
			samples, err := trial()
			if err != nil {
				return fmt.Errorf("%s, subject %s: %w", title, subject.Name, err)
			}
			out.Samples = append(out.Samples, samples...)
			left := e.took(time.Since(start))
			opts.Say(fmt.Sprintf("%s, run %d of %d, %s: %s (about %s left)", title, run+1, opts.Runs, subject.Name,
				brief(samples), left))
		}
		slices.Reverse(order) // so that a machine that gets slower or faster favours none
	}
	return nil
}

// brief is the first figure of each scenario.
func brief(samples []report.Sample) string {
	var parts, seen []string
	for _, s := range samples {
		if !slices.Contains(seen, s.Scenario) && s.Unit == "s" {
			seen = append(seen, s.Scenario)
			figure := report.Result{Unit: s.Unit, Median: s.Value, Min: s.Value, Max: s.Value}
			parts = append(parts, s.Scenario+" "+report.Format(figure))
		}
	}
	return strings.Join(parts, ", ")
}

// estimate tells how long a run still takes: what groups are expected to take, corrected by
// how far off that has been.
type estimate struct {
	groups          []group
	trials          int // of each group
	current, inside int // group, and trials of it that are done
	spent, expected float64
}

func newEstimate(groups []group, opts Options) *estimate {
	return &estimate{groups: groups, trials: opts.Runs * len(opts.Subjects)}
}

func (e *estimate) took(d time.Duration) time.Duration {
	e.inside++
	e.spent += d.Seconds()
	e.expected += e.groups[e.current].seconds
	left := e.groups[e.current].seconds * float64(e.trials-e.inside)
	for _, g := range e.groups[e.current+1:] {
		left += g.seconds * float64(e.trials)
	}
	return time.Duration(left * e.spent / e.expected * float64(time.Second)).Round(time.Second)
}

func (e *estimate) done() { e.current, e.inside = e.current+1, 0 }
