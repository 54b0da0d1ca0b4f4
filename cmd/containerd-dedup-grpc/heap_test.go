package main

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestGrowthOf(t *testing.T) {
	for _, row := range []struct {
		live uint64
		want int
	}{
		{0, 700}, {leastLive, 700}, {8 << 20, 300}, {16 << 20, 100}, {24 << 20, heapGrowth},
		{smallHeap, heapGrowth}, {1 << 40, heapGrowth},
	} {
		if got := growthOf(row.live); got != row.want {
			t.Errorf("%d live bytes: %d percent, want %d", row.live, got, row.want)
		}
	}
}

var heapSink []byte

func TestHeapIsFollowed(t *testing.T) {
	before := debug.SetGCPercent(heapGrowth)
	defer debug.SetGCPercent(before)
	stop := followHeap()
	defer stop()
	percent := func(want func(uint64) bool) (got uint64) {
		for range 500 {
			runtime.GC()
			if got = readMetric("/gc/gogc:percent"); want(got) {
				break
			}
			time.Sleep(10 * time.Millisecond) // what each collection calls runs beside us
		}
		return got
	}
	if got := percent(func(p uint64) bool { return p > 4*heapGrowth }); got <= 4*heapGrowth {
		t.Errorf("a heap with little in it may grow by %d percent", got)
	}
	var count debug.GCStats
	debug.ReadGCStats(&count)
	first := count.NumGC
	for range 16 << 4 { // 16 MiB of garbage
		heapSink = make([]byte, 64<<10)
	}
	if debug.ReadGCStats(&count); count.NumGC > first+1 {
		t.Errorf("%d collections for 16 MiB of garbage", count.NumGC-first)
	}
	large := make([]byte, 2*smallHeap)
	if got := percent(func(p uint64) bool { return p == heapGrowth }); got != heapGrowth {
		t.Errorf("a heap with much in it may grow by %d percent", got)
	}
	runtime.KeepAlive(large)
}
