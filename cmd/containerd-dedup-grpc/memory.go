package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

const (
	// leastMemory is the smallest max_memory.
	leastMemory = 64 << 20
	// fixedMemory is about what the daemon takes beside max_memory: payloads on their way to the disk, chunks of
	// tars, metadata.db.
	fixedMemory = 128 << 20
)

// memory reads max_memory.
func (c Config) memory() (int64, error) {
	if c.MaxMemory == "auto" {
		return autoMemory(machineMemory(), cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup")), nil
	}
	n, err := units.RAMInBytes(c.MaxMemory)
	if err != nil || n < leastMemory {
		return 0, fmt.Errorf("max_memory = %q: want \"auto\", or an amount of at least %s such as \"2GiB\"",
			c.MaxMemory, units.BytesSize(leastMemory))
	}
	return n, nil
}

// autoMemory is a quarter of the machine, from 1 to 4 GiB, but no more than half of what the unit's cgroup may have.
func autoMemory(machine, cgroup int64) int64 {
	n := min(max(machine/4, 1<<30), 4<<30)
	return max(min(n, cgroup/2), leastMemory)
}

func machineMemory() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// cgroupMemory is the smallest of memory.high and memory.max on the way up from the process's cgroup (v2), or a
// number that is larger than any.
func cgroupMemory(self, root string) int64 {
	least := int64(math.MaxInt64)
	text, err := os.ReadFile(self)
	if err != nil {
		return least
	}
	for line := range strings.Lines(string(text)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for ; len(path) > 1; path = filepath.Dir(path) {
			for _, name := range []string{"memory.high", "memory.max"} {
				value, err := os.ReadFile(filepath.Join(root, path, name))
				if err != nil {
					continue
				}
				if n, err := strconv.ParseInt(strings.TrimSpace(string(value)), 10, 64); err == nil { // else "max"
					least = min(least, n)
				}
			}
		}
	}
	return least
}
