package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

const (
	// heapGrowth is by how many percent the heap may grow between two collections. Half of Go's own takes 15 MB from the
	// peak of a pull, and no CPU time that could be measured: what large payloads take is not in the heap.
	heapGrowth = 50
	// smallHeap is what the heap may grow to in any case. Few megabytes are live while nothing is pulled: half of them is
	// a few calls' garbage, and to collect it took a quarter of the CPU time of an export.
	smallHeap = 32 << 20
	// leastLive is what is taken to be live at least: Go itself begins with a heap of 4 MiB times GOGC.
	leastLive = 4 << 20
)

// growthOf is by how many percent a heap may grow of which so many bytes are live.
func growthOf(live uint64) int {
	live = max(live, leastLive)
	if live >= smallHeap {
		return heapGrowth
	}
	return max(heapGrowth, int((smallHeap-live)*100/live))
}

// limitHeap has the garbage collector work harder before the heap becomes larger than what may be in use, and a
// quarter more, and less while it is small. What the environment says of the collector stays.
func limitHeap(most int64) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(most + most/4 + fixedMemory)
	}
	if os.Getenv("GOGC") == "" {
		followHeap()
	}
}

// collection is garbage: each collection of the heap finds one.
type collection struct{ _ [16]byte }

// followHeap sets after each collection how far the heap may grow until the next one, until stop.
func followHeap() (stop func()) {
	var stopped atomic.Bool
	percent := 0
	var follow func(*collection)
	follow = func(*collection) {
		if stopped.Load() {
			return
		}
		want := growthOf(liveHeap())
		off := max(want-percent, percent-want)
		if off > percent/8 || off > 0 && want == heapGrowth { // to set it stops the world
			percent = want
			debug.SetGCPercent(want)
		}
		runtime.SetFinalizer(new(collection), follow)
	}
	follow(nil)
	return func() { stopped.Store(true) }
}

// liveHeap is how much the last collection left.
func liveHeap() uint64 { return readMetric("/gc/heap/live:bytes") }

func readMetric(name string) uint64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}
