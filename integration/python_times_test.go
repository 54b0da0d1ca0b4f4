package integration

import (
	"crypto/sha256"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// A volume is filled from an image, and then from the next one, whose source has the same size and the same time.
// What programs make of that is what docs/python.md says: those that ask whether a time differs see the new source,
// with overlayfs they may not; those that ask which is newer may err with both.
func TestVolumeOfUpgradedImage(t *testing.T) {
	t.Parallel()
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	base := debianPython(t)
	baseRef := pushDemo(t, r, "times/base:1", base)
	pull(t, n, "overlayfs", baseRef)
	var refs []string
	for version := 1; version <= 2; version++ {
		app := compiledLayer(t, n, baseRef, map[string]string{"m.py": pythonSource(version)})
		img, err := image.New(image.Options{}, base, app)
		must(t, err)
		refs = append(refs, r.Ref(fmt.Sprintf("times/release:%d", version)))
		must(t, image.Push(testContext(t), refs[version-1], img))
	}
	newer := "version-1" // what a program that copies newer files only leaves
	if time1, time2 := releaseTime(1), releaseTime(2); time1 == time2 {
		t.Fatal("the releases have one time")
	} else if time2 > time1 {
		newer = "version-2"
	}
	const printed = "cut -d\\' -f2 m.py"
	rows := []struct{ name, command, script, dedup, overlayfs string }{
		{"rsync -a", "rsync", "rsync -a $NEW/ .; " + printed, "version-2", "version-1"},
		{"cp -a", "cp", "cp -a $NEW/. .; " + printed, "version-2", "version-2"},
		{"cp -au", "cp", "cp -au $NEW/. .; " + printed, newer, "version-1"},
		{"make", "make", "make() { command make -s $1 --eval 'out: m.py ; @cp m.py out' out; }; make; cp -a $NEW/. .; " +
			"make; cut -d\\' -f2 out; make -B; cut -d\\' -f2 out", "version-1\nversion-2", "version-1\nversion-2"},
	}
	for _, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
		pull(t, n, snapshotter, refs[0])
		pull(t, n, snapshotter, refs[1])
		must(t, n.View(testContext(t), snapshotter, refs[0], func(one string) error {
			return n.View(testContext(t), snapshotter, refs[1], func(two string) error {
				for _, row := range rows {
					t.Run(snapshotter+"/"+row.name, func(t *testing.T) {
						if _, err := exec.LookPath(row.command); err != nil {
							t.Skipf("%s is missing: apt-get install %[1]s", row.command)
						}
						want := row.overlayfs
						if snapshotter == node.Snapshotter {
							want = row.dedup
						}
						app := func(root string) string { return filepath.Join(root, "app") }
						out, err := shell(t.TempDir(), "cp -a "+app(one)+"/. .; NEW="+app(two)+"; "+row.script)
						if err != nil || string(out) != want+"\n" {
							t.Errorf("%q, %v; want %q", out, err, want)
						}
					})
				}
				return nil
			})
		}))
	}
}

// releaseTime is the time that a release of pythonSource shows.
func releaseTime(version int) uint32 {
	return content.SourceTime(sha256.Sum256([]byte(pythonSource(version))))
}
