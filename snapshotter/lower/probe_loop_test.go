package lower

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func needsMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
}

// Features say whether a container can mount overlays over its own files, and so does trying it.
func TestNestedOverlays(t *testing.T) {
	needsMounts(t)
	f, err := Examine(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if f.Nested != nil {
		t.Errorf("overlays inside of containers: %v", f.Nested)
	}
	if f.Counted != nil && !f.Loop {
		t.Errorf("%v, and images are mounted from files", f.Counted)
	}
}

// A lower directory that is one level too high, as an EROFS file is on some kernels, has the probe turn to loop
// devices.
func TestProbeCountsLevels(t *testing.T) {
	needsMounts(t)
	p := prober{dir: t.TempDir(), payload: []byte(strings.Repeat("payload", 200))}
	t.Cleanup(func() { _ = p.close() })
	if err := p.write(); err != nil {
		t.Fatal(err)
	}
	image, err := p.mount("private", true)
	if err != nil {
		t.Skip(err)
	}
	stacked := t.TempDir()
	if err := unix.Mount("overlay", stacked, "overlay", 0, "lowerdir="+image+":"+t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(stacked, unix.MNT_DETACH) })
	for _, row := range []struct {
		name, lower string
		counted     bool
	}{{"low enough", image, false}, {"too high", stacked, true}} {
		t.Run(row.name, func(t *testing.T) {
			var f Features
			if err := f.examineStacking(&p, row.lower); err != nil {
				t.Fatal(err)
			}
			if f.Loop != row.counted || (f.Counted != nil) != row.counted || f.Nested != nil {
				t.Errorf("%+v", f)
			}
		})
	}
}
