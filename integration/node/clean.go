package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const dirPattern = "dedup-node-"

const immutable = 0x10 // FS_IMMUTABLE_FL, linux/fs.h

// newDir makes a node's directory below parent, and removes those that dead processes
// left there: a test binary that ran into its time limit cleans nothing up.
func newDir(parent string) (string, error) {
	Sweep(parent)
	dir, err := os.MkdirTemp(parent, dirPattern)
	if err != nil {
		return "", fmt.Errorf("make a node directory: %w", err)
	}
	owner := fmt.Sprintf("%d %s", os.Getpid(), startTime(os.Getpid()))
	if err := os.WriteFile(filepath.Join(dir, "owner"), []byte(owner), 0o644); err != nil {
		return "", fmt.Errorf("make a node directory: %w", err)
	}
	return dir, nil
}

// Sweep removes the nodes below parent whose owners are dead, processes and mounts
// included.
func Sweep(parent string) {
	old, _ := filepath.Glob(filepath.Join(parent, dirPattern+"*"))
	for _, dir := range old {
		if ownerDead(dir) {
			_ = destroy(dir)
		}
	}
}

// ownerDead is false where it cannot tell.
func ownerDead(dir string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "owner"))
	if err != nil {
		return false
	}
	pid, since, ok := strings.Cut(string(data), " ")
	n, err := strconv.Atoi(pid)
	return ok && err == nil && startTime(n) != since
}

// startTime tells two processes with the same pid apart; "" when there is none.
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// destroy ends what runs in a node's directory, unmounts all below it and removes it.
func destroy(dir string) error {
	for _, name := range []string{"containerd.pid", "dedup.pid"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		pid, since, _ := strings.Cut(string(data), " ")
		if n, err := strconv.Atoi(pid); err == nil && since != "" && startTime(n) == since {
			_ = unix.Kill(n, unix.SIGKILL)
		}
	}
	for range 100 {
		pids := processesBelow(dir)
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	removeTraces(dir)
	// Nothing is removed through a mount that would not go.
	if err := UnmountBelow(dir); err != nil {
		return err
	}
	if err := removeAll(dir); err != nil {
		return fmt.Errorf("remove node: %w", err)
	}
	return nil
}

// removeTraces removes what killed shims left outside of the node's directory: their
// sockets, which have a fixed place, and the cgroups of their containers.
func removeTraces(dir string) {
	tasks, _ := filepath.Glob(filepath.Join(dir, "s/io.containerd.runtime.v2.task/*/*"))
	for _, task := range tasks {
		text, err := os.ReadFile(filepath.Join(task, "bootstrap.json"))
		if err != nil {
			text, _ = os.ReadFile(filepath.Join(task, "address")) // before containerd 2.0
		}
		if socket := shimSocket.Find(text); socket != nil {
			_ = os.Remove(string(socket))
		}
		id, namespace := filepath.Base(task), filepath.Base(filepath.Dir(task))
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			groups, _ := filepath.Glob(filepath.Join(root, namespace, id))
			for _, group := range groups {
				_ = os.Remove(group) // a cgroup goes by rmdir, and only when it is empty
			}
		}
	}
}

var shimSocket = regexp.MustCompile(`/run/containerd/s/[0-9a-f]{64}`)

// UnmountBelow lazily unmounts everything at or below dir, last mounted first.
func UnmountBelow(dir string) error {
	var errs []error
	for range 10 { // mounts may be stacked on one point
		points, err := mountsBelow(dir)
		if err != nil {
			return err
		}
		if len(points) == 0 {
			return nil
		}
		errs = nil
		for i := len(points) - 1; i >= 0; i-- {
			if err := unix.Unmount(points[i], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", points[i], err))
			}
		}
	}
	return errors.Join(errs...)
}

// mountsBelow lists mount points at or below dir in the order they were mounted.
func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape.Replace(fields[4])
		if point == dir || strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	return points, nil
}

// removeAll is os.RemoveAll that first clears the immutable flag where a snapshotter
// set it (containerd's erofs can), since nothing removes such a file.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return nil
		}
		defer f.Close()
		if flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil && flags&immutable != 0 {
			_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^immutable)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
