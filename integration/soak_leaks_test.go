package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

// nothingLeft waits until an empty node looks like one.
func (s *soak) nothingLeft(t *testing.T) {
	t.Helper()
	var left []string
	eventually(t, "everything to be gone", func() bool {
		left = nil
		for _, pattern := range []string{"layers/*", "packs/*", "chains/*", "snapshots/*", "ingest/*", "probe-*"} {
			found, err := filepath.Glob(filepath.Join(s.n.DedupRoot(), pattern))
			must(t, err)
			left = append(left, found...)
		}
		left = append(left, s.mounted(t)...)
		left = append(left, s.loops(t)...)
		return len(left) == 0
	})
	if len(left) > 0 {
		t.Errorf("%d things are left, the first: %v", len(left), left[:min(10, len(left))])
	}
	if r := fsck(t, s.n, 0); len(r.Findings) > 0 {
		t.Errorf("fsck of an empty store: %+v", r.Findings)
	}
}

// mounted lists what is mounted below the node's directory, or shows it.
func (s *soak) mounted(t *testing.T) (found []string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, s.n.Dir()+"/") {
			found = append(found, line)
		}
	}
	return found
}

// loops lists loop devices over the node's files.
func (s *soak) loops(t *testing.T) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	must(t, err)
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(data), s.n.Dir()+"/") {
			found = append(found, file+" "+string(data))
		}
	}
	return found
}

// soakSample is what the daemon needs when its store is empty.
type soakSample struct {
	pid               int
	files, goroutines float64
	rss               float64
	target            float64 // of the heap at which it is collected next: twice what was in use the last time
	disk              rootfs.Used
}

func (s *soak) sample(t *testing.T) soakSample {
	t.Helper()
	// Who ingests ahead of Apply waits for ten seconds for more of the same image.
	time.Sleep(11 * time.Second)
	m := scrape(t, s.metrics)
	used, err := rootfs.Usage(s.n.DedupRoot())
	must(t, err)
	pids := s.n.Pids()
	return soakSample{
		pid:   pids[len(pids)-1],
		files: m.sum("process_open_fds"), goroutines: m.sum("go_goroutines"), rss: m.sum("process_resident_memory_bytes"),
		target: m.sum("go_memstats_next_gc_bytes"), disk: used,
	}
}

func (s soakSample) String() string {
	return fmt.Sprintf("%.0f open files, %.0f goroutines, %.0f MB of memory, %.1f MB of heap before the next "+
		"collection, %d KB and %d inodes on the disk",
		s.files, s.goroutines, s.rss/(1<<20), s.target/(1<<20), s.disk.Bytes>>10, s.disk.Inodes)
}

// noGrowth compares the last rounds with the first: the daemon is the same, and the store was empty each time.
func (s *soak) noGrowth(t *testing.T) {
	t.Helper()
	first, last := s.samples[0], s.samples[len(s.samples)-1]
	for i, at := range s.samples {
		t.Logf("calm round %d: %v", i, at)
	}
	if first.pid != last.pid {
		t.Fatalf("the daemon changed from %d to %d", first.pid, last.pid)
	}
	third := max(1, len(s.samples)/3)
	early, late := s.samples[:third], s.samples[len(s.samples)-third:]
	for _, row := range []struct {
		what  string
		of    func(soakSample) float64
		slack float64 // what comes and goes
	}{
		{"open files", func(s soakSample) float64 { return s.files }, 3},
		{"goroutines", func(s soakSample) float64 { return s.goroutines }, 4},
		{"bytes of memory", func(s soakSample) float64 { return s.rss }, 64 << 20},
		{"bytes of heap", func(s soakSample) float64 { return s.target }, 8 << 20},
		// metadata.db, directories
		{"bytes on the disk", func(s soakSample) float64 { return float64(s.disk.Bytes) }, 1 << 20},
		{"inodes on the disk", func(s soakSample) float64 { return float64(s.disk.Inodes) }, 0},
	} {
		before, after := smallest(early, row.of), smallest(late, row.of)
		if after > before+row.slack {
			t.Errorf("%s grew from %.0f to %.0f", row.what, before, after)
		}
	}
}

func smallest(samples []soakSample, of func(soakSample) float64) float64 {
	var all []float64
	for _, s := range samples {
		all = append(all, of(s))
	}
	return slices.Min(all)
}
