package snapshotter

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
)

// Views over steps are compared where they are mounted, also when somebody removes them meanwhile. Where they are not
// mounted, as after a reboot, what they show is.
func TestPairOfViews(t *testing.T) {
	root := t.TempDir()
	s, ctx := openSteps(t, root), ns(t, "steps")
	one := addStep(t, s, ctx, stepBase(t, s, ctx), "one", file("one", "one"))
	two := addStep(t, s, ctx, one, "two", file("two", "two"))
	for _, mounted := range []bool{true, false} {
		lower, err := s.View(ctx, "lower", one)
		must(t, err)
		upper, err := s.View(ctx, "upper", two)
		must(t, err)
		if !mounted {
			must(t, mount.UnmountAll(lower[0].Source, 0))
			must(t, mount.UnmountAll(upper[0].Source, 0))
		}
		before := len(mountsBelow(t, root))
		p, err := OpenPair(ctx, s, lower, upper)
		must(t, err)
		if more := len(mountsBelow(t, root)) - before; (more > 0) == mounted {
			t.Errorf("mounted: %v; %d more mounts to compare", mounted, more)
		}
		must(t, s.Remove(ctx, "lower"))
		must(t, s.Remove(ctx, "upper"))
		for name, sides := range map[string]string{"etc/base": "lower upper", "one": "lower upper", "two": "upper"} {
			for side, dir := range map[string]string{"lower": p.Lower, "upper": p.Upper} {
				_, err := os.Stat(filepath.Join(dir, name))
				if strings.Contains(sides, side) != (err == nil) {
					t.Errorf("mounted: %v; %s of the %s side: %v", mounted, name, side, err)
				}
			}
		}
		must(t, p.Close())
		if left := mountsBelow(t, filepath.Join(s.opts.RunDir, dirViews)); len(left) > 0 {
			t.Errorf("mounted: %v", left)
		}
	}
}
