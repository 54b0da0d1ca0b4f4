package blobs

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// A blob counts as read when another process reads it, however short, and not when this one does.
func TestReaders(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("fanotify needs root")
	}
	root, ctx := t.TempDir(), t.Context()
	r := newReaders(func(context.Context) string { return root })
	defer r.close()
	if err := r.look(ctx); !errors.Is(err, errUnseen) {
		t.Errorf("without a directory of blobs: %v", err)
	}
	dir := filepath.Join(root, "blobs/sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(text string) (string, digest.Digest) {
		d := digest.FromString(text)
		path := filepath.Join(dir, d.Encoded())
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path, d
	}
	look := func() {
		t.Helper()
		if err := r.look(ctx); err != nil {
			t.Fatal(err)
		}
	}
	_, before := write("before")
	ago := time.Now()
	look()
	if at := r.last(before, ago); at != r.since {
		t.Errorf("what was there before counts as read at %v, not when the watch began", at)
	}
	path, d := write("blob")
	after := time.Now()
	if _, err := os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	look()
	if at := r.last(d, after); !at.IsZero() {
		t.Errorf("what this process reads counts as read at %v", at)
	}
	if err := exec.Command("cat", path).Run(); err != nil {
		t.Fatal(err)
	}
	look()
	if at := r.last(d, after); at.Before(after) {
		t.Errorf("read by another process: %v", at)
	}
	// Another directory in its place is not the one that was watched.
	if err := os.Rename(dir, dir+"-old"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	look()
	if at := r.last(d, after); at != r.since || !at.After(after) {
		t.Errorf("after the directory was replaced: %v", at)
	}
	if err := os.RemoveAll(filepath.Join(root, "blobs")); err != nil {
		t.Fatal(err)
	}
	if err := r.look(ctx); !errors.Is(err, errUnseen) {
		t.Errorf("after the directory has gone: %v", err)
	}
}
