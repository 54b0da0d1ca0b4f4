package lower

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What runs out at the moment is not taken for what the kernel cannot do: all dense packs would be copied.
func TestDenseRunsOut(t *testing.T) {
	for _, row := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {unix.EINVAL, false}, {errors.New("a dense pack does not show the bytes that it has"), false},
		{fmt.Errorf("mount: %w", unix.EMFILE), true}, {errNoLoop, true}, {errNoMount, true},
	} {
		if got := runsOut(row.err); got != row.want {
			t.Errorf("%v: %t", row.err, got)
		}
	}
}

// Without loop devices, where they are needed, it is not known whether the kernel mounts dense packs.
func TestDenseWithoutLoopDevices(t *testing.T) {
	needsMounts(t)
	p := newProber(t.TempDir())
	t.Cleanup(func() { _ = p.close() })
	if err := p.write(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.mount("private", true); err != nil {
		t.Skip(err)
	}
	if err := withDev(t, true, func() error { return p.tryDense(true) }); !runsOut(err) {
		t.Errorf("without loop devices: %v", err)
	}
}

// MountsDense says what Examine does, and leaves nothing.
func TestMountsDense(t *testing.T) {
	f, dir := needFeatures(t), t.TempDir()
	dense, err := MountsDense(dir)
	if err != nil || dense != (f.Dense == nil) {
		t.Errorf("%t, %v; Examine: %v", dense, err, f.Dense)
	}
	if f.Dense != nil && !strings.Contains(f.Dense.Error(), "invalid argument") {
		t.Errorf("refused with another word: %v", f.Dense)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Error("left: ", left, err)
	}
}
