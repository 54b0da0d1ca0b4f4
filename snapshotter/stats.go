package snapshotter

import (
	"maps"
	"sync"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Answer is how a layer that somebody wanted was come by: at which door, whether the store had it already,
// and why.
type Answer struct {
	Door   string // "prepare", "apply" or "commit"
	Hit    bool
	Reason string
}

// Doors of Answer.
const (
	doorPrepare = "prepare"
	doorApply   = "apply"
	doorCommit  = "commit"
)

// Reasons of Answer.
const (
	// Prepare, hits: how the layer was found.
	reasonLabel = "label" // containerd named the diffID
	reasonImage = "image" // the image's config in the content store did
	reasonChain = "chain" // the diffID was worked out from the chainID
	reasonBlob  = "blob"  // by its blob in the content store, which is known

	// Prepare, misses.
	reasonUnknown  = "unknown"  // nobody has brought the layer in yet
	reasonAhead    = "ahead"    // brought in a moment ago, ahead of its turn, by this very pull
	reasonIngested = "ingested" // its blob lay in the content store, and was ingested there and then
	// its blob lies in the content store, but takes longer than Prepare may: Apply joins the ingest
	reasonLate      = "late"
	reasonBadBlob   = "bad_blob"  // its blob lay in the content store, and is of no use
	reasonUnnamed   = "unnamed"   // the client does not say which layer it is
	reasonUntrusted = "untrusted" // what it says does not fit together

	// Apply and Commit: what the ingest found out. reasonAhead is there too.
	reasonKnown = "known" // hit: the blob is known
	reasonSame  = "same"  // hit: read, and equal to a known layer
	reasonNew   = "new"   // miss
)

// answers are all that there are, so that each is counted from 0.
func answers() []Answer {
	return []Answer{
		{doorPrepare, true, reasonLabel}, {doorPrepare, true, reasonImage}, {doorPrepare, true, reasonChain},
		{doorPrepare, true, reasonBlob},
		{doorPrepare, false, reasonUnknown}, {doorPrepare, false, reasonAhead}, {doorPrepare, false, reasonIngested},
		{doorPrepare, false, reasonLate}, {doorPrepare, false, reasonBadBlob}, {doorPrepare, false, reasonUnnamed},
		{doorPrepare, false, reasonUntrusted},
		{doorApply, true, reasonKnown}, {doorApply, true, reasonSame}, {doorApply, false, reasonNew},
		{doorApply, false, reasonAhead},
		{doorCommit, true, reasonSame}, {doorCommit, false, reasonNew},
	}
}

// Stats count what a Snapshotter has done since New.
type Stats struct {
	Answers map[Answer]int64
	// Stats are those of the chain images.
	lower.Stats
	// RemoveErrors are directories, chain images and mounts that could not be removed.
	RemoveErrors int64
	// Checked is when the last Check came to its end, zero for none; Findings are what it found and did not mend, by
	// kind: every kind is there.
	Checked  time.Time
	Findings map[layer.FindingKind]int64
}

// counters are the Stats while they change.
type counters struct {
	mu sync.Mutex // guards s
	s  Stats
}

func newCounters() *counters {
	c := &counters{s: Stats{Answers: map[Answer]int64{}, Findings: noFindings()}}
	for _, a := range answers() {
		c.s.Answers[a] = 0
	}
	return c
}

func (c *counters) change(fn func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(&c.s)
}

func (c *counters) answer(door string, hit bool, reason string) {
	c.change(func(s *Stats) { s.Answers[Answer{door, hit, reason}]++ })
}

// Stats returns the counts at this moment.
func (rep *reports) Stats() (out Stats) {
	rep.counters.change(func(have *Stats) {
		out = *have
		out.Answers, out.Findings = maps.Clone(have.Answers), maps.Clone(have.Findings)
	})
	out.Stats = rep.chains.Stats()
	return out
}

func (c *counters) removeError() { c.change(func(s *Stats) { s.RemoveErrors++ }) }

func noFindings() map[layer.FindingKind]int64 {
	none := map[layer.FindingKind]int64{}
	for _, k := range []layer.FindingKind{
		layer.DamagedObject, layer.DamagedTree, layer.Orphan, DamagedChain, DamagedMetadata, PendingSnapshot,
		StrayDirectory, StrayChain, StrayMount, StrayLoop,
	} {
		none[k] = 0
	}
	return none
}

func (c *counters) checked(found []Finding) {
	left := noFindings()
	for _, f := range found {
		if !f.Fixed {
			left[f.Kind]++
		}
	}
	c.change(func(s *Stats) { s.Checked, s.Findings = time.Now(), left })
}

// countIngest counts a layer that came in by Apply or Commit.
func (s *store) countIngest(door string, in layer.Ingested) {
	switch {
	case s.layers.TakeAhead(in.Layer):
		s.counters.answer(door, false, reasonAhead)
	case in.Outcome == layer.New:
		s.counters.answer(door, false, reasonNew)
	case in.Outcome == layer.Same:
		s.counters.answer(door, true, reasonSame)
	default:
		s.counters.answer(door, true, reasonKnown)
	}
}
