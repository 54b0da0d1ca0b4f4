package doctor

import (
	"errors"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

// Where the kernel counts an EROFS file as a stacked file system, doctor says so, and that loop devices are used.
func TestStackingIsTold(t *testing.T) {
	full := errors.New("maximum fs stacking depth exceeded")
	for _, row := range []struct {
		name     string
		features lower.Features
		check    string
		severity Severity
		says     string
	}{
		{"counted", lower.Features{Loop: true, Counted: full}, "kernel.erofs", Info,
			"this kernel counts an EROFS file as a stacked file system"},
		{"counted, and mended", lower.Features{Loop: true, Counted: full}, "kernel.nested", OK, "Docker in Docker"},
		{"not counted", lower.Features{}, "kernel.erofs", OK, "straight from its files"},
		{"no nesting", lower.Features{Nested: full}, "kernel.nested", Warning, full.Error()},
	} {
		t.Run(row.name, func(t *testing.T) {
			var n node
			n.sayKernel(row.features)
			for _, f := range n.findings {
				if f.Check == row.check && f.Severity == row.severity && strings.Contains(f.Message, row.says) {
					return
				}
			}
			t.Errorf("%+v", n.findings)
		})
	}
}

// Doctor says whether packs are dense, and the mode what a kernel would add that mounts them.
func TestDensePacksAreTold(t *testing.T) {
	refused := errors.New("mount image: invalid argument")
	for _, row := range []struct {
		name               string
		features           lower.Features
		severity           Severity // "" for nothing said
		says, remedy, mode string
	}{
		{"dense", lower.Features{}, OK, "packs have blocks of 512 bytes: ", "", "A newer kernel would add nothing"},
		{"refused", lower.Features{Dense: refused}, Info,
			"(mount image: invalid argument): packs take about a tenth more of the disk",
			"Linux 6.4 or newer", "with Linux 6.4: denser packs"},
		{"refused, and more to gain", lower.Features{Dense: refused, DataOnly: refused, Loop: true}, Info, "blocks of 4 KiB",
			"6.1.115", "with Linux 6.4: denser packs; with Linux 6.5: memory shared among images; with Linux 6.12: no loop"},
		{"no EROFS", lower.Features{Erofs: refused}, "", "", "", "no mode"},
		{"no overlay", lower.Features{Upper: refused}, "", "", "", "no mode"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var n node
			n.sayKernel(row.features)
			sayMode(&n, row.features)
			var severity Severity
			for _, f := range n.findings {
				switch f.Check {
				case "kernel.dense-packs":
					if severity = f.Severity; !strings.Contains(f.Message, row.says) || !strings.Contains(f.Remedy, row.remedy) {
						t.Errorf("%+v", f)
					}
				case "kernel.mode":
					if !strings.Contains(f.Message, row.mode) {
						t.Errorf("mode: %s", f.Message)
					}
				}
			}
			if severity != row.severity {
				t.Errorf("severity %q, want %q", severity, row.severity)
			}
		})
	}
}

// What is said of overlays in user namespaces is what the try came to.
func TestUserNamespaceIsTold(t *testing.T) {
	for _, row := range []struct {
		err      error
		severity Severity
		says     string
	}{{nil, OK, "can mount overlays"}, {errors.New("dedupctl: no right"), Info, "cannot mount overlays (no right)"}} {
		var n node
		sayUserNamespace(&n, row.err)
		f := n.findings[0]
		if f.Check != "kernel.user-namespaces" || f.Severity != row.severity || !strings.Contains(f.Message, row.says) {
			t.Errorf("%v: %+v", row.err, f)
		}
	}
}
