package main

import (
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestMaxMemory(t *testing.T) {
	for _, row := range []struct {
		text string
		want int64 // 0: an error
	}{
		{"1GiB", 1 << 30}, {"1g", 1 << 30}, {"700MB", 700 << 20}, {"64MiB", leastMemory}, {"67108864", leastMemory},
		{"63MiB", 0}, {"0", 0}, {"-1GiB", 0}, {"much", 0}, {"", 0}, {"25%", 0},
	} {
		got, err := Config{MaxMemory: row.text}.memory()
		if got != row.want || (err == nil) != (row.want > 0) {
			t.Errorf("%q: %d, %v", row.text, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), "max_memory = ") {
			t.Errorf("%q: %v", row.text, err)
		}
	}
	if got, err := defaultConfig().memory(); err != nil || got < leastMemory {
		t.Errorf("auto: %d, %v", got, err)
	}
}

func TestAutoMemory(t *testing.T) {
	const gib = 1 << 30
	for name, row := range map[string]struct{ machine, cgroup, want int64 }{
		"small":        {2 * gib, math.MaxInt64, gib},
		"middle":       {8 * gib, math.MaxInt64, 2 * gib},
		"large":        {512 * gib, math.MaxInt64, 4 * gib},
		"unknown":      {0, math.MaxInt64, gib},
		"in a unit":    {2 * gib, 800 << 20, 400 << 20},
		"tiny cgroup":  {8 * gib, 32 << 20, leastMemory},
		"large cgroup": {8 * gib, 6 * gib, 2 * gib},
	} {
		if got := autoMemory(row.machine, row.cgroup); got != row.want {
			t.Errorf("%s: %d, want %d", name, got, row.want)
		}
	}
}

func TestCgroupMemory(t *testing.T) {
	root := t.TempDir()
	self := filepath.Join(root, "self")
	write := func(path, text string) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(self, "1:name=systemd:/x\n0::/system.slice/dedup.service\n")
	if got := cgroupMemory(self, root); got != math.MaxInt64 {
		t.Errorf("without limits: %d", got)
	}
	write(filepath.Join(root, "system.slice/dedup.service/memory.high"), "max\n")
	write(filepath.Join(root, "system.slice/dedup.service/memory.max"), "2000\n")
	write(filepath.Join(root, "system.slice/memory.high"), "1000\n")
	if got := cgroupMemory(self, root); got != 1000 {
		t.Errorf("got %d", got)
	}
	if got := cgroupMemory(filepath.Join(root, "none"), root); got != math.MaxInt64 {
		t.Errorf("without cgroups: %d", got)
	}
}

// The unit bounds its memory, so that an out-of-memory of its own ends the daemon alone, which is started again.
// systemd must not stop it for a helper process (igzip) that was killed.
func TestUnitBoundsMemory(t *testing.T) {
	text := readFile(t, unitFile)
	for _, want := range []string{`MemoryHigh=\d+%`, `MemoryMax=\d+%`, "OOMPolicy=continue", "OOMScoreAdjust=-999",
		"Restart=always"} {
		if !regexp.MustCompile("(?m)^" + want + "$").MatchString(text) {
			t.Errorf("%s is missing", want)
		}
	}
}
