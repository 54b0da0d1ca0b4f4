package machine

import (
	"errors"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A machine boots with a file system, process ids and mounts of its own, and leaves nothing behind.
func TestBoot(t *testing.T) {
	m, err := Boot(t.Context(), Options{Dir: t.TempDir(), Say: func(s string) {
		t.Log(s)
	}, Files: map[string]string{"/etc/motd": "hello"}})
	if errors.Is(err, node.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := m.Run(t.Context(),
		"cat /proc/1/comm /etc/motd; echo; stat -fc %T /var/lib; systemctl is-active dbus || systemctl --failed; pwd")
	t.Log(out, err)
	if err != nil || !strings.HasPrefix(out, "systemd\nhello\next2/ext3\n") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := m.Run(t.Context(), "echo on; echo off >&2; false; echo never"); err == nil ||
		strings.Contains(err.Error(), "\nnever") || !strings.Contains(err.Error(), "off") {
		t.Errorf("a script that fails: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
