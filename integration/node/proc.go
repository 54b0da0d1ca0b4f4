package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// process is one child whose output goes to a file.
type process struct {
	name string
	log  string // path
	cmd  *exec.Cmd
	done chan struct{}

	mu  sync.Mutex
	err error // guarded by mu; what Wait said
}

func startProcess(name, log string, env []string, bin string, args ...string) (*process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer f.Close()
	cmd := exec.Command(bin, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, f, f
	// Its own group: a Ctrl-C at the terminal is ours to turn into an orderly end.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, log: log, cmd: cmd, done: make(chan struct{})}
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// stop sends sig and waits; after grace it kills, and the error says what the process was doing.
func (p *process) stop(sig unix.Signal, grace time.Duration) error {
	if p.running() {
		_ = p.cmd.Process.Signal(sig)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	}
	h := &hung{name: p.name, sig: sig, grace: grace, log: p.logTail(30)}
	h.stack = p.stackAndKill()
	return h
}

// waitReady polls ready until it returns nil, the process ends, or ctx does.
func (p *process) waitReady(ctx context.Context, ready func(context.Context) error) error {
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			p.mu.Lock()
			defer p.mu.Unlock()
			return fmt.Errorf("%s ended before it was ready: %v\n%s", p.name, p.err, p.logTail(40))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w\n%s", p.name, err, p.logTail(40))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (p *process) logTail(lines int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	return "--- the end of " + p.name + "'s log ---\n" + tail(data, lines)
}

// CPUTime returns the CPU time that a process and its reaped children have used. /proc has it in ticks of 10 ms, which
// are a tenth of what an export takes: that of the process itself is asked of its clock, which counts nanoseconds.
func CPUTime(pid int) (time.Duration, error) {
	var own unix.Timespec
	if err := unix.ClockGettime(cpuClock(pid), &own); err != nil {
		return 0, fmt.Errorf("read CPU time of process %d: %w", pid, err)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	// The command name may hold spaces and parentheses; fields count from the last one.
	_, rest, ok := bytes.Cut(data[bytes.LastIndexByte(data, ')'):], []byte(") "))
	fields := strings.Fields(string(rest))
	if !ok || len(fields) < 15 {
		return 0, fmt.Errorf("read CPU time: unexpected /proc/%d/stat: %q", pid, data)
	}
	var ticks int64
	for _, f := range fields[13:15] { // cutime cstime, proc(5)
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		ticks += n
	}
	const ticksPerSecond = 100 // USER_HZ is 100 on every architecture Linux has today
	return time.Duration(own.Nano()) + time.Duration(ticks)*time.Second/ticksPerSecond, nil
}

// cpuClock is the clock of a process's CPU time, as clock_getcpuclockid(3) makes it: the kernel's CPUCLOCK_SCHED.
func cpuClock(pid int) int32 { return int32(^pid)<<3 | 2 }

// PeakMemory returns the largest resident set that a process has had, in bytes.
func PeakMemory(pid int) (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read peak memory: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kb int64
			if _, err := fmt.Sscan(rest, &kb); err != nil {
				return 0, fmt.Errorf("read peak memory: %w", err)
			}
			return kb << 10, nil
		}
	}
	return 0, errors.New("read peak memory: no VmHWM in /proc")
}

// processesBelow returns the pids of processes that name dir in their command line, or
// whose parent does: shims, and the containers' first processes.
func processesBelow(dir string) []int {
	parents, mine := map[int]int{}, map[int]bool{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 {
			parents[pid], _ = strconv.Atoi(fields[1])
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		argv0, _, _ := strings.Cut(string(cmdline), "\x00")
		if strings.Contains(filepath.Base(argv0), "containerd-shim") && strings.Contains(string(cmdline), dir+"/") {
			mine[pid] = true
		}
	}
	var pids []int
	for pid, parent := range parents {
		if mine[pid] || mine[parent] {
			pids = append(pids, pid)
		}
	}
	return pids
}
