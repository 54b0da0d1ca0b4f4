package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// A container that has changed the mode of a file under a kernel which needs metacopy=on goes on under one that does
// not.
func TestMetacopyOutlivesItsKernel(t *testing.T) {
	root := t.TempDir()
	s := open(t, root)
	again := func() (metacopy bool) {
		t.Helper()
		if err := stop(s); err != nil {
			t.Fatal(err)
		}
		s = open(t, root)
		return strings.Contains(strings.Join(s.OverlayOptions(), ","), "metacopy=on")
	}
	text := strings.Repeat("text", 5000)
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"dir/file": text}), nil)
	if _, err := s.Prepare(t.Context(), "container", name); err != nil {
		t.Fatal(err)
	}
	needed := s.kernel.Metacopy
	// What the older kernel leaves.
	if err := os.WriteFile(filepath.Join(root, fileMetacopy), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if !again() {
			t.Errorf("options %v", s.OverlayOptions())
		}
		mounts, err := s.Mounts(t.Context(), "container")
		if err != nil {
			t.Fatal(err)
		}
		err = mount.WithTempMount(t.Context(), mounts, func(dir string) error {
			path := filepath.Join(dir, "dir/file")
			b, err := os.ReadFile(path)
			if string(b) != text {
				t.Errorf("%d bytes", len(b))
			}
			return errors.Join(err, os.Chmod(path, 0o600))
		})
		if err != nil {
			t.Fatal(err)
		}
		upper, _ := s.upperOf(mounts)
		if _, err := unix.Getxattr(filepath.Join(upper, "dir/file"), "trusted.overlay.metacopy", nil); err != nil {
			t.Errorf("the upper directory holds the bytes: %v", err)
		}
	}
	if err := s.Remove(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	if again() != needed {
		t.Errorf("nothing is left of the older kernel: options %v", s.OverlayOptions())
	}
}

// A start removes what a dead process has left of trying something out, and leaves alone what one that lives is at.
func TestStartLeavesProbes(t *testing.T) {
	root := t.TempDir()
	if err := stop(open(t, root)); err != nil {
		t.Fatal(err)
	}
	dir, release, err := lower.ProbeDir(root, lower.ProbePrefix)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	dead := filepath.Join(root, lower.ProbePrefix+"dead")
	if err := os.Mkdir(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	open(t, root)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a start removed what is in use: %v", err)
	}
	if _, err := os.Stat(dead); !os.IsNotExist(err) {
		t.Errorf("a start left what is abandoned: %v", err)
	}
}
