package machine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// hierarchy is a mounted cgroup file system of this machine.
type hierarchy struct {
	point      string
	v2         bool
	controller string // of version 1: "cpu,cpuacct" or "name=systemd"
}

func hierarchies() (list []hierarchy, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		before, after, _ := strings.Cut(line, " - ")
		fs, point := strings.Fields(after), strings.Fields(before)[4]
		switch {
		case len(fs) < 3:
		case fs[0] == "cgroup2":
			list = append(list, hierarchy{point: point, v2: true})
		case fs[0] == "cgroup":
			options := strings.Split(fs[2], ",")
			named := slices.IndexFunc(options, func(o string) bool { return strings.HasPrefix(o, "name=") })
			if named >= 0 {
				options = options[named : named+1]
			}
			options = slices.DeleteFunc(options, func(o string) bool { return o == "rw" || o == "ro" || o == "xattr" })
			list = append(list, hierarchy{point: point, controller: strings.Join(options, ",")})
		}
	}
	return list, nil
}

// makeGroups gives the machine a cgroup in the hierarchies that it shall see, and returns their directories and what
// boot.sh mounts: "2" for the second version alone, where that has the cpu controller, else the controllers of the
// first.
func makeGroups() (groups, mounts []string, err error) {
	all, err := hierarchies()
	if err != nil {
		return nil, nil, err
	}
	removeStale(all)
	name := fmt.Sprintf("%s%d-%s", groupPrefix, os.Getpid(), node.NewID("m"))
	for _, h := range all {
		controllers, _ := os.ReadFile(filepath.Join(h.point, "cgroup.subtree_control"))
		if h.v2 && slices.Contains(strings.Fields(string(controllers)), "cpu") {
			dir := filepath.Join(h.point, name)
			if err := os.Mkdir(dir, 0o755); err != nil {
				return nil, nil, fmt.Errorf("%w: a writable cgroup hierarchy: %w", node.ErrMissing, err)
			}
			return []string{dir}, []string{"2"}, nil
		}
	}
	for _, h := range all {
		if h.v2 {
			continue
		}
		dir := filepath.Join(h.point, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return groups, nil, fmt.Errorf("%w: a writable cgroup hierarchy: %w", node.ErrMissing, err)
		}
		groups, mounts = append(groups, dir), append(mounts, h.controller)
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // a new group may use none
			if have, err := os.ReadFile(filepath.Join(h.point, file)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, file), have, 0o644); err != nil {
					return groups, nil, fmt.Errorf("make cgroup: %w", err)
				}
			}
		}
	}
	if !slices.ContainsFunc(mounts, func(c string) bool {
		return strings.Contains(c, "cpu")
	}) || !slices.Contains(mounts, "name=systemd") {
		return groups, nil, fmt.Errorf("%w: a cgroup hierarchy with the cpu controller, and one for systemd", node.ErrMissing)
	}
	return groups, mounts, nil
}

// groupPrefix is followed by the pid of the process whose machine it is.
const groupPrefix = "dedup-machine-"

// removeStale removes the groups of processes that died before they could.
func removeStale(all []hierarchy) {
	for _, h := range all {
		groups, _ := filepath.Glob(filepath.Join(h.point, groupPrefix+"*"))
		for _, g := range groups {
			pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(g), groupPrefix), "-")
			if _, err := os.Stat("/proc/" + pid); os.IsNotExist(err) {
				_ = removeGroup(g)
			}
		}
	}
}

// removeGroups removes groups and what systemd made in them. Processes of a dead namespace leave theirs a moment later.
func removeGroups(groups []string) error {
	var err error
	for range 100 {
		err = nil
		for _, g := range groups {
			err = errors.Join(err, removeGroup(g))
		}
		if err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroups: %w", err)
}

func removeGroup(dir string) error {
	subs, err := filepath.Glob(filepath.Join(dir, "*/cgroup.procs"))
	if err != nil {
		return err
	}
	for _, sub := range subs {
		if err := removeGroup(filepath.Dir(sub)); err != nil {
			return err
		}
	}
	if err := os.Remove(dir); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
