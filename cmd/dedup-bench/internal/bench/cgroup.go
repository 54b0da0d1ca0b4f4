package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// charged is a control group in which this process reads: the kernel charges it with the pages that it brings into the
// page cache, whatever else the machine does meanwhile.
type charged struct {
	dir, before string // the new group, and where this process was
	field       string // of memory.stat
}

// newCharged moves this process into a control group of its own. nil where there is no memory controller for it.
func newCharged() (*charged, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find the control group: %w", err)
	}
	name := fmt.Sprintf("dedup-bench-%d", os.Getpid())
	c := &charged{}
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) < 3:
		case parts[1] == "memory":
			c.before = filepath.Join("/sys/fs/cgroup/memory", parts[2])
			c.dir, c.field = filepath.Join(c.before, name), "cache"
		case parts[1] == "" && c.dir == "" && hasMemory("/sys/fs/cgroup/cgroup.subtree_control"):
			c.before = filepath.Join("/sys/fs/cgroup", parts[2])
			c.dir, c.field = filepath.Join("/sys/fs/cgroup", name), "file"
		}
	}
	if c.dir == "" {
		return nil, nil
	}
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a control group: %w", err)
	}
	if err := enter(c.dir); err != nil {
		return nil, errors.Join(err, os.Remove(c.dir))
	}
	return c, nil
}

func hasMemory(path string) bool {
	text, err := os.ReadFile(path)
	return err == nil && strings.Contains(string(text), "memory")
}

func enter(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	if err != nil {
		return fmt.Errorf("enter control group %s: %w", dir, err)
	}
	return nil
}

// bytes of the page cache that this process brought in since newCharged, and that are still there.
func (c *charged) bytes() (float64, error) {
	text, err := os.ReadFile(filepath.Join(c.dir, "memory.stat"))
	if err != nil {
		return 0, fmt.Errorf("read the control group's memory: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, c.field+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(rest), 64)
		}
	}
	return 0, fmt.Errorf("read the control group's memory: no %s in %s/memory.stat", c.field, c.dir)
}

// close moves this process back. Pages stay charged until they go, so the group may stay for a moment.
func (c *charged) close() error {
	if err := enter(c.before); err != nil {
		return err
	}
	if err := dropCaches("1"); err != nil {
		return err
	}
	return os.Remove(c.dir)
}
