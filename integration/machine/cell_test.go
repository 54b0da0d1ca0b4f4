package machine

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// What runs in a cell sees no process, network or cgroup of this machine, its writes below /etc stay there, and it ends
// with its context, children included.
func TestCell(t *testing.T) {
	var out bytes.Buffer
	run := func(ctx context.Context, script string) error {
		out.Reset()
		return Cell(ctx, t.TempDir(), &out, os.Environ(), "bash", "-euc", script)
	}
	err := run(t.Context(), "echo x > /etc/dedup-cell; ls /proc/ | grep -c '^[0-9]'; grep -c : /proc/net/dev; "+
		"cut -d: -f3 /proc/self/cgroup | sort -u; ls /run; (sleep 0.01 & ) ; sleep 0.1; ps ax | grep -c [d]efunct || true")
	if errors.Is(err, node.ErrMissing) {
		t.Skip(err)
	}
	// A shell as process 1, bash and three of the pipe; the loopback device; nothing in /run; nothing dead is left.
	if got := out.String(); err != nil || !strings.HasSuffix(got, "\n1\n/\n0\n") {
		t.Errorf("%v: %q", err, got)
	}
	if _, err := os.Stat("/etc/dedup-cell"); !os.IsNotExist(err) {
		t.Errorf("a cell wrote to this machine's /etc: %v", err)
	}
	if err := run(t.Context(), "exit 7"); err == nil || !strings.Contains(err.Error(), "7") {
		t.Errorf("a command that fails: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := run(ctx, "setsid sleep 1000 & sleep 1000"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command past its time: %v", err)
	}
}
