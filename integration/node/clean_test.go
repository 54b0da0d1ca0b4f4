package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A node whose owner died is swept away by the next one, mounts included; one whose
// owner lives is left alone.
func TestSweep(t *testing.T) {
	parent := t.TempDir()
	alive, err := newDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(parent, dirPattern+"dead")
	if err := os.MkdirAll(filepath.Join(dead, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	owner := fmt.Sprintf("%d 1", gone.Process.Pid)
	if err := os.WriteFile(filepath.Join(dead, "owner"), []byte(owner), 0o644); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		for range 2 { // stacked
			if err := unix.Mount("tmpfs", filepath.Join(dead, "mnt"), "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := newDir(parent); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead); !os.IsNotExist(err) {
		t.Errorf("the dead owner's node is still there: %v", err)
	}
	if _, err := os.Stat(alive); err != nil {
		t.Errorf("a living owner's node was removed: %v", err)
	}
}

// CPU time is what getrusage says, to less than a tick, and not another field of /proc/<pid>/stat.
func TestCPUTime(t *testing.T) {
	own := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	read := func() time.Duration {
		d, err := CPUTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	var got, want time.Duration
	for range 10 { // the runtime has work of its own beside
		from, before := own(), read()
		for own() < from+3*time.Millisecond {
		}
		got, want = read()-before, own()-from
		if off := got - want; off > -time.Millisecond && off < time.Millisecond {
			return
		}
	}
	t.Errorf("CPU time has grown by %s, by %s as getrusage has it", got, want)
}
